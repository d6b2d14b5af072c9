"""The id report: collisions, how evenly each level's codes are used, what the CF model sees of it.

Axis letters: I items, N nodes of the trie of ids, L levels, B users of a batch, U users, D width of
the CF vectors.
"""

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from tca4rec_jax.batching import map_batches
from tca4rec_jax.cf.item_blocks import Entropy
from tca4rec_jax.core.collaborative_tokenizer import CFItems, cf_logits, node_log_mass
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.fileio import write_text
from tca4rec_jax.reporting import Rows, markdown_table, save_figure, write_results
from tca4rec_jax.semantic_ids.ids import LEVELS, SemanticIds

REPORT = "report.json"
_USERS_AT_ONCE = 64


class CFRows(NamedTuple):
    """The CF model's distributions over the items for some users.

    Attributes:
      vector_UxD: float32, user vectors, or logits [U, I] if the items have no table.
      items: the item side of factorised logits.
      beta: the temperature of the logits.
    """

    vector_UxD: np.ndarray
    items: CFItems
    beta: float


def describe(ids: SemanticIds, cf: CFRows | None = None) -> dict[str, Any]:
    """The report: counts of items and ids, {level: its numbers}, and the CF model's entropy.

    A level's numbers: 'tokens' that are used, 'entropy' in nats and 'perplexity' of its tokens over
    the items that have one, 'prefixes' different ids cut after it; with `cf` also 'cf_nats', the
    mean over the users of the information that its token gives about the CF model's item once the
    tokens before it are known, and 'cf_share', that of the CF model's entropy.
    """
    trie = ItemTrie.build(ids.codes)
    length_I = ids.codes.lengths
    ended_L = np.cumsum(np.bincount(trie.lengths_Q))[:-1]  # ids that are shorter than this level
    prefixes_L = np.diff(trie.level_offsets)[1:] + ended_L
    level_of_code = np.arange(ids.codes.values.size) - np.repeat(ids.codes.offsets[:-1], length_I)
    sizes_Q = np.diff(trie.items_by_leaf.offsets)
    levels = {}
    for level, prefixes in enumerate(prefixes_L):
        used = np.unique(ids.codes.values[level_of_code == level], return_counts=True)[1]
        share = used / used.sum()
        entropy = float(-(share * np.log(share)).sum())
        levels[LEVELS[level]] = {
            "items": int(used.sum()),
            "tokens": used.size,
            "entropy": entropy,
            "perplexity": float(np.exp(entropy)),
            "prefixes": int(prefixes),
        }
    report: dict[str, Any] = {
        "items": trie.num_items,
        "ids": trie.num_leaves,
        "items that share an id": int(sizes_Q[sizes_Q > 1].sum()),
        "levels": levels,
    }
    if cf is not None:
        entropy, resolved_L = resolved_entropy(trie, cf)
        for name, nats in zip(levels, resolved_L.tolist(), strict=True):
            levels[name] |= {"cf_nats": nats, "cf_share": nats / max(entropy, 1e-30)}
        rest = max(entropy - float(resolved_L.sum()), 0.0)
        report["cf"] = {"users": len(cf.vector_UxD), "entropy": entropy, "within ids": rest}
    return report


def resolved_entropy(trie: ItemTrie, cf: CFRows) -> tuple[float, np.ndarray]:
    """(entropy of the CF model's items, what each level resolves of it: float64 [L]), in nats.

    Means over the users. The item's token at a level, given those before it, has this much entropy;
    as the item decides the token, that is what the two have in common. `trie` is token by token.
    """
    program = functools.partial(_resolved, DeviceTrie.of(trie), cf.items, cf.beta)
    entropy_U, resolved_UxL = map_batches(program, cf.vector_UxD, batch_size=_USERS_AT_ONCE)
    return float(entropy_U.mean(dtype=np.float64)), resolved_UxL.mean(axis=0, dtype=np.float64)


@jax.jit
def _resolved(trie, items, beta, vector_BxD):
    """float32 [B], [B, L]."""
    logits_BxI = cf_logits(vector_BxD, items) / beta
    entropy_B = Entropy.nothing(len(logits_BxI)).add(logits_BxI).value_B
    mass_BxN = node_log_mass(logits_BxI, trie)
    log_p_BxN = mass_BxN - mass_BxN[:, :1]
    surprise_BxN = log_p_BxN[:, jnp.maximum(trie.parent, 0)] - log_p_BxN  # 0 at the root
    nats_BxN = jnp.where(jnp.exp(log_p_BxN) > 0, jnp.exp(log_p_BxN) * surprise_BxN, 0.0)
    levels = itertools.pairwise(trie.sizes.level_offsets[1:])
    return entropy_B, jnp.stack([nats_BxN[:, a:b].sum(axis=1) for a, b in levels], axis=1)


def level_rows(report: Mapping[str, Any]) -> Rows:
    """The levels of a report as a table."""
    columns = {
        "items": "items",
        "tokens": "tokens",
        "prefixes": "prefixes",
        "entropy": "entropy, nats",
        "perplexity": "perplexity",
        "left": "distance left",
        "cf_nats": "CF entropy resolved, nats",
        "cf_share": "share of it",
    }
    return {
        f"{number}: <{name}_..>": {
            heading: values[key] for key, heading in columns.items() if key in values
        }
        for number, (name, values) in enumerate(report["levels"].items(), start=1)
    }


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """What the table does not say: collisions, and what ids leave of the CF model's entropy."""
    shared, items = report["items that share an id"], report["items"]
    lines = [f"{items} items, {report['ids']} ids, {shared} items share theirs with another one."]
    if "sharing" in report:
        stages = ", ".join(f"{stage} {count}" for stage, count in report["sharing"].items())
        twins = report["items with the embedding of another one"]
        lines.append(
            f"Items that share their codes, after each stage: {stages}. {twins} items have the "
            "embedding of another one."
        )
    if "cf" in report:
        cf = report["cf"]
        lines.append(
            f"The CF model's entropy over the items is {cf['entropy']:.3f} nats (mean of "
            f"{cf['users']} users), of which {cf['within ids']:.3f} lie within shared ids."
        )
    return lines


def write_report(folder: Path, report: Mapping[str, Any], ids: SemanticIds) -> None:
    """Writes report.md and report.png, then report.json, which stands for all of them."""
    text = [
        "# Semantic ids\n",
        *(f"{line}\n" for line in lines_of(report)),
        markdown_table(level_rows(report), first_column="level"),
        "Tokens: those in use, with the entropy and perplexity of their use by the items. "
        "Prefixes: different ids, cut after this level. Distance left: mean squared distance of "
        "the embeddings from what the quantiser's codes so far stand for, relative to that from "
        "their mean. CF entropy resolved: what a level says about the next item of the CF model "
        "once the tokens before it are known, a mean over users.\n",
        "![how codes are used, what they resolve](report.png)\n",
    ]
    write_text(folder / "report.md", "\n".join(text))
    _plot(folder / "report.png", report, ids)
    write_results(folder / REPORT, report)


def _plot(path: Path, report: Mapping[str, Any], ids: SemanticIds) -> None:
    """A PNG: how many items each token has, prefixes by level, and the CF entropy resolved."""
    levels, cf = report["levels"], report.get("cf")
    figure = Figure(figsize=(12 if cf else 8, 3.6), layout="constrained")
    panels = figure.subplots(1, 3 if cf else 2)
    for panel in panels:
        panel.grid(alpha=0.3)
    counts = np.bincount(ids.codes.values, minlength=len(ids.tokens))
    first = 0
    for name, values in levels.items():
        used = np.sort(counts[first : first + values["tokens"]])[::-1]
        panels[0].plot(np.arange(1, used.size + 1), used, label=f"level {name}")
        first += values["tokens"]
    panels[0].set(xlabel="token of a level, by use", ylabel="items", yscale="log")
    panels[0].legend()
    panels[1].bar(list(levels), [values["prefixes"] for values in levels.values()], alpha=0.7)
    panels[1].axhline(report["items"], color="C1", linestyle="--", label="items")
    panels[1].set(xlabel="level", ylabel="different prefixes", ylim=(0, 1.2 * report["items"]))
    panels[1].legend(loc="upper left")
    if cf:
        nats = np.array([values["cf_nats"] for values in levels.values()])
        panels[2].bar(list(levels), nats, bottom=np.cumsum(nats) - nats, alpha=0.7)
        panels[2].axhline(cf["entropy"], color="C1", linestyle="--", label="the CF model's entropy")
        panels[2].set(xlabel="level", ylabel="CF entropy resolved, nats")
        panels[2].set_ylim(0, 1.2 * cf["entropy"] + 1e-9)
        panels[2].legend(loc="upper left")
    save_figure(path, figure)
