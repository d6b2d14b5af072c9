"""The rankings of LLM runs on the evaluated rows, kept on disk.

Axis letters: R rows, B rows of a batch, I items, M beams and places of a list, T temperatures.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging

from tca4rec_jax.cf.logits_store import LogitsStore
from tca4rec_jax.config import build, score_weights
from tca4rec_jax.core.collaborative_tokenizer import DENSE, CFItems
from tca4rec_jax.data.prompts import prompts
from tca4rec_jax.decoding.beam_search import SearchConfig
from tca4rec_jax.decoding.engine import BatchedSearch, SearchJob, SearchRows
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.decoding.results import Recommendations, ResultsFile
from tca4rec_jax.distributed.multihost import (
    all_processes,
    broadcast_from_main,
    is_main_process,
    is_multiprocess,
)
from tca4rec_jax.evaluation.rankings import EvaluationRows, ModelRanking
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import file_sha256, fingerprint, write_npz
from tca4rec_jax.metrics import rank_in_list

_ROWS_AT_ONCE = 1024  # of a CF logits store, whose content is hashed


def rank_llms(
    experiment: Experiment, rows: EvaluationRows, variants: Mapping[str, Mapping[str, float]]
) -> dict[str, ModelRanking]:
    """The rankings of LLM runs by label; those of an earlier evaluation are read, others are made.

    Runs that share their lower layers rank the rows together, others one after the other.

    Args:
      experiment: the config and the work directory.
      rows: the rows to rank.
      variants: {LLM run, or '' for the pretrained LLM: {label: guidance}}.
    """
    rankings: dict[str, ModelRanking] = {}
    caches: dict[str, _RankingCache] = {}
    for name, guidance_of in variants.items():
        cache = _RankingCache.of(experiment, rows, name, list(guidance_of.values()))
        if all_processes(cache.is_valid()):
            logging.info("Lists of an earlier evaluation in %s", cache.path)
            rankings |= zip(guidance_of, cache.read(), strict=True)
        else:
            caches[name] = cache
    groups = [list(caches)] if experiment.frozen_prefix and caches else [[name] for name in caches]
    for names in groups:
        file = None
        if not is_multiprocess():
            identity = fingerprint([caches[name].identity for name in names])
            file = ResultsFile(experiment.workdir / "evaluation" / "unfinished.npz", identity)
        guidances = {name: list(variants[name].values()) for name in names}
        for name, made in zip(names, _search(experiment, rows, guidances, file), strict=True):
            rankings |= zip(variants[name], made, strict=True)
            if is_main_process():
                caches[name].write(made)
        if file is not None:
            file.remove()
    return rankings


@dataclass(frozen=True)
class _RankingCache:
    """An .npz file with the rankings of one LLM run, stacked, and what they were made from."""

    path: Path
    identity: str

    @classmethod
    def of(
        cls, experiment: Experiment, rows: EvaluationRows, name: str, guidances: list[float]
    ) -> "_RankingCache":
        """The cache of the run's rankings with these guidances; the main process decides."""

        def digest() -> bytes:
            return bytes.fromhex(fingerprint(_ingredients(experiment, rows, name, guidances)))

        identity = broadcast_from_main(digest, size=32).hex()
        folder = experiment.workdir / "evaluation"
        return cls(folder / f"{name or 'untrained'}_{identity[:8]}.npz", identity)

    def is_valid(self) -> bool:
        """Whether the file is there and was made from the same things."""
        if not self.path.exists():
            return False
        with np.load(self.path) as saved:
            return str(saved["identity"]) == self.identity

    def read(self) -> list[ModelRanking]:
        """The rankings in the order of their guidances."""
        with np.load(self.path) as saved:
            fields = [saved[field] for field in ModelRanking._fields]
        return [ModelRanking(*one) for one in zip(*fields, strict=True)]

    def write(self, rankings: Sequence[ModelRanking]) -> None:
        """Replaces the file."""
        fields = ModelRanking(*map(np.stack, zip(*rankings, strict=True)))._asdict()
        write_npz(self.path, identity=self.identity, **fields)


def _ingredients(
    experiment: Experiment, rows: EvaluationRows, name: str, guidances: list[float]
) -> dict[str, object]:
    """Everything that the rankings of an LLM run depend on, JSON-serialisable."""
    config, catalogue = experiment.config, experiment.data.catalogue
    log = experiment.workdir / "llm" / name / "log.jsonl"
    store = (
        experiment.cf_store(config.evaluation.split, rows.position_R) if any(guidances) else None
    )
    return {
        "llm": config.llm.to_dict(),
        "weights": experiment.weights_identity,
        "lora": config.lora.to_dict() if name else None,
        "prompt": config.prompt.to_dict(),
        "decoding": config.decoding.to_dict(),
        "allowed": _sha256(ItemFilter.from_config(config.decoding, catalogue).allowed_I),
        "score weights": [score_weights(config, guidance) for guidance in guidances],
        "temperatures": config.evaluation.temperatures,
        "training log": file_sha256(log) if name else "",
        "checkpoint": config.inference.checkpoint,
        "cf": store and _sha256(*_content(store, rows.position_R)),
        "rows": rows.sequences.content_hash(),
        "history_length": config.data.history_length,
        "catalogue": catalogue.content_hash(),
    }


def _content(store: LogitsStore, position_R: np.ndarray) -> Iterator[np.ndarray]:
    """What a CF logits store holds for the rows, in blocks of rows, and over items."""
    for start in range(0, len(position_R), _ROWS_AT_ONCE):
        yield store.read(position_R[start : start + _ROWS_AT_ONCE])
    yield from (array for array in (store.item_table, store.item_bias) if array is not None)


def _sha256(*values: np.ndarray) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def _search(
    experiment: Experiment,
    rows: EvaluationRows,
    guidances: Mapping[str, list[float]],
    file: ResultsFile | None,
) -> list[list[ModelRanking]]:
    """The rankings of each LLM run {run: guidances}, one for each guidance.

    Args:
      file: where an interrupted search goes on.
    """
    config = experiment.config
    search = BatchedSearch(
        experiment.trie,
        build(SearchConfig, config.decoding),
        mesh=experiment.mesh,
        batch_size=config.inference.batch_size,
        buckets=config.inference.buckets,
    )
    jobs = [
        SearchJob(
            experiment.inference_decoder(name),
            [score_weights(config, guidance) for guidance in of_run],
        )
        for name, of_run in guidances.items()
    ]
    searched = _search_rows(experiment, rows, guided=any(map(any, guidances.values())))
    label = "LLM " + ", ".join(name or "untrained" for name in guidances)
    results = search.sweep(
        jobs,
        searched,
        shared_layers=experiment.frozen_prefix,
        temperatures=config.evaluation.temperatures,
        progress=label if is_main_process() else None,
        file=file,
    )
    leaf_R = experiment.trie.leaf_of_item[rows.target_R]
    allowed_RxI = searched.allowed and searched.allowed(np.arange(len(rows)))

    def ranking(found: Recommendations, nll_RxT: np.ndarray, guidance: float) -> ModelRanking:
        items_RxM = found.items(experiment.trie, config.decoding.beams, allowed_RxI)
        return ModelRanking(
            items_RxM,
            rank_in_list(items_RxM, rows.target_R),
            rank_in_list(found.leaves_RxM, leaf_R),
            np.full_like(nll_RxT, np.nan) if guidance else nll_RxT,
        )

    return [
        [
            ranking(result.recommendations(number), result.nll_RxT, guidance)
            for number, guidance in enumerate(guidances[name])
        ]
        for name, result in zip(guidances, results, strict=True)
    ]


def _search_rows(experiment: Experiment, rows: EvaluationRows, *, guided: bool) -> SearchRows:
    """The prompts, filters and targets of the rows, and with guidance their CF vectors."""
    config = experiment.config
    cf, cf_items = None, DENSE
    if guided:
        store = experiment.cf_store(config.evaluation.split, rows.position_R)
        cf_items = CFItems(store.item_table, store.item_bias)

        def cf(rows_B: np.ndarray) -> np.ndarray:
            return store.read(rows.position_R[rows_B])

    allowed = ItemFilter.from_config(config.decoding, experiment.data.catalogue)
    return SearchRows(
        prompts(experiment.titles, rows.history_RxH, config.prompt.max_tokens),
        cf=cf,
        cf_items=cf_items,
        allowed=allowed.masks(rows.histories),
        target_R=rows.target_R,
    )
