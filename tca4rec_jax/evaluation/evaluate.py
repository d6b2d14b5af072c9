"""The evaluation of a run: CF models and LLM variants on the same rows, each over all items.

Written below the work directory:
  evaluation/<run>_*.npz    recommended items and ranks of each row, kept so that an interrupted
                            evaluation goes on and any other statistic can be computed
  results.json, results.md, results.png, training.png, examples.md

Axis letters: R rows, I items, K places of a list, Q distinct titles, T temperatures.
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich
from absl import logging
from jax.nn import logsumexp
from ml_collections import ConfigDict

from tca4rec_jax.cf.popularity import popularity_logits
from tca4rec_jax.data.prompts import prompts
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.decoding.batched_search import BatchedSearch, Contender
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.decoding.recommendations import Recommendations
from tca4rec_jax.evaluation.ranking import (
    bootstrap_intervals,
    metric_values,
    paired_differences,
    rank_in_list,
    ranking_metrics,
)
from tca4rec_jax.evaluation.report import (
    console_table,
    examples_text,
    markdown_table,
    plot_metrics,
    plot_training_curves,
    write_results,
    write_text,
)
from tca4rec_jax.processes import everywhere, from_first, is_first, join_parts, own_part
from tca4rec_jax.ranking import CUTOFFS, rank_of_target
from tca4rec_jax.training.log import read_log
from tca4rec_jax.training.run import Run

POPULAR, CF = "Most popular", "CF model"
SHOWN = ("hr@1", "hr@3", "hr@5", "hr@10", "ndcg@3", "ndcg@5", "ndcg@10")


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


def evaluate_run(config: ConfigDict, workdir: Path) -> dict:
    """Evaluates everything in config.evaluation and writes the reports; returns results.json.

    Several processes share the rows; every one of them gets the results, the first writes them.

    Raises:
      FileNotFoundError: a part of the work directory or an LLM run is missing.
      ValueError: a difference of labels that are not in the table, or inputs that do not fit.
    """
    run = Run(config, workdir)
    fields = config.evaluation
    _check_labels(config)
    rows = sample_rows(run.data.splits[fields.split], fields.rows, config.seed)
    logging.info("Evaluating %d of the %s rows", len(rows), fields.split)
    variants: dict[str, dict[str, float]] = {}
    for label, name, guidance in fields.variants:
        variants.setdefault(name, {})[label] = guidance
    ranked = cf_models(run, rows) | cached_llms(run, rows, variants)
    ranked = {label: ranked[label] for label in (POPULAR, CF, *_labels(fields))}
    results = _results(run, rows, ranked)
    if is_first():
        _report(run, rows, ranked, results)
    return results


def sample_rows(sequences: ItemSequences, count: int, seed: int) -> np.ndarray:
    """int64: `count` rows without replacement in ascending order; all of them for 0."""
    if not count or count >= len(sequences):
        return np.arange(len(sequences))
    return np.sort(np.random.default_rng(seed).choice(len(sequences), count, replace=False))


def _labels(evaluation: ConfigDict) -> list[str]:
    return [label for label, _, _ in evaluation.variants]


def _check_labels(config: ConfigDict) -> None:
    labels = {POPULAR, CF, *_labels(config.evaluation)}
    unknown = {label for pair in config.evaluation.differences for label in pair} - labels
    if unknown:
        raise ValueError(
            f"evaluation.differences names {sorted(unknown)}; the table has {sorted(labels)}"
        )


def cf_models(run: Run, rows: np.ndarray) -> dict[str, Ranked]:
    """Most popular and the CF model of the logits store, by full ranking."""
    popular_I = popularity_logits(run.data.splits["train_sequences"], run.data.catalogue.num_items)
    own = rows[own_part(rows.size)]
    scores = {
        POPULAR: np.broadcast_to(popular_I, (own.size, popular_I.size)),
        CF: _cf_logits(run, own)(np.arange(own.size)),
    }
    ranked = {label: _full_ranking(run, own, scores_RxI) for label, scores_RxI in scores.items()}
    return {label: join_parts(one, rows.size) for label, one in ranked.items()}


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
        identity = from_first(partial(_identity, run, rows, name, guidances), size=32).hex()
        path = run.workdir / "evaluation" / f"{name or 'untrained'}_{identity[:8]}.npz"
        if everywhere(_saved_identity(path) == identity):
            logging.info("Lists of an earlier evaluation in %s", path)
            with np.load(path) as saved:
                found = [saved[field] for field in Ranked._fields]
            ranked |= dict(zip(of_run, map(Ranked, *found), strict=True))
        else:
            missing[name] = path, identity
    together = [list(missing)] if run.shared_layers and missing else [[name] for name in missing]
    for names in together:
        found = _llms(run, rows, {name: list(variants[name].values()) for name in names})
        for name, of_run in zip(names, found, strict=True):
            ranked |= dict(zip(variants[name], of_run, strict=True))
            if is_first():
                _save(*missing[name], of_run)
    return ranked


def _save(path: Path, identity: str, found: list[Ranked]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    fields = Ranked(*map(np.stack, zip(*found, strict=True)))._asdict()
    with beside.open("wb") as file:
        np.savez(file, identity=identity, **fields)
    os.replace(beside, path)


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
        "checkpoint": config.evaluation.checkpoint,
        "rows": _sha256(rows),
        "data": run.data.splits[config.evaluation.split].content_hash(),
        "catalogue": run.data.catalogue.content_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).digest()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _llms(run: Run, rows: np.ndarray, guidances: dict[str, list[float]]) -> list[list[Ranked]]:
    """Of each LLM run {run: guidances} what it ranks with each of them."""
    config = run.config
    split = run.data.splits[config.evaluation.split].take(rows)
    history_RxH, target_R = split.histories_and_targets(config.data.history_length)
    fields = config.decoding
    search = BatchedSearch(
        run.trie,
        SearchConfig(fields.beams, fields.score, fields.rules),
        mesh=run.mesh,
        batch_size=config.evaluation.batch_size,
        buckets=config.evaluation.buckets,
    )
    allowed = ItemFilter.from_config(fields, run.data.catalogue).masks(history_RxH)

    def weights(guidance: float) -> ScoreWeights:
        beta = config.objective.beta
        return ScoreWeights(guidance, beta, fields.temperature, fields.length_penalty)

    label = "LLM " + ", ".join(name or "untrained" for name in guidances)
    leaf_R = run.trie.leaf_of_item[target_R]
    swept = search.sweep(
        [
            Contender(run.inference_decoder(name), list(map(weights, of_run)))
            for name, of_run in guidances.items()
        ],
        prompts(run.titles, history_RxH, config.prompt.max_tokens),
        _cf_logits(run, rows) if any(map(any, guidances.values())) else None,
        shared_layers=run.shared_layers,
        allowed=allowed,
        target_leaf_R=leaf_R,
        temperatures=config.evaluation.temperatures,
        progress=label if is_first() else None,
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


def _results(run: Run, rows: np.ndarray, ranked: dict[str, Ranked]) -> dict:
    """Everything that results.json holds; ranking metrics are intervals."""
    config = run.config
    split = run.data.splits[config.evaluation.split].take(rows)
    models = {}
    for label, one in ranked.items():
        models[label] = {
            "by item": ranking_metrics(one.rank_R, seed=config.seed),
            "by title": ranking_metrics(one.title_rank_R, seed=config.seed),
        }
        for part, chosen_R in (("tied", split.tied), ("untied", ~split.tied)):
            if chosen_R.any():
                values = metric_values(one.rank_R[chosen_R], (10,))
                models[label][f"by item, {part} rows"] = bootstrap_intervals(
                    values, seed=config.seed
                )
        models[label]["nll per title"] = _likelihoods(config, one)
    differences = {}
    for a, b in config.evaluation.differences:
        differences[f"{a} - {b}"] = paired_differences(
            ranked[a].rank_R, ranked[b].rank_R, (10,), seed=config.seed
        )
        likely = [ranked[label].best_nll(config.evaluation.temperatures) for label in (a, b)]
        if None not in likely:
            (_, ours_R), (_, theirs_R) = likely
            differences[f"{a} - {b}"] |= bootstrap_intervals(
                {"nll per title": ours_R - theirs_R}, seed=config.seed
            )
    return {
        "rows": len(rows),
        "tied_rows": int(split.tied.sum()),
        "split": config.evaluation.split,
        "items": run.data.catalogue.num_items,
        "models": models,
        "differences": differences,
        "config": json.loads(config.to_json_best_effort()),
    }


def _likelihoods(config: ConfigDict, one: Ranked) -> dict | None:
    """NLL per title at every temperature and at the best of them."""
    temperatures = config.evaluation.temperatures
    best = one.best_nll(temperatures)
    if best is None:
        return None
    values = {f"temperature {t:g}": one.nll_RxT[:, i] for i, t in enumerate(temperatures)}
    values["best"] = best[1]
    return bootstrap_intervals(values, seed=config.seed) | {"best temperature": best[0]}


def _report(run: Run, rows: np.ndarray, ranked: dict[str, Ranked], results: dict) -> None:
    """Prints the tables and writes every report file."""
    workdir, evaluation = run.workdir, run.config.evaluation
    models = results["models"]
    means = {
        label: {name.upper(): one["by item"][name].mean for name in SHOWN}
        | {"NDCG@10, 95% interval": one["by item"]["ndcg@10"]}
        | {"by title": one["by title"]["ndcg@10"].mean}
        | {
            part: one[f"by item, {part} rows"]["ndcg@10"].mean
            for part in ("tied", "untied")
            if f"by item, {part} rows" in one
        }
        | ({"NLL": one["nll per title"]["best"].mean} if one["nll per title"] else {})
        for label, one in models.items()
    }
    differences = {
        label: {
            "NDCG@10": one["ndcg@10"],
            "HR@10": one["hr@10"],
            "NLL (lower is better)": one.get("nll per title"),
        }
        for label, one in results["differences"].items()
    }
    title = f"{results['rows']} {results['split']} rows, each ranked over {results['items']} items"
    title += "; NLL of its title at the model's best temperature"
    console = rich.console.Console(width=160)
    console.print(console_table(means, title=title, first_column="model"))
    text = f"{title}\n\n{markdown_table(means, first_column='model')}"
    if differences:
        heading = "Paired differences (95% bootstrap interval)"
        console.print(console_table(differences, title=heading, first_column="difference"))
        text += f"\n{heading}\n\n{markdown_table(differences, first_column='difference')}"
    write_results(workdir / "results.json", results)
    write_text(workdir / "results.md", text)
    plot_metrics(
        workdir / "results.png",
        {label: one["by item"] for label, one in models.items()},
        ("hr@10", "ndcg@10"),
    )
    names = dict.fromkeys(name for _, name, _ in evaluation.variants if name)
    curves = {name: read_log(workdir / "llm" / name / "log.jsonl") for name in names}
    if any(curves.values()):
        plot_training_curves(
            workdir / "training.png", curves, keys=("loss", "nll_per_title", "grad_norm")
        )
    split = run.data.splits[evaluation.split].take(rows)
    history_RxH, target_R = split.histories_and_targets(run.config.data.history_length)
    chosen = np.random.default_rng(run.config.seed).permutation(rows.size)[: evaluation.examples]
    examples = examples_text(
        run.data.catalogue.titles,
        history_RxH,
        {label: one.items_RxK for label, one in ranked.items() if label != POPULAR},
        target_R,
        chosen.tolist(),
    )
    write_text(workdir / "examples.md", examples)
    console.print(examples, markup=False, highlight=False)
    files = "results.json, results.md, results.png, training.png, examples.md"
    console.print(f"Written to {workdir}: {files}", highlight=False)
