"""A short account of prepared data: counts per split, ties, repeats."""

import numpy as np
from rich.table import Table

from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData


def split_counts(sequences: ItemSequences, train: ItemSequences) -> dict[str, int | float]:
    """Counts of one split; `train` tells which users were seen in training.

    tied: share of rows whose target shares its time with the item before it. repeated: share of
    rows whose target is among the items before it in the row. seen_users: share of rows whose
    user has rows in `train`.
    """
    row_of_item = np.repeat(np.arange(len(sequences)), sequences.lengths)
    is_target = np.zeros(len(sequences.items), bool)
    is_target[sequences.last_positions] = True
    target_again = sequences.items == sequences.items[sequences.last_positions][row_of_item]
    repeated = np.bincount(row_of_item[target_again & ~is_target], minlength=len(sequences)) > 0
    return {
        "rows": len(sequences),
        "users": len(np.unique(sequences.user)),
        "interactions": len(sequences.items),
        "mean_length": float(sequences.lengths.mean()),
        "tied": float(sequences.tied.mean()),
        "repeated": float(repeated.mean()),
        "seen_users": float(np.isin(sequences.user, train.user).mean()),
    }


def summarise(data: RecData) -> dict:
    """{'items', 'distinct_titles', 'splits': {name: split_counts}} (JSON-able)."""
    train = data.splits["train_sequences"]
    return {
        "items": data.catalogue.num_items,
        "distinct_titles": data.catalogue.num_distinct_titles,
        "splits": {name: split_counts(data.splits[name], train) for name in SPLITS},
    }


def summary_table(data: RecData) -> Table:
    """The account as a table for the terminal."""
    summary = summarise(data)
    table = Table(
        title=f"{summary['items']:,} items, {summary['distinct_titles']:,} distinct titles",
        caption="a row's last item is its target; tied: the target shares its time with the item "
        "before it; repeated: the target is in its own history; seen users: in train_sequences",
    )
    table.add_column("split", no_wrap=True)
    for heading in ("rows", "users", "length", "tied", "repeated", "seen users"):
        table.add_column(heading, justify="right")
    for name, counts in summary["splits"].items():
        shares = [f"{100 * counts[key]:.1f}%" for key in ("tied", "repeated", "seen_users")]
        table.add_row(
            name,
            f"{counts['rows']:,}",
            f"{counts['users']:,}",
            f"{counts['mean_length']:.1f}",
            *shares,
        )
    return table
