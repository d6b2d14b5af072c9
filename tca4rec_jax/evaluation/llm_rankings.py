"""What LLM runs do on the evaluated rows, kept on disk; their rankings.

Axis letters: R rows, B rows of a batch, I items, M beams and places of a list, T temperatures.
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from absl import logging

from tca4rec_jax.config import ranked_by, score_weights
from tca4rec_jax.data.templates import reads_users
from tca4rec_jax.decoding.beam_search import ScoreWeights
from tca4rec_jax.decoding.engine import BatchedSearch, SearchJob, SearchRows
from tca4rec_jax.decoding.list_inputs import list_inputs
from tca4rec_jax.decoding.results import Recommendations, ResultsFile, read_cache
from tca4rec_jax.distributed import multihost
from tca4rec_jax.evaluation.comparison import CF_LOGITS, COMMAND, UNTRAINED, cf_logits_hash
from tca4rec_jax.evaluation.rankings import EvaluationRows, ModelRanking
from tca4rec_jax.evaluation.text_match import text_rank
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import fingerprint, write_npz
from tca4rec_jax.metrics import rank_in_list
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.recommenders.vectors import soft_rows

Found = TypeVar("Found", bound=NamedTuple)
_CF_OF_ROWS = "CF logits of the rows"
_ROWS_AT_ONCE = 1024  # of a CF logits store whose content is hashed


def rank_llms(
    experiment: Experiment,
    rows: EvaluationRows,
    variants: Mapping[str, Mapping[str, float]],
    spent: dict[str, float] | None = None,
) -> dict[str, ModelRanking]:
    """The rankings of LLM runs by label, as `kept_results`."""
    search = partial(_search, experiment, rows)
    return kept_results(experiment, rows, variants, ModelRanking, search, spent=spent)


def kept_results(
    experiment: Experiment,
    rows: EvaluationRows,
    variants: Mapping[str, Mapping[str, float]],
    kind: type[Found],
    search: Callable[[dict[str, list[ScoreWeights]], ResultsFile | None], list[list[Found]]],
    inputs: Mapping[str, Any] | None = None,
    spent: dict[str, float] | None = None,
) -> dict[str, Found]:
    """What LLM runs do on the rows, by label; that of an earlier evaluation is read.

    Args:
      variants: {LLM run, or '' for the pretrained LLM: {label: guidance}}. Runs with a frozen
        prefix are searched together, others one after the other.
      kind: a tuple of arrays, what is found for a label.
      search: ({run: score weights}, the file that resumes it) -> what each run does by its weights.
      inputs: what the results depend on besides `ranking_inputs`.
      spent: filled with the seconds of each LLM run that earlier processes have put into what is
        read: a whole search, or one that was interrupted.
    """
    spent = {} if spent is None else spent
    results: dict[str, Found] = {}
    caches: dict[str, _Cache] = {}
    weights: dict[str, list[ScoreWeights]] = {}
    content = cache(partial(cf_content, experiment, rows))
    for name, labels in variants.items():
        weights[name] = [score_weights(experiment.config, one) for one in labels.values()]
        depends_on = ranking_inputs(experiment, rows, name, weights[name], content)
        kept = _Cache.of(experiment, name, {**depends_on, **(inputs or {})})
        found, seconds = kept.read(kind)
        if multihost.all_processes(bool(found)):
            logging.info("Lists of an earlier evaluation in %s", kept.path)
            results |= zip(labels, found, strict=True)
            spent[name] = seconds
        else:
            caches[name] = kept
    groups = [list(caches)] if experiment.frozen_prefix and caches else [[name] for name in caches]
    for names in groups:
        identity = fingerprint([caches[name].identity for name in names])
        part = f"unfinished_{identity[:8]}.npz"  # other processes may rank other runs here
        unfinished = ResultsFile(experiment.workdir / "evaluation" / part, identity)
        file = None if multihost.is_multiprocess() else unfinished
        made_of_runs = search({name: weights[name] for name in names}, file)
        for name, made in zip(names, made_of_runs, strict=True):
            results |= zip(variants[name], made, strict=True)
            spent[name] = unfinished.earlier / len(names)
            if multihost.is_main_process():
                reads_cf = _CF_OF_ROWS in caches[name].made_from.inputs
                whole = cf_logits_hash(experiment, rows.split) if reads_cf else ""
                caches[name].write(made, unfinished.seconds / len(names), whole)
        if file is not None:
            file.remove()
    return results


@dataclass(frozen=True)
class _Cache:
    """An .npz file with what one LLM run did, stacked, and what that was made from."""

    path: Path
    made_from: Provenance

    @property
    def identity(self) -> str:
        """One name for all that the results depend on."""
        return self.made_from.fingerprint

    @classmethod
    def of(cls, experiment: Experiment, name: str, inputs: Mapping[str, Any]) -> "_Cache":
        """The cache of an LLM run's results of these inputs."""
        made_from = Provenance("evaluation list", COMMAND, inputs)
        file = f"{name or UNTRAINED}_{made_from.fingerprint[:8]}.npz"
        return cls(experiment.workdir / "evaluation" / file, made_from)

    def read(self, kind: type[Found]) -> tuple[list[Found], float]:
        """(the results in the order of their score weights, the seconds that they took).

        None if made from other things.
        """
        saved = read_cache(self.path, self.identity, kind._fields, also=["seconds"])
        seconds = float(saved.pop("seconds", 0.0))
        return [kind._make(one) for one in zip(*saved.values(), strict=True)], seconds

    def write(self, results: Sequence[Found], seconds: float, cf_logits: str = "") -> None:
        """Replaces the file; `seconds` is how long the results took.

        The content hash of the CF logits that were read, of other rows too, is kept for status.py;
        whether the results may be read again is decided by the rows' own.
        """
        fields = results[0]._make(map(np.stack, zip(*results, strict=True)))._asdict()
        whole = {CF_LOGITS: cf_logits} if cf_logits else {}
        inputs = {**self.made_from.inputs, **whole}
        about = {"identity": self.identity, "seconds": seconds}
        about["provenance"] = replace(self.made_from, inputs=inputs).to_json()
        write_npz(self.path, **about, **fields)


def ranking_inputs(
    experiment: Experiment,
    rows: EvaluationRows,
    name: str,
    weights: list[ScoreWeights],
    content: Callable[[], str] | None = None,
) -> dict[str, Any]:
    """What the rankings of an LLM run, or of '' the pretrained LLM, depend on: provenance.

    `content` gives `cf_content`, for a caller that asks for several runs.
    """
    inputs = list_inputs(experiment, name, weights) | rows.inputs() | ranked_by(experiment.config)
    if any(one.guidance for one in weights) or reads_users(experiment.config.prompt):
        inputs[_CF_OF_ROWS] = (content or partial(cf_content, experiment, rows))()
    return inputs


def cf_content(experiment: Experiment, rows: EvaluationRows) -> str:
    """SHA-256 (hex) of the values that a CF logits store holds for the rows and over items."""
    store = experiment.cf_store(rows.split, rows.position_R)
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    blocks = (store.read(rows.position_R[start : start + _ROWS_AT_ONCE]) for start in starts)
    digest = hashlib.sha256()
    for array in itertools.chain((store.item_table, store.item_bias), blocks):
        digest.update(b"none" if array is None else np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _search(
    experiment: Experiment,
    rows: EvaluationRows,
    weights: Mapping[str, list[ScoreWeights]],
    file: ResultsFile | None,
) -> list[list[ModelRanking]]:
    """The rankings of each LLM run {run: score weights}; `file` resumes an interrupted search."""
    guided = any(one.guidance for of_run in weights.values() for one in of_run)
    jobs, progress = jobs_of(experiment, weights)
    return Ranker.of(experiment, rows, guided=guided)(jobs, progress=progress, file=file)


def jobs_of(
    experiment: Experiment, weights: Mapping[str, list[ScoreWeights]]
) -> tuple[list[SearchJob], str]:
    """Of LLM runs {run: score weights}, with the name of their progress."""
    label = "LLM " + ", ".join(name or UNTRAINED for name in weights)
    jobs: list[SearchJob] = [
        (experiment.inference_decoder(name), of_run) for name, of_run in weights.items()
    ]
    return jobs, label


@dataclass(frozen=True)
class Ranker:
    """Ranks the same rows by any models: their prompts, filters and search are prepared once."""

    experiment: Experiment
    rows: EvaluationRows
    beams: int
    searched: SearchRows
    search: BatchedSearch

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        rows: EvaluationRows,
        *,
        guided: bool = False,
        beams: int | None = None,
    ) -> "Ranker":
        """With so many `beams`, by default decoding.beams; `guided`: weights may guide it."""
        beams = beams or experiment.config.decoding.beams
        searched = _search_rows(experiment, rows, guided=guided)
        return cls(experiment, rows, beams, searched, experiment.search(beams))

    def __call__(self, jobs: Sequence[SearchJob], **how: Any) -> list[list[ModelRanking]]:
        """What each model does on the rows, by each of its score weights.

        `how` are progress, file and after_batch of `BatchedSearch.sweep`.
        """
        results = self.search.sweep(
            jobs,
            self.searched,
            frozen_prefix=self.experiment.frozen_prefix,
            temperatures=self.experiment.config.evaluation.temperatures,
            **how,
        )
        return [
            [self._ranking(*one) for one in zip(*of_model, strict=True)]
            for of_model in zip(results, (weights for _, weights in jobs), strict=True)
        ]

    def _ranking(self, found: Recommendations, weights: ScoreWeights) -> ModelRanking:
        items_RxM = found.items(self.experiment.trie, self.beams, self.searched.allowed)
        return ModelRanking(
            items_RxM,
            rank_in_list(items_RxM, self.rows.target_R),
            self._title_rank(found.leaves_RxM),
            np.full_like(found.nll_RxT, np.nan) if weights.guidance > 0 else found.nll_RxT,
        )

    def _title_rank(self, leaves_RxM: np.ndarray) -> np.ndarray:
        target_R = self.rows.target_R
        if self.experiment.config.evaluation.text_match:
            return text_rank(self.experiment, leaves_RxM, target_R)
        return rank_in_list(leaves_RxM, self.experiment.trie.leaf_of_item[target_R])


def _search_rows(experiment: Experiment, rows: EvaluationRows, *, guided: bool) -> SearchRows:
    """The prompts, filters and targets of the rows, and their CF vectors if they are read."""
    config = experiment.config
    users: dict[str, Any] = {}
    prompts = experiment.prompts(rows.history_RxH, rows.candidates_RxN)
    if guided or reads_users(config.prompt):
        store = experiment.cf_store(rows.split, rows.position_R)
        users = {
            "cf": lambda rows_B: store.read(rows.position_R[rows_B]),
            "cf_items": store.cf_items,
        }
    users["soft"] = soft_rows(experiment, prompts, **users)
    allowed = rows.allowed(experiment.item_filter)
    return SearchRows(prompts.tokens, allowed=allowed, target_R=rows.target_R, **users)
