"""How the weight of the CF model at inference moves the ranking: a table and a picture.

score = log P_LLM + lambda * log p_cf: at lambda = 0 the LLM ranks, for large lambda the CF model.
Prompts run once for all lambdas. Written below the work directory: sweep_<run>.json, .md, .png.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from tca4rec_jax.distributed.multihost import is_main_process
from tca4rec_jax.evaluation.llm_rankings import rank_llms
from tca4rec_jax.evaluation.rankings import CF, EvaluationRows, rank_cf_models
from tca4rec_jax.evaluation.report import plot_sweep
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import write_text
from tca4rec_jax.metrics import Interval, paired_differences, ranking_metrics
from tca4rec_jax.reporting import show_table, write_results

METRICS = ("hr@10", "ndcg@10")
_LLM_ALONE = "lambda = 0"


def sweep_guidance(
    config: ConfigDict, workdir: Path, name: str, guidances: Sequence[float]
) -> dict:
    """Ranks the evaluated rows with one LLM run at several guidances; writes the reports.

    `name` is the run below workdir/llm, '' the pretrained LLM. Guidances are at least 0, and 0 is
    always among them. Returns {'rows', 'models': {label: metrics}, 'differences': {label: ..}}, as
    in sweep_<run>.json. Raises FileNotFoundError for a missing part of the work directory,
    UserError for a negative guidance.
    """
    experiment = Experiment(config, workdir)
    rows = EvaluationRows.of(experiment)
    labels = {f"lambda = {value:g}": value for value in sorted({0.0, *map(float, guidances)})}
    cf_ranking = rank_cf_models(experiment, rows)[CF]
    rankings = rank_llms(experiment, rows, {name: labels}) | {CF: cf_ranking}

    def gain(label: str, other: str) -> Interval:
        ranks = rankings[label].rank_R, rankings[other].rank_R
        return paired_differences(*ranks, seed=config.seed)["ndcg@10"]

    models = {
        label: ranking_metrics(one.rank_R, seed=config.seed) for label, one in rankings.items()
    }
    differences = {
        label: {f"NDCG@10 - {other}": gain(label, other) for other in (_LLM_ALONE, CF)}
        for label in labels
    }
    results = {"rows": len(rows), "models": models, "differences": differences}
    if is_main_process():
        shown = name or "untrained"
        title = f"{shown}: {len(rows)} {config.evaluation.split} rows, 95% bootstrap intervals"
        table = {
            label: {metric.upper(): one[metric] for metric in METRICS} | differences.get(label, {})
            for label, one in models.items()
        }
        text = show_table(table, title=title, first_column="score")
        write_text(workdir / f"sweep_{shown}.md", text)
        write_results(workdir / f"sweep_{shown}.json", results)
        curve = {guidance: models[label] for label, guidance in labels.items()}
        plot_sweep(workdir / f"sweep_{shown}.png", curve, METRICS, baseline=(CF, models[CF]))
    return results
