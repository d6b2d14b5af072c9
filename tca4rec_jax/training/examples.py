"""Training examples: token rows with their supervised positions, CF rows and trie decisions.

Everything that can be computed once per data set is computed here, vectorised, as ragged arrays;
batches.py only gathers and pads.

Which titles are targets, that is supervised (docs/method.md):
  'all':  rows are non-overlapping pieces of users' sequences, as many whole titles as fit the
          token budget; every title after a piece's first is a target.
  'last': the published protocol, a row is a history and one target.

Axis letters: R examples, I items.
"""

from dataclasses import dataclass

import numpy as np

from tca4rec_jax.core.decisions import RaggedDecisions, title_decisions
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.prompts import TitleTokens, keep_latest, row_tokens
from tca4rec_jax.data.ragged import Ragged, ranges
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.errors import UserError

TARGETS = ("all", "last")


@dataclass(frozen=True, eq=False)
class Examples:
    """R examples.

    Attributes:
      tokens: int32, prompt and titles.
      position: int32, the positions whose next token is supervised.
      label: int32, aligned with `position`: that next token.
      cf_position: int64, one per supervised title: its flat position in the ItemSequences, which is
        its row in the CF logits store.
      decisions: of the supervised titles; positions are indices into `position`, titles into
        `cf_position`.
    """

    tokens: Ragged
    position: Ragged
    label: Ragged
    cf_position: Ragged
    decisions: RaggedDecisions

    def __len__(self) -> int:
        return len(self.tokens)


def build_examples(
    sequences: ItemSequences,
    tokens: TitleTokens,
    compressed: ItemTrie,
    *,
    targets: str,
    max_tokens: int,
) -> Examples:
    """Examples of a split.

    Args:
      sequences: users' sequences ('all') or histories with targets ('last').
      tokens: the tokenised catalogue.
      compressed: the compressed trie of these tokens.
      targets: one of TARGETS.
      max_tokens: budget of a row, prefix included; the model's longest sequence.

    Raises:
      UserError: unknown targets, a title that does not fit the budget, or no example.
    """
    if targets not in TARGETS:
        raise UserError(f"training.targets is {targets!r}: expected one of {TARGETS}")
    if targets == "all":
        pieces, first = _pieces(sequences, tokens, max_tokens)
        supervised = np.ones(pieces.values.size, bool)
        supervised[pieces.offsets[:-1]] = False
    else:
        keep = sequences.lengths > 1
        rows = sequences if keep.all() else sequences.take(keep)
        ends = np.cumsum(sequences.lengths)[keep]
        pieces = keep_latest(tokens, Ragged(rows.items, rows.offsets), max_tokens, reserve=2)
        first = ends - pieces.lengths
        supervised = np.zeros(pieces.values.size, bool)
        supervised[pieces.offsets[1:] - 1] = True
    if not len(pieces):
        raise UserError("no training example: every row has a single item, so nothing precedes it")
    return _supervise(pieces, first, supervised, tokens, title_decisions(compressed))


def row_of_example(examples: Examples, sequences: ItemSequences) -> np.ndarray:
    """int64 [R]: the row of the split that each example was made from."""
    first = examples.cf_position.values[examples.cf_position.offsets[:-1]]
    return sequences.row_of(first)


def _pieces(sequences: ItemSequences, tokens: TitleTokens, max_tokens: int):
    """Cuts every row into consecutive pieces that fit the budget; pieces of one title are dropped.

    Returns:
      (pieces Ragged of items, first int64 [R]: flat position of each piece's first item).
    """
    lengths = tokens.titles.lengths[sequences.items]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    budget = max_tokens - tokens.prefix.size
    if lengths.size and lengths.max() > budget:
        item = int(sequences.items[int(np.argmax(lengths))])
        raise UserError(
            f"the title of item {item} has {lengths.max()} tokens, the budget is {max_tokens} with "
            f"a prefix of {tokens.prefix.size}: raise prompt.max_tokens"
        )
    start, stop = sequences.offsets[:-1], sequences.offsets[1:]
    cuts = []
    while start.size:  # the next piece of every row that has one
        end = np.minimum(np.searchsorted(ends, ends[start] + budget, side="right") - 1, stop)
        cuts.append(np.stack([start, end]))
        start, stop = end[end < stop], stop[end < stop]
    first, last = np.concatenate(cuts, axis=1)
    order = np.argsort(first)
    order = order[(last - first)[order] > 1]
    first, counts = first[order], (last - first)[order]
    return Ragged.from_lengths(sequences.items[ranges(first, counts)], counts), first


def _supervise(
    pieces, first, supervised, tokens: TitleTokens, decisions: RaggedDecisions
) -> Examples:
    """Positions, labels, CF rows and decisions of the supervised titles of each piece."""
    ids, starts = row_tokens(tokens, pieces)
    row_of_item = np.repeat(np.arange(len(pieces)), pieces.lengths)
    items, rows = pieces.values[supervised], row_of_item[supervised]
    title_start = starts.values[supervised]  # within the row
    title_length = tokens.titles.lengths[items]
    num_rows = len(pieces)

    def per_row(values, row_of_value):
        return Ragged.from_lengths(values, np.bincount(row_of_value, minlength=num_rows))

    position_row = np.repeat(rows, title_length)
    position = ranges(title_start - 1, title_length)
    label = ids.values[ids.offsets[position_row] + position + 1]
    titles_per_row = np.bincount(rows, minlength=num_rows)
    positions_before = np.cumsum(title_length) - title_length
    row_first_title = np.cumsum(titles_per_row) - titles_per_row
    first_position = positions_before[row_first_title[rows]]
    in_row = positions_before - first_position  # supervised positions before the title, in its row

    per_title = decisions.position.take(items)
    title_of_decision = np.repeat(np.arange(items.size), per_title.lengths)
    decision_row = rows[title_of_decision]
    cf_position = np.repeat(first, pieces.lengths) + ranges(
        np.zeros(num_rows, np.int64), pieces.lengths
    )
    return Examples(
        tokens=ids,
        position=per_row(position.astype(np.int32), position_row),
        label=per_row(label, position_row),
        cf_position=per_row(cf_position[supervised], rows),
        decisions=RaggedDecisions(
            position=per_row(
                (in_row[title_of_decision] + per_title.values).astype(np.int32), decision_row
            ),
            title=per_row(
                (title_of_decision - row_first_title[decision_row]).astype(np.int32), decision_row
            ),
            node=per_row(decisions.node.take(items).values, decision_row),
            child=per_row(decisions.child.take(items).values, decision_row),
        ),
    )
