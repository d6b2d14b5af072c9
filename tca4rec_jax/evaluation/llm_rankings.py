"""The lists of CF models and LLM runs for the evaluated rows; those of LLM runs are kept on disk.

Axis letters: R rows, I items, K places of a list, Q distinct titles, T temperatures.
"""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from jax.nn import logsumexp

from tca4rec_jax.cf.models.popularity import popularity_logits
from tca4rec_jax.config import build, score_weights
from tca4rec_jax.data.prompts import prompts
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.decoding.beam_search import SearchConfig
from tca4rec_jax.decoding.engine import BatchedSearch, Contender
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.decoding.recommendations import Recommendations, SweepFile, write_arrays
from tca4rec_jax.distributed.multihost import (
    all_processes,
    broadcast_from_main,
    gather_process_rows,
    is_main_process,
    is_multiprocess,
    process_rows,
)
from tca4rec_jax.metrics import CUTOFFS, rank_in_list, rank_of_target
from tca4rec_jax.training.run import Run

POPULAR, CF = "Most popular", "CF model"


class Ranked(NamedTuple):
    """One model on the evaluated rows.

    Attributes:
      items_RxK: int32, the best items, best first, -1 where there are no more.
      rank_R: int32, 0-based rank of the target item, -1 if it is not among those considered.
      title_rank_R: int32, the same among distinct titles: items that share one count as one.
      nll_RxT: float32, -log P(target's title) at each of evaluation.temperatures; NaN for guided
        scores, which are no distribution.
    """

    items_RxK: np.ndarray
    rank_R: np.ndarray
    title_rank_R: np.ndarray
    nll_RxT: np.ndarray

    def best_nll(self, temperatures) -> tuple[float, np.ndarray] | None:
        """(temperature of the lowest mean, the rows' NLL [R] at it); None for guided scores.

        An untrained LLM is badly calibrated: compared at one temperature, training could seem to
        improve what it only cools or heats.
        """
        if np.isnan(self.nll_RxT).any():
            return None
        best = int(np.argmin(self.nll_RxT.mean(axis=0)))
        return float(temperatures[best]), self.nll_RxT[:, best]


def sample_rows(sequences: ItemSequences, count: int, seed: int) -> np.ndarray:
    """int64: `count` rows without replacement in ascending order; all of them for 0."""
    if not count or count >= len(sequences):
        return np.arange(len(sequences))
    return np.sort(np.random.default_rng(seed).choice(len(sequences), count, replace=False))


def cf_models(run: Run, rows: np.ndarray) -> dict[str, Ranked]:
    """Most popular and the CF model of the logits store, by full ranking."""
    popular_I = popularity_logits(run.data.splits["train_sequences"], run.data.catalogue.num_items)
    own = rows[process_rows(rows.size)]
    scores = {
        POPULAR: np.broadcast_to(popular_I, (own.size, popular_I.size)),
        CF: _cf_logits(run, own)(np.arange(own.size)),
    }
    ranked = {label: _full_ranking(run, own, scores_RxI) for label, scores_RxI in scores.items()}
    return {label: gather_process_rows(one, rows.size) for label, one in ranked.items()}


def _cf_logits(run: Run, rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Indices into the given rows, int64 [m] -> CF logits for their targets, float32 [m, I]."""
    split = run.config.evaluation.split
    positions = run.data.splits[split].last_positions[rows]
    store = run.cf_store(split, positions)
    return lambda chosen: store.logits(positions[chosen])


def _full_ranking(run: Run, rows: np.ndarray, scores_RxI: np.ndarray) -> Ranked:
    split = run.data.splits[run.config.evaluation.split]
    target_R = split.items[split.last_positions[rows]]
    leaf_of_item = run.trie.leaf_of_item
    title_RxQ = np.full((rows.size, run.trie.num_leaves), -np.inf, np.float32)
    np.maximum.at(title_RxQ, (slice(None), leaf_of_item), scores_RxI)
    same_title_RxI = leaf_of_item[None, :] == leaf_of_item[target_R][:, None]

    def title_nll(temperature: float) -> np.ndarray:
        z_RxI = scores_RxI.astype(np.float32) / temperature
        of_title_R = logsumexp(z_RxI, axis=1, where=same_title_RxI)
        return np.asarray(logsumexp(z_RxI, axis=1) - of_title_R)

    best = np.argsort(-scores_RxI, axis=1, kind="stable")[:, : max(CUTOFFS)]
    return Ranked(
        best.astype(np.int32),
        rank_of_target(scores_RxI, target_R),
        rank_of_target(title_RxQ, leaf_of_item[target_R]),
        np.stack([title_nll(t) for t in run.config.evaluation.temperatures], axis=1),
    )


def cached_llms(
    run: Run, rows: np.ndarray, variants: dict[str, dict[str, float]]
) -> dict[str, Ranked]:
    """By label the lists of LLM runs {run: {label: guidance}}; those found on disk are not made.

    Runs that share layers rank the rows together, others one after the other.
    """
    ranked, missing = {}, {}
    for name, of_run in variants.items():
        guidances = list(of_run.values())
        identity = broadcast_from_main(
            partial(_identity, run, rows, name, guidances), size=32
        ).hex()
        path = run.workdir / "evaluation" / f"{name or 'untrained'}_{identity[:8]}.npz"
        if all_processes(_saved_identity(path) == identity):
            logging.info("Lists of an earlier evaluation in %s", path)
            with np.load(path) as saved:
                found = [saved[field] for field in Ranked._fields]
            ranked |= dict(zip(of_run, map(Ranked, *found), strict=True))
        else:
            missing[name] = path, identity
    together = [list(missing)] if run.shared_layers and missing else [[name] for name in missing]
    for names in together:
        file = None
        if not is_multiprocess():
            identity = "".join(missing[name][1] for name in names)
            file = SweepFile(run.workdir / "evaluation" / "unfinished.npz", identity)
        guidances = {name: list(variants[name].values()) for name in names}
        found = _llms(run, rows, guidances, file)
        for name, of_run in zip(names, found, strict=True):
            ranked |= dict(zip(variants[name], of_run, strict=True))
            if is_main_process():
                path, identity = missing[name]
                fields = Ranked(*map(np.stack, zip(*of_run, strict=True)))._asdict()
                write_arrays(path, identity=identity, **fields)
        if file is not None:
            file.remove()
    return ranked


def _saved_identity(path: Path) -> str:
    if not path.exists():
        return ""
    with np.load(path) as saved:
        return str(saved["identity"])


def _identity(run: Run, rows: np.ndarray, name: str, guidances: list[float]) -> bytes:
    """SHA-256 of everything that the lists of an LLM run depend on."""
    config = run.config
    log = run.workdir / "llm" / name / "log.jsonl" if name else None
    parts = {
        "llm": config.llm.to_dict(),
        "lora": config.lora.to_dict() if name else None,
        "prompt": config.prompt.to_dict(),
        "decoding": config.decoding.to_dict(),
        "allowed": _sha256(ItemFilter.from_config(config.decoding, run.data.catalogue).allowed_I),
        "guidances": guidances,
        "temperatures": config.evaluation.temperatures,
        "beta": config.objective.beta,
        "training log": hashlib.sha256(log.read_bytes()).hexdigest() if name else "",
        "cf": _sha256(_cf_logits(run, rows)(np.arange(rows.size))) if any(guidances) else "",
        "checkpoint": config.inference.checkpoint,
        "rows": _sha256(rows),
        "data": run.data.splits[config.evaluation.split].content_hash(),
        "catalogue": run.data.catalogue.content_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).digest()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _llms(
    run: Run, rows: np.ndarray, guidances: dict[str, list[float]], file: SweepFile | None
) -> list[list[Ranked]]:
    """Of each LLM run {run: guidances} what it ranks with each of them."""
    config = run.config
    split = run.data.splits[config.evaluation.split].take(rows)
    history_RxH, target_R = split.histories_and_targets(config.data.history_length)
    fields = config.decoding
    search = BatchedSearch(
        run.trie,
        build(SearchConfig, fields),
        mesh=run.mesh,
        batch_size=config.inference.batch_size,
        buckets=config.inference.buckets,
    )
    allowed = ItemFilter.from_config(fields, run.data.catalogue).masks(history_RxH)

    label = "LLM " + ", ".join(name or "untrained" for name in guidances)
    leaf_R = run.trie.leaf_of_item[target_R]
    swept = search.sweep(
        [
            Contender(
                run.inference_decoder(name),
                [score_weights(config, guidance) for guidance in of_run],
            )
            for name, of_run in guidances.items()
        ],
        prompts(run.titles, history_RxH, config.prompt.max_tokens),
        _cf_logits(run, rows) if any(map(any, guidances.values())) else None,
        shared_layers=run.shared_layers,
        allowed=allowed,
        target_leaf_R=leaf_R,
        temperatures=config.evaluation.temperatures,
        progress=label if is_main_process() else None,
        file=file,
    )

    def ranked(one: Recommendations, nll_RxT: np.ndarray, guidance: float) -> Ranked:
        allowed_RxI = None if allowed is None else allowed(np.arange(rows.size))
        items_RxK = one.items(run.trie, fields.beams, allowed_RxI)
        return Ranked(
            items_RxK,
            rank_in_list(items_RxK, target_R),
            rank_in_list(one.leaves_RxM, leaf_R),
            np.full_like(nll_RxT, np.nan) if guidance else nll_RxT,
        )

    return [
        [
            ranked(one, sweep.nll_RxT, guidance)
            for one, guidance in zip(sweep.recommendations, of_run, strict=True)
        ]
        for sweep, of_run in zip(swept, guidances.values(), strict=True)
    ]
