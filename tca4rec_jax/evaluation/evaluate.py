"""The evaluation of a run: CF models and LLM variants on the same rows, each over all items.

Written below the work directory:
  evaluation/<run>_*.npz     recommended items and ranks of each row, kept so that any other
                             statistic can be computed
  evaluation/unfinished.npz  where an interrupted evaluation goes on
  results.json, results.md, results.png, training.png, examples.md

Axis letters: R rows.
"""

import json
from pathlib import Path

import numpy as np
import rich
from absl import logging
from ml_collections import ConfigDict

from tca4rec_jax.distributed.multihost import is_main_process
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.llm_rankings import (
    CF,
    POPULAR,
    Ranked,
    cached_llms,
    cf_models,
    sample_rows,
)
from tca4rec_jax.evaluation.report import examples_text, plot_metrics, plot_training_curves
from tca4rec_jax.fileio import write_text
from tca4rec_jax.metrics import (
    bootstrap_intervals,
    metric_values,
    paired_differences,
    ranking_metrics,
)
from tca4rec_jax.reporting import console_table, markdown_table, write_results
from tca4rec_jax.training.log import read_log
from tca4rec_jax.training.run import Run

SHOWN = ("hr@1", "hr@3", "hr@5", "hr@10", "ndcg@3", "ndcg@5", "ndcg@10")


def evaluate_run(config: ConfigDict, workdir: Path) -> dict:
    """Evaluates everything in config.evaluation and writes the reports; returns results.json.

    Several processes share the rows; every one of them gets the results, the first writes them.

    Raises:
      FileNotFoundError: a part of the work directory or an LLM run is missing.
      UserError: a difference of labels that are not in the table, or inputs that do not fit.
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
    if is_main_process():
        _report(run, rows, ranked, results)
    return results


def _labels(evaluation: ConfigDict) -> list[str]:
    return [label for label, _, _ in evaluation.variants]


def _check_labels(config: ConfigDict) -> None:
    labels = {POPULAR, CF, *_labels(config.evaluation)}
    unknown = {label for pair in config.evaluation.differences for label in pair} - labels
    if unknown:
        raise UserError(
            f"evaluation.differences names {sorted(unknown)}; the table has {sorted(labels)}"
        )


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
