"""The rows of an evaluation, what a model does on them, and full rankings by CF logits.

Axis letters: R rows, B rows of a block, H history items, I items, W items of a block, D
width of what a CF logits store holds, M places of a list, T temperatures.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.batching import map_batches
from tca4rec_jax.cf.item_blocks import (
    Highest,
    LogSum,
    SharedTitles,
    block_width,
    fold,
    highest_of,
)
from tca4rec_jax.cf.models.popularity import popularity_logits
from tca4rec_jax.cf.scoring import LazyRows
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.candidates import draw_candidates
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.distributed.multihost import gather_process_rows, process_rows
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.metrics import CUTOFFS, ahead_of

POPULAR, CF = "Most popular", "CF model"
_LOGITS_AT_ONCE = 1 << 24  # 64 MiB of float32 bound the memory of what is made for all items
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class EvaluationRows:
    """The rows of a split that are ranked."""

    split: str
    sequences: ItemSequences  # these rows alone
    position_R: np.ndarray  # int64, the flat position of each target in the split
    history_RxH: np.ndarray  # int32, the prompts' items, oldest first, padded left with PAD_ITEM
    target_R: np.ndarray  # int32, the items that came next
    # int32, the items among which each target is ranked; None: all.
    candidates_RxN: np.ndarray | None = None

    @classmethod
    def of(cls, experiment: Experiment) -> "EvaluationRows":
        """The rows of `evaluation.split` that `evaluation.rows` says; raises as `sample`."""
        config = experiment.config.evaluation
        return cls.sample(experiment, config.split, config.rows)

    @classmethod
    def sample(cls, experiment: Experiment, split: str, count: int) -> "EvaluationRows":
        """Samples `count` rows of a split with `evaluation.seed`; 0 takes all.

        Raises as `draw_candidates`, if candidates are asked for.
        """
        config, every = experiment.config, experiment.data.splits[split]
        index_R = sample_rows(len(every), count, config.evaluation.seed)
        sequences = every.take(index_R)
        history_RxH, target_R = sequences.histories_and_targets(config.data.history_length)
        rows = cls(split, sequences, every.last_positions[index_R], history_RxH, target_R)
        count, rng = config.evaluation.candidates, np.random.default_rng(config.evaluation.seed)
        if not count:
            return rows
        allowed_I = experiment.item_filter.allowed_I
        drawn_RxN = draw_candidates(rows.histories, target_R, allowed_I, count, rng)
        return dataclasses.replace(rows, candidates_RxN=drawn_RxN)

    def __len__(self) -> int:
        return len(self.target_R)

    @property
    def histories(self) -> Ragged:
        """All items before each target, also those too old for the prompt."""
        before_n = np.delete(self.sequences.items, self.sequences.last_positions)
        return Ragged.from_lengths(before_n, self.sequences.lengths - 1)

    def allowed(self, items: ItemFilter) -> Callable[[np.ndarray], np.ndarray] | None:
        """Row numbers int64 [B] -> bool [B, I], the items that are ranked; None ranks all."""
        masks, candidates_RxN = items.masks(self.histories), self.candidates_RxN
        if candidates_RxN is None:
            return masks

        def of_rows(rows_B: np.ndarray) -> np.ndarray:
            ranked_BxI = np.zeros((len(rows_B), len(items.allowed_I)), bool)
            np.put_along_axis(ranked_BxI, candidates_RxN[rows_B], True, axis=1)
            return ranked_BxI if masks is None else ranked_BxI & masks(rows_B)

        return of_rows

    def inputs(self) -> dict[str, str]:
        """What the rows are: provenance."""
        inputs = {"rows": self.sequences.content_hash()}
        if self.candidates_RxN is not None:
            inputs["candidates"] = hashlib.sha256(self.candidates_RxN.tobytes()).hexdigest()
        return inputs


def sample_rows(available: int, count: int, seed: int) -> np.ndarray:
    """int64, ascending: `count` of the rows 0..available-1 without replacement; all for 0."""
    if not count or count >= available:
        return np.arange(available)
    return np.sort(np.random.default_rng(seed).choice(available, count, replace=False))


class ModelRanking(NamedTuple):
    """One model on the evaluated rows.

    `nll` is float32, -log P(target's title) at each of evaluation.temperatures; NaN for guided
    scores, which are no distribution.
    """

    items_RxM: np.ndarray  # int32, the best items, best first, -1 where there are no more
    rank_R: np.ndarray  # int32, 0-based rank of the target item, -1 if it is not ranked
    title_rank_R: np.ndarray  # int32, the same among distinct titles, each one place of the list
    nll_RxT: np.ndarray

    def best_nll(self, temperatures: tuple[float, ...]) -> tuple[float, np.ndarray] | None:
        """(the temperature of the lowest mean NLL, the rows' NLL [R] at it); None if guided.

        An untrained LLM is badly calibrated: at one fixed temperature a lower NLL after training
        may be due to temperature alone.
        """
        if np.isnan(self.nll_RxT).any():
            return None
        best = int(np.argmin(self.nll_RxT.mean(axis=0)))
        return float(temperatures[best]), self.nll_RxT[:, best]


def cf_models(
    experiment: Experiment, rows: EvaluationRows
) -> dict[str, tuple[np.ndarray | LazyRows, CFItems]]:
    """'Most popular' and the CF model of the logits store on this process's share of the rows.

    What `full_ranking` takes: user vectors, or logits, and the item side.
    """
    position_R, items = (
        rows.position_R[process_rows(len(rows))],
        experiment.data.catalogue.num_items,
    )
    store = experiment.cf_store(rows.split, position_R)
    popular_I = popularity_logits(experiment.data.splits["train_sequences"], items)
    nobody_RxD, nothing_IxD = (np.zeros((rows, 1), np.float32) for rows in (len(position_R), items))
    return {
        POPULAR: (nobody_RxD, CFItems(nothing_IxD, popular_I)),
        CF: (LazyRows(store.read, position_R, store.width), store.cf_items),
    }


def rank_cf_models(
    experiment: Experiment,
    rows: EvaluationRows,
    models: Mapping[str, tuple[np.ndarray | LazyRows, CFItems]],
) -> dict[str, ModelRanking]:
    """The rankings of `cf_models`; several processes share the rows."""
    mine, config = process_rows(len(rows)), experiment.config.evaluation
    masks, leaf_of_item = rows.allowed(experiment.item_filter), experiment.trie.leaf_of_item
    rank = partial(
        full_ranking,
        leaf_of_item=leaf_of_item,
        target_R=rows.target_R[mine],
        temperatures=config.temperatures,
        allowed=masks and LazyRows(masks, mine, len(leaf_of_item)),
        places=config.cutoffs[-1],
    )
    rankings = {label: rank(*model) for label, model in models.items()}
    return {label: gather_process_rows(one, len(rows)) for label, one in rankings.items()}


def full_ranking(
    cf_RxD: np.ndarray | LazyRows,
    items: CFItems,
    leaf_of_item: np.ndarray,
    target_R: np.ndarray,
    temperatures: tuple[float, ...],
    *,
    allowed: np.ndarray | LazyRows | None = None,
    places: int = CUTOFFS[-1],
    batch_size: int = 0,
) -> ModelRanking:
    """Ranks the whole catalogue for every row by CF logits, in blocks of rows and items.

    A title (`leaf_of_item`, 0..Q-1) scores as its best item; its probability is the sum of its
    items' probabilities. `cf` are user vectors, or the logits [R, I] if `items` is DENSE. Only
    `allowed` items (bool [R, I]; None allows all) are ranked, as in a search; the probabilities are
    those of the whole catalogue. A list has `places` items, or all of them if there are fewer.
    Blocks have `batch_size` rows; 0 takes as many as bound their memory. Raises ValueError for NaN.
    """
    num_items, temperature_T = len(leaf_of_item), np.asarray(temperatures, np.float32)
    title_of_item = leaf_of_item.astype(np.int32)
    batch_size = batch_size or batch_rows(items, num_items, masks=allowed is not None)
    width = block_width(min(batch_size, max(len(target_R), 1)), num_items)
    titles = jax.tree.map(jnp.asarray, (title_of_item, SharedTitles.of(title_of_item, width)))
    items = jax.tree.map(jnp.asarray, items)
    rank = partial(_rank_block, min(places, num_items), items, *titles, temperature_T)
    arrays = [cf_RxD, target_R.astype(np.int32), *([] if allowed is None else [allowed])]
    blocks = map_batches(rank, *arrays, batch_size=batch_size)
    ranking = ModelRanking(*blocks)
    for row, _ in np.argwhere(np.isnan(ranking.nll_RxT)):  # compares false: it would rank first
        raise ValueError(f"row {row}: the CF logits contain NaN")
    return ranking


def batch_rows(items: CFItems, num_items: int, *, masks: bool = False) -> int:
    """How many rows are ranked at once: few if their logits, or masks, of all items are given."""
    whole = items.table_IxD is None or masks
    return min(rows_at_once(num_items), _ROWS_AT_ONCE) if whole else _ROWS_AT_ONCE


def rows_at_once(num_items: int) -> int:
    """How many rows' logits of all items bound the memory of what is made of them."""
    return max(_LOGITS_AT_ONCE // num_items, 1)


@partial(jax.jit, static_argnums=0)
def _rank_block(
    places: int,
    items: CFItems,
    title_I,
    shared: SharedTitles,
    temperature_T,
    cf_BxD,
    target_B,
    allowed_BxI=None,
):
    """What ModelRanking has of a block of rows."""
    rows, target_title_B = len(target_B), title_I[target_B]
    allowed = () if allowed_BxI is None else (allowed_BxI,)

    def masked(logits_BxW, allowed_BxW=None):
        if allowed_BxW is None:
            return logits_BxW
        return jnp.where(allowed_BxW, logits_BxW, -jnp.inf)

    def look(state, logits_BxW, item_W, title_W, *allowed_BxW):
        sums, own_B, own_title_B, highest = state
        of_title_BxW = title_W[None, :] == target_title_B[:, None]
        ranked_BxW = masked(logits_BxW, *allowed_BxW)

        def add(sums, temperature):
            z_BxW = logits_BxW / temperature
            of_title = sums[1].add(jnp.where(of_title_BxW, z_BxW, -jnp.inf))
            return sums[0].add(z_BxW), of_title

        return (
            jax.lax.map(lambda args: add(*args), (sums, temperature_T)),
            highest_of(ranked_BxW, item_W[None, :] == target_B[:, None], own_B),
            highest_of(ranked_BxW, of_title_BxW, own_title_B),
            highest.add(ranked_BxW, item_W),
        )

    nothing = LogSum.nothing(rows), LogSum.nothing(rows)
    sums = jax.tree.map(lambda a: jnp.stack([a] * len(temperature_T)), nothing)
    none_B = jnp.full(rows, -jnp.inf)
    state = sums, none_B, none_B, Highest.nothing(rows, places)
    state = fold(look, state, cf_BxD, items, title_I, *allowed)
    (every, of_title), own_B, own_title_B, highest = state
    is_alone_I = shared.others(len(title_I))

    def count(ranks, logits_BxW, item_W, title_W, is_alone_W, *allowed_BxW):
        ranked_BxW = masked(logits_BxW, *allowed_BxW)
        ahead_BxW = ahead_of(ranked_BxW, item_W, own_B, target_B)
        title_BxW = ahead_of(ranked_BxW, title_W, own_title_B, target_title_B) & is_alone_W[None, :]
        here = (jnp.sum(one, axis=1, dtype=jnp.int32) for one in (ahead_BxW, title_BxW))
        return tuple(map(jnp.add, ranks, here))

    zeros = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32)
    rank_B, title_rank_B = fold(count, zeros, cf_BxD, items, title_I, is_alone_I, *allowed)
    title_rank_B += shared.count_ahead(cf_BxD, items, own_title_B, target_title_B, allowed_BxI)
    return (
        highest.items_BxM,
        jnp.where(own_B > -jnp.inf, rank_B, -1),
        jnp.where(own_title_B > -jnp.inf, title_rank_B, -1),
        (every.value_B - of_title.value_B).T,
    )
