"""How the weight of the CF model at inference moves the ranking: a table and a picture.

score = log P_LLM + lambda * log p_cf: at lambda = 0 the LLM ranks, for large lambda the CF model.
Prompts run once for all lambdas. Written below the work directory: sweep_<run>.json, .md, .png.
"""

from collections.abc import Sequence
from pathlib import Path

import rich
from ml_collections import ConfigDict

from tca4rec_jax.distributed.multihost import is_main_process
from tca4rec_jax.evaluation.llm_rankings import CF, cached_llms, cf_models, sample_rows
from tca4rec_jax.evaluation.report import plot_sweep
from tca4rec_jax.fileio import write_text
from tca4rec_jax.metrics import paired_differences, ranking_metrics
from tca4rec_jax.reporting import console_table, markdown_table, write_results
from tca4rec_jax.training.run import Run

METRICS = ("hr@10", "ndcg@10")


def sweep_guidance(
    config: ConfigDict, workdir: Path, name: str, guidances: Sequence[float]
) -> dict:
    """Ranks the evaluated rows with one LLM run at several guidances; writes the reports.

    Args:
      name: the LLM run below workdir/llm, '' for the LLM as it came.
      guidances: each at least 0; 0 is always among them.

    Returns:
      {'rows', 'models': {label: metrics}, 'differences': {label: ..}}, also in sweep_<run>.json.

    Raises:
      FileNotFoundError, ValueError: a missing part of the work directory, or a negative guidance.
    """
    guidances = sorted({0.0, *map(float, guidances)})
    run = Run(config, workdir)
    rows = sample_rows(
        run.data.splits[config.evaluation.split], config.evaluation.rows, config.seed
    )
    labels = {f"lambda = {guidance:g}": guidance for guidance in guidances}
    ranked = cached_llms(run, rows, {name: labels}) | {CF: cf_models(run, rows)[CF]}
    models = {label: ranking_metrics(one.rank_R, seed=config.seed) for label, one in ranked.items()}
    alone = "lambda = 0"
    differences = {
        label: {
            f"NDCG@10 - {other}": paired_differences(
                ranked[label].rank_R, ranked[other].rank_R, (10,), seed=config.seed
            )["ndcg@10"]
            for other in (alone, CF)
        }
        for label in labels
    }
    table = {
        label: {metric.upper(): one[metric] for metric in METRICS} | differences.get(label, {})
        for label, one in models.items()
    }
    results = {"rows": len(rows), "models": models, "differences": differences}
    if not is_main_process():
        return results
    shown = name or "untrained"
    title = f"{shown}: {len(rows)} {config.evaluation.split} rows, 95% bootstrap intervals"
    rich.console.Console(width=160).print(console_table(table, title=title, first_column="score"))
    write_results(workdir / f"sweep_{shown}.json", results)
    text = f"{title}\n\n{markdown_table(table, first_column='score')}"
    write_text(workdir / f"sweep_{shown}.md", text)
    curve = {guidance: models[label] for label, guidance in labels.items()}
    plot_sweep(workdir / f"sweep_{shown}.png", curve, METRICS, level=(CF, models[CF]))
    return results
