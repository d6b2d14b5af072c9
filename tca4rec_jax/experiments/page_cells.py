"""Sections of a grid's page about single cells: how their runs learned, examples, errors.

They are those of the report of an evaluation, of the cells that the page counts. Axis letters: R
rows.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from tca4rec_jax.data.dataset import load
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation import page_rows
from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.evaluation.page_rows import RankedRows
from tca4rec_jax.evaluation.page_runs import ABOUT_CURVES, learned
from tca4rec_jax.evaluation.pictures import Curve
from tca4rec_jax.evaluation.rankings import CF, EvaluationRows, ModelRanking
from tca4rec_jax.experiments.curves import PLAIN
from tca4rec_jax.experiments.results import TEST, VALIDATION, Cell, Line
from tca4rec_jax.experiments.setups import Results, setup_of
from tca4rec_jax.experiments.tables import OF_TRAINING, told_apart
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.pages.blocks import Block, Section, Text
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.training.run_folder import RunFolder, quantities
from tca4rec_jax.training.validation import NLL as VALIDATED
from tca4rec_jax.training.validation import SECTION

_EXAMPLES = 2  # of each recommender on data
_ABOUT_RUNS = """\
Runs that were ranked on test rows, or where none was, on validation rows; seeds of a setup look
alike."""
_NO_LOG = "No log is here of {}: of these there are validations alone, as far as lines hold them."


def how_they_learned(results: Results) -> Iterator[Section]:
    """The curves of runs, by data and recommender; nothing if no run has any.

    Of runs that were ranked on test rows, or on validation rows where no test row was ranked.
    """
    parts = []
    for data, recommender in _pairs(results):
        fields = {"data": data, "recommender": recommender}
        setups = {split: results.setups(split, **fields) for split in (TEST, VALIDATION)}
        split = TEST if setups[TEST] else VALIDATION
        lines = [line for one in setups[split] for line in results.of_setup(one, split)]
        if blocks := _curves(results, lines):
            parts.append(Section(f"{data}, {recommender}", blocks, 3))
    if parts:
        yield Section("Training", [Text(f"{_ABOUT_RUNS} {ABOUT_CURVES}")])
        yield from parts


def _pairs(results: Results) -> list[tuple[str, str]]:
    """Data and recommender of all LLMs."""
    cells = [cell for cell, _ in results.lines if cell.is_llm]
    return [*dict.fromkeys((cell.data, cell.recommender) for cell in cells)]


def _curves(results: Results, lines: Sequence[Line]) -> list[Block]:
    """Of the runs of the lines, each drawn once."""
    least_guided = sorted(lines, key=lambda line: line.cell.guidance or 0.0)
    runs: dict[str, Line] = {}
    for line in least_guided:
        runs.setdefault(line.run, line)
    setups = [setup_of(line.cell) for line in runs.values()]
    cf_seeds = {line.cell.cf_seed for line in runs.values()} - {None}
    curves: dict[str, Curve] = {}
    without: dict[str, list[str]] = {}
    alike, keys = {}, []
    for run, line in runs.items():
        setup = _setup_in_words(line.cell, setups)
        seeds = f"seed {line.cell.seed}"
        if len(cf_seeds) > 1 and line.cell.cf_seed is not None:
            seeds += f", CF seed {line.cell.cf_seed}"
        name = f"{setup}, {seeds}"
        log = read_json_lines(RunFolder(results.workdir / run).log)
        if not log:
            without.setdefault(setup, []).append(seeds)
        curves[name], alike[name] = log or _validations(line), setup
        keys += quantities(line.made_from.inputs.get("run.validation.metric", VALIDATED))
    blocks = learned(curves, keys, alike=alike)
    lacking = "; ".join(f"{setup} ({', '.join(seeds)})" for setup, seeds in without.items())
    return [*blocks, *([Text(_NO_LOG.format(lacking))] if lacking else [])]


def _setup_in_words(cell: Cell, among: Sequence[Cell]) -> str:
    """'sasrec, alpha = 0.5', and what of the training tells it from the others."""
    alpha = f"alpha = {cell.alpha:g}" if cell.alpha else PLAIN
    return ", ".join(filter(None, [cell.cf, alpha, told_apart(cell, among, OF_TRAINING)]))


def _validations(line: Line) -> Curve:
    """What a line holds of the log of its run."""
    return [
        {"step": int(step)} | {f"{SECTION}/{name}": value for name, value in of.items()}
        for step, of in line.validations.items()
    ]


def examples(results: Results) -> Iterator[Section]:
    """Examples and errors on test rows of one aligned LLM of each recommender on data.

    Data that are not there, or are others, are named. Raises UserError for cells of other rows.
    """
    on_data: dict[str, list[Cell]] = {}
    for pair in _pairs(results):
        if (setup := _shown(results, *pair)) is not None:
            on_data.setdefault(setup.data, []).append(setup)
    for data, setups in on_data.items():
        try:
            titles, rows = _rows(results, results.cells(setups[0], TEST)[0])
        except (FileNotFoundError, UserError) as error:
            yield Section(f"Examples: {data}", [Text(f"There are none: {error}")])
            continue
        for setup in setups:
            yield from _of_setup(results, setup, titles, rows)


def _shown(results: Results, data: str, recommender: str) -> Cell | None:
    """The aligned LLM without guidance that is best on validation rows, of those with test rows."""
    setups = results.setups(TEST, data=data, recommender=recommender)
    metric = results.metric(TEST)

    def validated(setup: Cell) -> float:
        mean = results.mean(setup, VALIDATION, metric)
        return -np.inf if mean is None else mean

    aligned = (one for one in setups if one.alpha and not one.guidance)
    return max(aligned, key=validated, default=None)


def _of_setup(
    results: Results, setup: Cell, titles: Sequence[str], rows: EvaluationRows
) -> Iterator[Section]:
    """Of its first seed, beside the CF model and alpha = 0 of the same seeds."""
    cell = results.cells(setup, TEST)[0]
    name = _setup_in_words(cell, [])
    cells = {
        CF: _beside(results, setup, results.teacher(setup, TEST)),
        PLAIN: _beside(results, setup, results.plain(setup, TEST)),
        name: cell,
    }
    there = {label: one for label, one in cells.items() if one is not None}
    for one in there.values():
        results.check_same_rows(cell, one, TEST)
    rankings = {label: _ranking(results, one) for label, one in there.items()}
    ranked = RankedRows(titles, rows, rankings, "item", (1.0,))
    by_chance_R = np.random.default_rng(0).permutation(len(rows))[:_EXAMPLES]
    sections = [*page_rows.examples(ranked, by_chance_R.tolist())]
    if CF in rankings:
        sections += page_rows.errors(ranked)
    lacking = [label for label, one in cells.items() if one is None]
    words = f"Lists of {name}, seed {cell.seed}, on test rows. The CF model is {setup.cf}."
    words += f" Not ranked: {', '.join(lacking)}." if lacking else ""
    yield Section(f"Examples: {setup.data}, {setup.recommender}", [Text(words)])
    yield from (one._replace(level=3) for one in sections)


def _beside(results: Results, setup: Cell, other: Cell | None) -> Cell | None:
    """The cell of another setup that is compared with the first one of a setup."""
    if other is None:
        return None
    return dict(results.pairs(setup, other, TEST)).get(results.cells(setup, TEST)[0])


def _ranking(results: Results, cell: Cell) -> ModelRanking:
    """What a cell did on the test rows, its NLL at the temperature of its setup."""
    ranks = results.ranks(cell, TEST)
    nll_Rx1 = results.values(cell, TEST, NLL)[:, None]
    return ModelRanking(ranks.items_RxM, ranks.rank_R, ranks.rank_R, nll_Rx1)


def _rows(results: Results, cell: Cell) -> tuple[Sequence[str], EvaluationRows]:
    """The titles of the data, and the test rows of a cell.

    Raises as `dataset.load`, and UserError for data that have not these rows.
    """
    folder, ranks = results.workdir / cell.data / "data", results.ranks(cell, TEST)
    data = load(folder)
    every = data.splits[TEST]
    if np.isin(ranks.position_R, every.last_positions).all():
        sequences = every.take(np.searchsorted(every.last_positions, ranks.position_R))
        length = Provenance.load(folder).inputs["data.history_length"]
        history_RxH, target_R = sequences.histories_and_targets(length)
        if np.array_equal(target_R, ranks.target_R):
            rows = EvaluationRows(TEST, sequences, ranks.position_R, history_RxH, target_R)
            return data.catalogue.titles, rows
    raise UserError(f"{folder} has other rows than those on which {cell.label!r} was ranked")
