"""The report on the CF models of a run: cf/report.md and cf/report.png from cf/metrics.json."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from tca4rec_jax.evaluation.report import markdown_table, save_figure, write_text

SHOWN = ("hr@1", "hr@3", "hr@5", "hr@10", "hr@20", "ndcg@3", "ndcg@5", "ndcg@10", "ndcg@20")


def write_cf_report(directory: Path, metrics: Mapping) -> None:
    """Writes report.md and report.png of what `cf.run.run_cf` returns."""
    ranking = {
        f"{model}, {subset}": {"rows": values["rows"]}
        | {name.upper(): values[name] for name in SHOWN}
        for model, subsets in metrics["results"].items()
        for subset, values in subsets.items()
    }
    profiles = metrics["profiles"]
    character = {
        model: {
            "coverage@10": values["coverage@10"],
            "popularity@10": values["popularity@10"],
            "best beta": f"{values['best_beta']:g}",
            **{f"entropy, beta {beta}": nats for beta, nats in values["entropy"].items()},
        }
        for model, values in profiles.items()
    }
    text = [
        "# CF models, ranking the whole catalogue\n",
        markdown_table(ranking, first_column="model, rows"),
        "What the Collaborative Tokenizer will see, on the test rows. Coverage: share of the items "
        "that are among anyone's first ten. Popularity: training interactions of the first tens, "
        "relative to those of the items that were chosen. Best beta: the CF temperature at which "
        "the model is best calibrated (lowest NLL). Entropy in nats.\n",
        markdown_table(character, first_column="model"),
        "![metrics and sharpness](report.png)\n",
    ]
    write_text(directory / "report.md", "\n".join(text))
    _draw(directory / "report.png", metrics)


def _draw(path: Path, metrics: Mapping) -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    quality, entropy, likelihood = figure.subplots(1, 3)
    cutoffs = (1, 3, 5, 10, 20)
    for model, subsets in metrics["results"].items():
        values = [subsets["test"][f"ndcg@{k}"] for k in cutoffs]
        quality.plot(cutoffs, values, "o-", label=model)
    quality.set(xlabel="K", ylabel="NDCG@K (test)")
    for panel, name in ((entropy, "entropy"), (likelihood, "nll")):
        for values in metrics["profiles"].values():
            panel.plot([float(beta) for beta in values[name]], list(values[name].values()), "o-")
        panel.set(xlabel="CF temperature beta", ylabel=f"{name}, nats", xscale="log")
    lowest = min(min(values["nll"].values()) for values in metrics["profiles"].values())
    likelihood.set_ylim(0.8 * lowest, 2.5 * lowest)  # far too sharp a softmax would hide the rest
    for panel in (quality, entropy, likelihood):
        panel.grid(alpha=0.3)
    quality.legend()
    save_figure(path, figure)
