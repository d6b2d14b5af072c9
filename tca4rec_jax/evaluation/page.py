"""report.html of an evaluation: one file with all that it found, for people.

Everything in it is from what the evaluation has written or written down: results.json, rankings,
the runs' logs and configs, sweeps of the guidance on the same rows.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from absl import logging

from tca4rec_jax.evaluation import page_rows, page_runs
from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.evaluation.details import ABOUT, by_cutoff, by_slice
from tca4rec_jax.evaluation.page_rows import RankedRows
from tca4rec_jax.evaluation.pictures import (
    intervals_figure,
    lines_figure,
    metrics_figure,
    sweep_figure,
)
from tca4rec_jax.evaluation.rankings import CF, POPULAR
from tca4rec_jax.evaluation.summary import difference_cells, headline
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import read_json, write_text
from tca4rec_jax.intervals import Interval
from tca4rec_jax.pages.blocks import Block, Numbers, Picture, Pictures, Section, Text
from tca4rec_jax.pages.html import html_page
from tca4rec_jax.reporting import Rows

FILE = "report.html"
_WIDTH = 5.0  # inches of a picture: text in it can be read on a phone
_Means = Mapping[str, Mapping[str, Interval | None]]


def write_page(
    folder: Path, experiment: Experiment, results: Mapping, ranked: RankedRows, shown: list[int]
) -> None:
    """Writes report.html of rankings; `shown` are the rows that are examples."""
    hr, ndcg = headline(experiment.config)
    sections = [
        _accuracy(results, experiment, (ndcg, hr)),
        *_slices(results, ndcg),
        *_likelihood(results),
        *page_rows.ranks_side_by_side(ranked),
        *_lists(results),
        *_sweeps(folder, results, (ndcg, hr)),
        *page_rows.examples(ranked, shown),
        *page_rows.errors(ranked),
    ]
    title = f"{results['rows']} {results['split']} rows of {results['users']} users"
    write(folder, experiment, results, title, [Text(_in_short(results, ndcg))], sections)


def write(
    folder: Path,
    experiment: Experiment,
    results: Mapping,
    title: str,
    lead: Iterable[Block],
    sections: Iterable[Section],
) -> None:
    """Writes report.html of any evaluation: what was run, the sections, training and costs."""
    every = [
        page_runs.what_was_run(experiment, results),
        *sections,
        *page_runs.how_they_learned(experiment, results),
        page_runs.costs(experiment, results),
        page_runs.made_from(results),
    ]
    write_text(folder / FILE, html_page(title, lead, every))


def _in_short(results: Mapping, metric: str) -> str:
    """What was ranked, and the best of CF models and LLMs in words."""
    of = {label: one[f"by {results['hits']}"][metric] for label, one in results["models"].items()}
    llms = {label: value for label, value in of.items() if label not in (POPULAR, CF)}
    kinds = {"of the CF models": {label: of[label] for label in (POPULAR, CF)}, "of the LLMs": llms}
    parts = []
    for kind, values in kinds.items():
        if values:
            best = max(values, key=lambda label: values[label].mean)
            mean, low, high = values[best]
            parts.append(f"{mean:.4f} [{low:.4f}, {high:.4f}] {kind} ({best})")
    return (
        f"Each row was ranked over {results['ranked']}. Highest {metric.upper()}: "
        f"{'; '.join(parts)}. Intervals are of 95%, users drawn with all of their rows."
    )


def _accuracy(results: Mapping, experiment: Experiment, metrics: tuple[str, str]) -> Section:
    """The tables of results.md and their pictures."""
    config, hits = experiment.config, f"by {results['hits']}"
    models = {label: one[hits] for label, one in results["models"].items()}
    pictures = [
        Picture(
            f"{metric.upper()}: {_means({label: one[metric] for label, one in models.items()})}",
            metrics_figure(models, [metric], width=_WIDTH - 2.2),
        )
        for metric in metrics
    ]
    table = {label: _cells(one, metrics, hits) for label, one in results["models"].items()}
    blocks: list[Block] = [Pictures(pictures), Numbers(table, "model", "All models, same rows")]
    if results["differences"]:
        pairs = results["differences"]
        of_each = {
            metric: {pair: {metric: one[metric]} for pair, one in pairs.items() if metric in one}
            for metric in (metrics[0], NLL)
        }
        drawn = [
            Picture(
                f"Paired differences in {_shown(name)}: "
                f"{_means({pair: one[name] for pair, one in rows.items()})}",
                intervals_figure(rows, f"difference in {_shown(name)}", width=_WIDTH),
            )
            for name, rows in of_each.items()
            if rows
        ]
        words = "Paired differences; an interval that holds 0 does not establish one"
        blocks += [Pictures(drawn), Numbers(difference_cells(results, config), "difference", words)]
    by_k = {label: one[hits] for label, one in results["models"].items()}
    blocks.append(Numbers(by_cutoff(by_k), "model", ABOUT[hits], True))
    return Section("Accuracy", blocks)


def _cells(metrics: Mapping, of: Iterable[str], hits: str) -> dict[str, Interval]:
    """A model's row of the table: what is drawn, and the likelihood."""
    shown = {metric.upper(): metrics[hits][metric] for metric in of}
    return shown | ({"NLL (lower is better)": metrics[NLL]["best"]} if metrics[NLL] else {})


def _shown(metric: str) -> str:
    return "NLL" if metric == NLL else metric.upper()


def _slices(results: Mapping, metric: str) -> Iterator[Section]:
    """The metric by slice, if there are slices."""
    if not results["slices"]:
        return
    rows = by_slice(results, metric)
    alt = f"{metric.upper()} of every model in {len(rows)} slices of the rows; the table has them"
    picture = Picture(alt, intervals_figure(rows, metric.upper(), width=_WIDTH))
    counts = {"all": results["rows"], **results["slices"]}
    table: Rows = {name: {"rows": counts[name], **row} for name, row in rows.items()}
    yield Section("By slice", [Pictures([picture]), Numbers(table, "slice", metric.upper())])


def _likelihood(results: Mapping) -> Iterator[Section]:
    """NLL over temperature, and whether the CF models' probabilities come true."""
    models = results["models"]
    nll = {label: one[NLL] for label, one in models.items() if one[NLL]}
    calibrated = {label: one["calibration"] for label, one in models.items() if one["calibration"]}
    blocks = [*(_nll(nll) if nll else []), *(_calibration(calibrated) if calibrated else [])]
    if blocks:
        yield Section("Likelihood and calibration", blocks)


def _nll(models: Mapping[str, Mapping[str, Interval]]) -> list[Block]:
    """NLL of every model that has one, over temperature."""
    prefix, lines, table = "temperature ", {}, {}
    for label, of in models.items():
        at = {n.removeprefix(prefix): one.mean for n, one in of.items() if n.startswith(prefix)}
        lines[label] = [*map(float, at)], [*at.values()]
        table[label] = {f"T={t}": mean for t, mean in at.items()} | {"best": of["best"]}
    figure = lines_figure(lines, xlabel="temperature", ylabel="NLL of the title, nats")
    best = _means({label: of["best"] for label, of in models.items()})
    return [
        Text("NLL: -log P of the title that came next, in nats; lower is better."),
        Pictures([Picture(f"NLL over the temperature; at the best one: {best}", figure)]),
        Numbers(table, "model", "NLL of the title, by temperature"),
    ]


def _calibration(models: Mapping[str, Mapping[str, float]]) -> list[Block]:
    """What CF models say of their first K items, and how often they are right."""
    lines = {}
    for label, of in models.items():
        cutoffs = [name.partition("@")[2] for name in of if name.startswith("mass@")]
        lines[label] = [of[f"mass@{k}"] for k in cutoffs], [of[f"hr@{k}"] for k in cutoffs]
    words = {"xlabel": "probability of the first K", "ylabel": "share of hits"}
    figure = lines_figure(lines, equal="where they agree", **words)
    alt = "Share of hits among the first K items over the probability that CF models gave them"
    numbers = Numbers(by_cutoff(models), "model", ABOUT["calibration"])
    return [Pictures([Picture(alt, figure)]), numbers]


def _lists(results: Mapping) -> Iterator[Section]:
    """Coverage, popularity and what else the lists are like; nothing of candidates."""
    lists = {label: one["lists"] for label, one in results["models"].items() if one["lists"]}
    if not lists:
        return
    pictures = []
    for kind, ylabel in (("coverage", "share of items listed"), ("novelty", "novelty, bits")):
        of = {
            label: {n.partition("@")[2]: v for n, v in one.items() if n.startswith(f"{kind}@")}
            for label, one in lists.items()
        }
        lines = {
            label: ([*map(int, one)], [_mean(value) for value in one.values()])
            for label, one in of.items()
            if one
        }
        if lines:
            ends = "; ".join(f"{label} {y[-1]:.3g}" for label, (_, y) in lines.items())
            figure = lines_figure(lines, xlabel="first K places", ylabel=ylabel)
            pictures.append(Picture(f"{kind} over K; at the last: {ends}", figure))
    about = Text(f"{ABOUT['lists']}.")
    table = Numbers(by_cutoff(lists), "model", "What the lists are like", True)
    yield Section("Coverage and character of the lists", [about, Pictures(pictures), table])


def _sweeps(folder: Path, results: Mapping, metrics: tuple[str, str]) -> Iterator[Section]:
    """The curves over lambda that launch/sweep_guidance.py made of the same rows."""
    for path in sorted(folder.glob("sweep_*.json")):
        saved = read_json(path, remedy="make it anew with launch/sweep_guidance.py")
        if not _is_of_the_same(saved, results):
            logging.info("%s is left out of the report: it was made from other inputs", path)
            continue
        models = {
            label: {metric: Interval(**one[metric]) for metric in metrics}
            for label, one in saved["models"].items()
        }
        prefix = "lambda = "
        curve = {
            float(label.removeprefix(prefix)): one
            for label, one in models.items()
            if label.startswith(prefix)
        }
        pictures = [
            Picture(
                f"{metric.upper()} over lambda: "
                f"{_means({f'{x:g}': one[metric] for x, one in curve.items()})}",
                sweep_figure(curve, [metric], baseline=(CF, models[CF])),
            )
            for metric in metrics
        ]
        run = path.stem.removeprefix("sweep_")
        table: Rows = {
            label: {metric.upper(): value for metric, value in one.items()}
            for label, one in models.items()
        }
        yield Section(f"Guidance: {run}", [Pictures(pictures), Numbers(table, "score")])


def _is_of_the_same(sweep: Mapping, results: Mapping) -> bool:
    """Whether a sweep ranked, by the same LLM and CF model, what the results are of.

    Only its labels and weights of scores may differ; a run that is not in the results does.
    """
    own = "compared.variants", "compared.differences", "weights of scores"
    made = sweep.get("provenance", {}).get("inputs", {})
    compared = {name: value for name, value in made.items() if not name.endswith(own)}
    return bool(compared) and compared.items() <= results["provenance"]["inputs"].items()


def _mean(value: Interval | float) -> float:
    return value.mean if isinstance(value, Interval) else value


def _means(values: Mapping[str, Interval]) -> str:
    """In words, for those who do not see the picture."""
    return "; ".join(f"{name} {value.mean:.3g}" for name, value in values.items())
