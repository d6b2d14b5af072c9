"""The page of a grid as Markdown and HTML, its pictures and its numbers as JSON, from W alone."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.evaluation.page import FILE as REPORT
from tca4rec_jax.experiments import analyses, curves, tables
from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.curves import PLAIN, Panels
from tca4rec_jax.experiments.effects import LEVEL
from tca4rec_jax.experiments.grid import load_grid
from tca4rec_jax.experiments.page_cells import examples, how_they_learned
from tca4rec_jax.experiments.page_grid import FIRST, copied, made_from, missing, opening
from tca4rec_jax.experiments.page_parts import GridPage
from tca4rec_jax.experiments.pictures import Difference, Differences
from tca4rec_jax.experiments.results import FILE, TEST
from tca4rec_jax.experiments.runner import Plan
from tca4rec_jax.experiments.setups import Results
from tca4rec_jax.experiments.tables import Question
from tca4rec_jax.fileio import read_json, remove, write_text
from tca4rec_jax.pages.blocks import Block, Numbers, Text
from tca4rec_jax.pages.html import html_page
from tca4rec_jax.pages.markdown import markdown_page
from tca4rec_jax.reporting import Rows, write_results

NUMBERS = "results.json"
_STATISTICS = f"""\
Every difference is paired: the same rows, the same seed; cells that are compared with one and the
same run of an LLM count as one seed. Intervals are of 95%, for other users and other seeds: users
are resampled with all of their rows, and what seeds do is drawn, from how the seeds differ beyond
what users explain; that is taken to be the same for all setups of one recommender and guidance on
the same rows. (Three seeds drawn from three would give intervals that leave the truth out far too
often.) p is of a randomisation test that exchanges whole users, seeds drawn along; Holm's
correction is over all tests of a question, both metrics. d is Cohen's: the mean of the users'
differences over their standard deviation. The verdict is "better" or "worse" where p by Holm is
below {LEVEL:g}; one seed says nothing of others. NLL is -log P of the title that came next, at the
temperature in evaluation.temperatures that is best for each model on its validation rows, or at 1
for one without any; lower is better."""
_FREE_TEXT = """\
Texts are those of the LLM without the trie: the perplexity of the titles that came next, and how
often it writes a title of the catalogue. One that was trained on choices among the children of the
trie (softmax children) has not learned the tokens between them."""
_CHOSEN = "Values were chosen on validation rows, and the test rows ranked with these."
_NOT_VALIDATED = """\
After how many steps an aligned LLM is where alpha = 0 ends is not known: no two runs were validated
while they were trained (validation.every), and the NLL of training batches does not tell."""
_NOT_CHOSEN = """\
Ranked on test rows as well, by another choice or another grid. The grid of this page does not
choose these, or not yet: nothing above counts them."""


def write_page(workdir: Path, output: Path, *, grid: str = "") -> dict:
    """Writes the page of a work directory of experiments; returns what its results.json holds.

    `output` is the page, a .md; its pictures, results.json, a copy of the lines and report.html,
    the page in one file, lie in the folder of its name beside it. With `grid`, what
    launch/experiments.py --grid takes, it says what is missing of that and how to go on, and counts
    of the test rows only what the grid chooses. Nothing is trained or ranked. Raises UserError for
    another `output`, for a grid that is none, as `Results.read`, for damaged files, lines of other
    rows, or seeds of a setup that were made from other inputs.
    """
    if output.suffix != ".md":
        raise UserError(f"{output} is no .md file: give the page to write")
    if output.with_suffix("").resolve() == workdir.resolve():
        raise UserError(f"{output} would write over {workdir / FILE}: give the page another name")
    every = results = Results.read(workdir)
    plan = None
    if grid:
        cells = Cells(load_grid(grid), workdir)
        plan = Plan.of(cells)
        results = every.with_tested({*plan.done})
    questions = {
        "aligned": tables.aligned_against_plain(results),
        "guided": tables.guided_against_teacher(results),
        "recommenders": tables.recommenders_compared(results),
    }
    page = GridPage(output, results)
    data = list(dict.fromkeys(cell.data for cell, _ in every.lines))
    best = [words for one in data if (words := tables.best_in_words(results, one))]
    lead = [*opening(every, grid), *map(Text, best)]
    _answers(page, questions, data)
    if plan is not None and not plan.is_done:
        page.section("What is missing", *missing(plan))
    if left := tables.not_chosen_table(every, results):
        page.section("What is not chosen", Text(_NOT_CHOSEN), Numbers(left, FIRST))
    page.section(
        "What it cost",
        Numbers(tables.cost_table(every), "lines of"),
        Text(
            "Steps of LLM training, ranking and measuring; not data, CF models and hidden states."
        ),
    )
    page.section("How differences are tested", Text(_STATISTICS))
    if plan is not None and cells.grid.chosen and tables.most_seeds(results):
        page.add(Text(_CHOSEN))
    write_text(output, markdown_page("Results", lead, page.sections))
    page.sections += [*how_they_learned(results), *examples(results)]
    page.section("Made from", *made_from(every))
    write_text(page.folder / REPORT, html_page("Results", lead, page.sections))
    found = {
        "rows": {
            f"{line.cell.data}, {split}": line.rows for (_, split), line in every.lines.items()
        },
        "questions": {name: tables.as_json(one) for name, one in questions.items()},
        "core-hours": tables.core_hours(every.lines.values()),
        "best": best,
        "pictures": page.drawn,
    }
    _remove_pictures(page.folder, but=page.drawn)
    write_results(page.folder / NUMBERS, found)
    write_text(page.folder / FILE, copied(every))
    return found


def _answers(page: GridPage, questions: Mapping[str, Question], data: Sequence[str]) -> None:
    """The questions, all models of each of the data, the curves, and where a gain comes from."""
    _aligned(page, questions["aligned"])
    _guided(page, questions["guided"])
    _recommenders(page, questions["recommenders"])
    if page.results.setups(TEST):
        page.section("All models on the same rows")
        for one in data:
            if rows := tables.model_table(page.results, one):
                page.part(f"{one}, test rows", Numbers(rows, "model"))
    for axis, about in _AXES.items():
        _curve(page, axis, about)
    _where(page, questions["aligned"])
    _speed(page, questions["aligned"])


def _remove_pictures(folder: Path, *, but: Collection[str]) -> None:
    """Removes what the page that was written there before shows and this one does not."""
    earlier = read_json(folder / NUMBERS) if (folder / NUMBERS).exists() else {}
    for name in {*earlier.get("pictures", ())} - {*but}:
        remove(folder / f"{name}.png")


_AXES = {
    "alpha": "The weight of the CF model's distribution in the labels, alpha",
    "beta": "The temperature of the CF model, beta",
    "tau": "The temperature of the LLM's softmax in training, tau",
    "guidance": "The weight of the CF model in the search, lambda",
}


def _aligned(page: GridPage, question: Question) -> None:
    results, metric = page.results, page.results.metric(TEST)
    page.section("Does the alignment help?")
    expected = question.compared or question.missing
    if not results.setups(TEST) or not expected:
        return page.add(Text("No LLM was ranked on test rows yet."))
    counts = [(name, *question.better(of)) for of, name in ((metric, metric.upper()), (NLL, "NLL"))]
    words = [f"{better} of {cells} cells in {name}" for name, better, cells in counts]
    found = (
        "Aligned LLMs against the same LLM with alpha = 0, whose labels no CF model has touched: "
        f"{' and '.join(words)} are better (p < {LEVEL:g} after Holm's correction)."
    )
    page.add(Text(f"{found}{_of_one_seed(question)}"))
    both = "alpha = 0", "aligned"
    for of, name in ((metric, metric.upper()), (NLL, "NLL of the title (lower is better)")):
        rows = tables.question_table(question, of, tables.most_seeds(results), both)
        page.part(name, Numbers(rows, FIRST))
    page.add(*_temperatures(results, question))
    for of, name in ((metric, "ndcg"), (NLL, "nll")):
        what = f"{of.upper() if of == metric else 'NLL'}, aligned less alpha = 0"
        page.differences(f"aligned_{name}", what, _drawn(question, of), what)
    if question.compared:
        rows = curves.character_table(results, question)
        title = "What lists and texts are like, alpha = 0 → aligned"
        page.part(title, Numbers(rows, FIRST), Text(_FREE_TEXT))


def _of_one_seed(question: Question) -> str:
    number = question.of_one_seed
    return f" {number} of them have one seed, and say nothing of others." if number else ""


def _temperatures(results: Results, question: Question) -> list[Block]:
    """Of which models the NLL is at a temperature that no validation row chose."""
    return [
        Text(f"The NLL of {number} of these models is at the temperature {words}.")
        for words, number in question.temperatures_not_chosen(results).items()
    ]


def _guided(page: GridPage, question: Question) -> None:
    results, metric = page.results, page.results.metric(TEST)
    if not question.compared:
        return
    page.section("Does the guided model beat its CF model?")
    better, cells = question.better(metric)
    found = (
        "Aligned LLMs that their CF model guides, against that CF model alone, in "
        f"{metric.upper()}: {better} of {cells} are better.{_of_one_seed(question)}"
    )
    if number := question.of_one_cf_run(results):
        found += f" {number} of them were compared with one run: they hold of this CF run."
    both = "CF model", "guided"
    rows = tables.question_table(question, metric, tables.most_seeds(results), both)
    page.add(Text(found), Numbers(rows, FIRST))
    words = f"{metric.upper()}, guided less the CF model"
    page.differences("guided_ndcg", words, _drawn(question, metric), words)


def _recommenders(page: GridPage, question: Question) -> None:
    results, metric = page.results, page.results.metric(TEST)
    if not question.compared:
        return
    page.section("Which recommender is better?")
    first = {one.data: other.recommender for one, other in question.compared.items()}
    words = (
        "On the same rows, with the same CF model or none, without guidance, against the first "
        f"that was ranked: {', '.join(f'{name} on {data}' for data, name in first.items())}."
    )
    page.add(Text(words))
    for of, name in ((metric, metric.upper()), (NLL, "NLL of the title (lower is better)")):
        both = "the first", "this one"
        rows = tables.question_table(question, of, tables.most_seeds(results), both)
        page.part(f"{name}, by recommender", Numbers(rows, FIRST))
    page.add(*_temperatures(results, question))
    for of, name in ((metric, "ndcg"), (NLL, "nll")):
        what = f"{of.upper() if of == metric else 'NLL'}, less the first recommender's"
        page.differences(f"recommenders_{name}", what, _drawn(question, of), what)


def _drawn(question: Question, metric: str) -> Differences:
    """The effects of a question; those that are shown after Holm's correction have full marks."""
    panels: Differences = {}
    for (setup, of), effect in question.effects.items():
        if of == metric:
            row = tables.told_apart(setup, question.compared) or "as configured"
            panel = panels.setdefault(f"{setup.data}, {setup.recommender}", {})
            shown = Difference(effect.difference, effect.is_better is not None)
            panel.setdefault(row, {})[str(setup.cf) if setup.alpha else PLAIN] = shown
    return panels


def _curve(page: GridPage, axis: str, about: str) -> None:
    results = page.results
    split = curves.split_of(results, axis)
    found = curves.curves(results, axis, split)
    if not found:
        return
    scale = "log" if axis in ("beta", "tau") else "log from 0"
    panels = curves.metric_panels(results, found, split)
    words = (
        f"On {split} rows. Bands are the 95% intervals of the difference from "
        f"{'no guidance' if axis == 'guidance' else 'alpha = 0'}, about the mean."
    )
    page.section(about, Text(words))
    xlabel = "lambda" if axis == "guidance" else axis
    page.pictures(axis, f"Accuracy over {xlabel}", panels, xlabel, scale)
    for quantity, rows in _numbers(panels).items():
        page.add(Numbers(rows, f"{quantity}, at {xlabel} ="))
    closer: dict[str, tuple[str, Callable]] = {
        "agreement": ("How far lists agree with the CF model", curves.agreement_panels),
        "lists": ("Coverage and popularity of lists", curves.list_panels),
        "fluency": ("What the LLM writes without the trie", curves.fluency_panels),
    }
    for name, (alt, panels_of) in closer.items():
        if axis in ("alpha", "guidance") and (panels := panels_of(results, found, split)):
            page.part(f"{alt}, over {xlabel}", Text(_CLOSER[name]))
            page.pictures(f"{name}_{axis}", f"{alt} over {xlabel}", panels, xlabel, scale)
            page.add(*_points(panels, xlabel))


def _points(panels: Panels, xlabel: str) -> list[Block]:
    """The numbers of a picture that has no table beside it."""
    return [
        Numbers(rows, f"at {xlabel} =", quantity, is_closed=True)
        for quantity, rows in _numbers(panels).items()
    ]


def _numbers(panels: Panels) -> dict[str, Rows]:
    """{quantity: a row for each line, a column for each of its x}."""
    found: dict[str, Rows] = {}
    for quantity, row in panels.items():
        lines = [(panel, line) for panel, of_panel in row.items() for line in of_panel]
        columns = [f"{x:g}" for x in sorted({x for _, line in lines for x in line.x})]
        found[quantity] = {
            ", ".join(filter(None, [panel, line.color, line.style])): dict.fromkeys(columns)
            | {f"{x:g}": y for x, y in zip(line.x, line.y, strict=True)}
            for panel, line in lines
        }
    return found


_CLOSER = {
    "agreement": "The CF model's rank of what is listed (1 is its best; ties share their mean "
    "rank), how often both begin with the same item, and Kendall's tau-b between a list and the CF "
    "model's order of the same items. Means over seeds, bands from the least to the largest.",
    "lists": "The share of the catalogue in anybody's list, and the training interactions of what "
    "is listed, relative to those of the targets.",
    "fluency": "Perplexity of the titles that came next, over the whole vocabulary, and how often "
    "the LLM writes a title of the catalogue when no trie holds it to one.",
}


def _where(page: GridPage, question: Question) -> None:
    """Which rows, and which decisions."""
    results, metric = page.results, page.results.metric(TEST)
    slices = analyses.slice_effects(results, question, metric)
    panels: Differences = {}
    for name, of_slice in slices.items():
        for setup, effect in of_slice.items():
            apart = tables.told_apart(setup, question.compared)
            panel = ", ".join(filter(None, [setup.data, setup.recommender, apart]))
            shown = Difference(effect.difference, effect.p < LEVEL)
            panels.setdefault(panel, {}).setdefault(name, {})[str(setup.cf)] = shown
    decisions = analyses.decision_panels(results, question)
    if not panels and not decisions:
        return
    page.section("Where the gain comes from")
    words = f"{metric.upper()}, aligned less alpha = 0"
    page.differences("slices", f"{words}, by target and history", panels, words)
    if panels:
        page.add(Text("Full marks: p < 0.05, not corrected for the number of slices."))
        of_slices = {
            f"{panel}, {name}": {cf: one.interval for cf, one in of.items()}
            for panel, rows in panels.items()
            for name, of in rows.items()
        }
        page.add(Numbers(of_slices, "setup, slice", "The differences", is_closed=True))
    if decisions:
        words = (
            "How much likelier the first, second .. decision of the title that came next has "
            "become, at temperature 1."
        )
        page.part("Which decisions of a title", Text(words))
        alt = "Gain in log-likelihood by decision, aligned less alpha = 0"
        page.pictures("decisions", alt, decisions, "decision of the title", "linear")
        page.add(*_points(decisions, "decision"))


def _speed(page: GridPage, question: Question) -> None:
    if not page.results.setups(TEST):
        question = tables.aligned_on_validation(page.results)
    panels = analyses.speed_panels(page.results, question)
    rows: Rows = analyses.speed_table(page.results, question)
    if not panels:
        return
    page.section("Speed of training")
    page.pictures("speed", "NLL over steps of training", panels, "steps", "linear")
    page.add(*_points(panels, "steps"), Numbers(rows, FIRST) if rows else Text(_NOT_VALIDATED))
