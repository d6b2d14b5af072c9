"""The page of a made grid: text, pictures, JSON; what is missing; what is wrong."""

import dataclasses
import json
import os
import re
from html import unescape
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from browser import check_reading, chromium, seen
from drawing import drawn
from forked import Script
from made_results import cells, make_data, make_results

from tca4rec_jax.errors import UserError
from tca4rec_jax.experiments import tables
from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.grid import load_grid
from tca4rec_jax.experiments.page import write_page
from tca4rec_jax.experiments.page_cells import examples
from tca4rec_jax.experiments.results import FILE, TEST, Cell, append, read_lines
from tca4rec_jax.experiments.runner import Plan
from tca4rec_jax.experiments.setups import Results

GRID = Path(__file__).parents[2] / "configs" / "experiments" / "tiny.py"
SCRIPT = Path(__file__).parents[2] / "launch" / "experiments_report.py"


@pytest.fixture(scope="module")
def page(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "results.md"
    with drawn():
        return path, write_page(workdir, path)


@pytest.fixture(scope="module")
def page_of_grid(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("page_of_grid") / "results.md"
    return path, write_page(workdir, path, grid=str(GRID))


def test_the_page_shows_every_picture_with_its_alternative_text(page):
    path, _ = page
    shown = re.findall(r"!\[([^]]+)\]\(([^)]+)\)", path.read_text("utf-8"))
    assert {link for _, link in shown} == {
        str(one.relative_to(path.parent)) for one in path.with_suffix("").glob("*.png")
    }
    assert len({alt for alt, _ in shown}) == len(shown) > 10
    for _, link in shown:
        height, width, _ = matplotlib.image.imread(path.parent / link).shape
        assert 150 < height < 1400
        assert 350 < width < 1400


def test_the_page_says_what_was_found(page):
    text = page[0].read_text("utf-8")
    assert "6 of 9 cells in NDCG@10 and 6 of 9 cells in NLL are better (p < 0.05" in text
    assert "On movielens the LLM that is best on the validation rows (ids, ease;" in text
    for heading in ("help?", "CF model?", "same rows", "alpha", "beta", "lambda", "comes from"):
        assert re.search(f"^## .*{re.escape(heading)}$", text, re.MULTILINE), heading
    assert "tau\n" not in text  # an axis of one value
    assert "have one seed" not in text
    assert "4 of 6 are better. 6 of them were compared with one run: they hold of this CF" in text
    assert "is at the temperature" not in text  # all have validation rows
    assert "Values were chosen" not in text  # without a grid nothing says so


def test_the_page_says_what_is_missing_of_a_grid(page_of_grid):
    """Of the tiny one, with which the made grid has the most popular items in common."""
    page, found = page_of_grid
    plan = Plan.of(Cells(load_grid(str(GRID)), page.parent))  # where nothing is done
    text = page.read_text("utf-8")
    assert f"    python launch/experiments.py --grid={GRID} --workdir=" in text
    text = text.partition("## What is missing\n")[2]
    left = len(plan.missing) - 2  # on both splits
    assert f"{left} cells of the grid; {plan.to_come} more follow" in text
    assert "| movielens, ids, alpha = 0 | 1 |" in text
    assert [*found["questions"]["aligned"]["effects"]] == []  # none of its cells is tested


def test_only_what_the_grid_chooses_is_counted(tmp_path):
    """Validation rows choose 0.9; a smaller grid has tested 0.3 before."""
    (tmp_path / "W").mkdir()
    grid = f"{GRID}:cf=bpr_mf,guidance=0"
    made = Cells(load_grid(grid), tmp_path).all
    make_results(tmp_path / "W", made, gain=lambda cell: cell.alpha or 0.0, tested=lambda _: True)
    counted = write_page(tmp_path / "W", tmp_path / "page.md", grid=grid)["questions"]["aligned"]
    assert {one["setup"]["alpha"] for one in counted["effects"]} == {0.9}
    text = (tmp_path / "page.md").read_text("utf-8")
    assert " of 1 cells in NDCG@10 and " in text
    left = text.partition("## What is not chosen\n")[2].partition("\n## ")[0]
    assert "| movielens, ids, bpr_mf | 0.3 | 0 | 2 | not chosen |" in left
    assert "0.9" not in left
    assert "Values were chosen on validation rows, and the test rows ranked with these." in text
    narrow = f"{grid},alpha=(0,0.3)"
    counted = write_page(tmp_path / "W", tmp_path / "page.md", grid=narrow)["questions"]["aligned"]
    assert {one["setup"]["alpha"] for one in counted["effects"]} == {0.3}
    every = write_page(tmp_path / "W", tmp_path / "page.md")["questions"]["aligned"]
    assert {one["setup"]["alpha"] for one in every["effects"]} == {0.3, 0.9}
    text = (tmp_path / "page.md").read_text("utf-8")
    assert "not chosen" not in text
    assert "Values were chosen" not in text


def test_its_numbers_are_in_json(page):
    path, found = page
    saved = json.loads((path.with_suffix("") / "results.json").read_text("utf-8"))
    assert saved.keys() == found.keys()
    assert saved["rows"]["movielens, test"] == 600
    assert len(saved["questions"]["aligned"]["effects"]) == 18
    assert {f"{name}.png" for name in saved["pictures"]} == {
        one.name for one in path.with_suffix("").glob("*.png")
    }
    line = saved["pictures"]["alpha_movielens"]["NLL of the title"]["ids"][0]
    assert len(line["x"]) == len(line["y"]) == 3


def test_tables_are_made_again_from_the_copy_of_the_lines(page, results):
    path, found = page
    copy = Results.read(path.with_suffix(""))
    assert copy.lines == results.lines
    assert tables.cost_table(copy) == tables.cost_table(results)
    for effect in found["questions"]["aligned"]["effects"]:
        for of, name in (("setup", "mean"), ("compared with", "baseline")):
            lines = copy.of_setup(Cell(**effect[of]), TEST)
            mean = np.mean([line.metrics[effect["metric"]] for line in lines])
            assert mean == pytest.approx(effect[name], rel=1e-6)
    text = (path.with_suffix("") / FILE).read_text("utf-8")
    labels = [line.cell.label for line in copy.lines.values()]
    assert labels == sorted(labels)
    assert '": ' not in text


def test_the_points_of_a_curve_are_in_a_table(page):
    path, found = page
    text = path.read_text("utf-8")
    assert "| NLL of the title, at alpha = | 0 | 0.05 | 0.5 |" in text
    (line,) = (
        one
        for one in found["pictures"]["alpha_movielens"]["NLL of the title"]["ids"]
        if one["color"] == "ease"
    )
    numbers = " | ".join(f"{y:.4f}" for y in line["y"])
    assert f"| movielens, ids, ease | {numbers} |" in text


def sections(text):
    """{heading of level 2: what is below it in report.html}."""
    parts = re.split(r"<h2[^>]*>([^<]*)</h2>", text)[1:]
    return dict(zip(parts[::2], map(unescape, parts[1::2]), strict=True))


def test_the_report_shows_how_the_runs_learned(page):
    """Of movielens, titles no log is left: the validations are those that lines hold."""
    found = sections((page[0].with_suffix("") / "report.html").read_text("utf-8"))["Training"]
    of_titles, of_ids = re.split("<h3>movielens, ids</h3>", found)
    assert of_titles.count("<img") == 1
    assert "No log is here of alpha = 0, steps 250 (seed 0, seed 1, seed 2); popularity," in found
    assert of_ids.count("<img") == 2
    assert "No log" not in of_ids
    first = "validation/nll over steps of training: alpha = 0, seed 0 from "
    assert f'alt="{first}' in of_ids
    assert "ease, alpha = 0.5, seed 2, 270 to 299" in of_ids  # of 10 parts of a loss
    assert "alpha = 0.05" not in found  # was not chosen
    assert "guidance" not in found  # of a run that is drawn already


def test_the_report_shows_rows_of_the_best_aligned_llm(page, results):
    found = sections((page[0].with_suffix("") / "report.html").read_text("utf-8"))
    assert [one for one in found if one.startswith("Examples")] == [
        "Examples: movielens, titles",
        "Examples: movielens, ids",
    ]
    shown = found["Examples: movielens, ids"]
    assert "Lists of ease, alpha = 0.5, seed 0, on test rows. The CF model is ease." in shown
    assert len(re.findall("<h3>Example ", shown)) == 2
    assert len(re.findall("<h3>Least expected: ", shown)) == 3
    lists = re.findall('<p class="caption">(.*) recommends</p>', shown)[:3]
    assert lists == ["CF model", "alpha = 0", "ease, alpha = 0.5"]
    (cell,) = (
        of
        for of, split in results.lines
        if (of.recommender, of.cf, of.alpha, of.guidance, of.seed, split)
        == ("ids", "ease", 0.5, 0.0, 0, TEST)
    )
    ranks = results.ranks(cell, TEST)
    row = int(re.search(r"<h3>Least expected: row (\d+)</h3>", shown)[1])
    missed_R = ranks.rank_R < 0
    assert missed_R[row]
    assert ranks.nll_RxT[row, 0] == ranks.nll_RxT[missed_R].max()
    of_row = shown.partition(f"row {row}</h3>")[2].partition("<h3>")[0]
    items = [ranks.target_R[row], *ranks.items_RxM[row, :5]]
    titles = [int(one) for one in re.findall(r"<b>Film (\d+) & co</b>", of_row)]
    assert [titles[0], *titles[13:18]] == items  # after a history of 12


def test_data_that_are_gone_or_others_are_named(tmp_path, workdir, results):
    lines = results.with_tested([of for of in results.lines if of[0].recommender == "ids"]).lines
    (tmp_path / "ranks").symlink_to(workdir / "ranks")
    (gone,) = examples(Results(tmp_path, lines))
    assert gone.title == "Examples: movielens"
    assert f"There are none: {tmp_path}/movielens/data" in gone.blocks[0].text
    make_data(tmp_path, "movielens", split="validation")
    (other,) = examples(Results(tmp_path, lines))
    assert "has other rows than those on which 'movielens ids" in other.blocks[0].text


def test_it_can_be_read_in_a_browser(page):
    address = (page[0].with_suffix("") / "report.html").as_uri()
    with chromium() as browser:
        for width, dark in ((1280, False), (390, True)):
            with seen(browser, address, width=width, dark=dark) as shown:
                check_reading(shown)


def test_a_grid_of_validation_rows_alone_has_its_curves(tmp_path):
    (tmp_path / "W").mkdir()
    made = cells(seeds=(0,), recommenders=("ids",))
    make_results(tmp_path / "W", made, splits=("validation",))
    found = write_page(tmp_path / "W", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text("utf-8")
    assert "No LLM was ranked on test rows yet." in text
    assert "missing" not in text
    assert "All models" not in text
    assert "alpha_movielens" in found["pictures"]


def test_data_without_counted_test_rows_have_no_table_of_models(tmp_path):
    """Tested on one of two; and with the grid of one of two that are tested."""
    (tmp_path / "one").mkdir()
    made = cells(data=("movielens", "beauty"), seeds=(0,), recommenders=("ids",))
    make_results(tmp_path / "one", made, tested=lambda cell: cell.data == "movielens")
    write_page(tmp_path / "one", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text("utf-8")
    assert "### movielens, test rows" in text
    assert "### beauty, test rows" not in text
    (tmp_path / "W").mkdir()
    grid = f"{GRID}:cf=bpr_mf,guidance=0,seed=0"
    here = Cells(load_grid(grid), tmp_path).all
    there = [dataclasses.replace(cell, data="beauty") for cell in here]
    chosen = {"gain": lambda cell: cell.alpha or 0.0, "tested": lambda _: True}
    make_results(tmp_path / "W", here + there, **chosen)
    write_page(tmp_path / "W", tmp_path / "page.md", grid=grid)
    text = (tmp_path / "page.md").read_text("utf-8")
    assert "### movielens, test rows" in text
    assert "### beauty, test rows" not in text


def test_the_page_says_that_training_was_not_validated(tmp_path):
    (tmp_path / "W").mkdir()
    made = cells(seeds=(0,), recommenders=("ids",), guidances=(), betas=())
    make_results(tmp_path / "W", made, splits=("test",))
    for line in read_lines(tmp_path / "W").values():
        append(tmp_path / "W", dataclasses.replace(line, validations={}))
        if line.run:
            (tmp_path / "W" / line.run).mkdir(parents=True)
            log = ({"step": step, "nll_per_title": 9 - step / 5} for step in range(20))
            text = "".join(json.dumps(one) + "\n" for one in log)
            (tmp_path / "W" / line.run / "log.jsonl").write_text(text)
    write_page(tmp_path / "W", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text("utf-8")
    speed = text.partition("## Speed of training\n")[2].partition("\n## ")[0]
    assert "NLL, training](page/speed_movielens.png)" in speed
    assert "no two runs were validated\nwhile they were trained" in speed
    assert "steps to its NLL" not in speed


def test_the_page_says_how_many_setups_have_one_seed(tmp_path):
    (tmp_path / "W").mkdir()
    made = cells(recommenders=("ids",), guidances=(), betas=())
    one_seed = [cell for cell in made if cell.cf != "ease" or cell.seed in (0, None)]
    make_results(tmp_path / "W", one_seed, splits=("test",))
    write_page(tmp_path / "W", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text("utf-8")
    assert "correction). 1 of them have one seed, and say nothing of others.\n" in text
    assert "The NLL of 4 of these models is at the temperature 1: no validation rows chose" in text


def test_a_grid_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "W").mkdir()
    made = cells(seeds=(0,), recommenders=("ids",))
    make_results(tmp_path / "W", [cell for cell in made if not cell.alpha])
    (tmp_path / "page").mkdir()
    earlier = {"pictures": {"alpha_movielens": {}}}
    (tmp_path / "page" / "results.json").write_text(json.dumps(earlier))
    for name in ("alpha_movielens", "of_somebody"):
        (tmp_path / "page" / f"{name}.png").touch()
    grid = f"{GRID}:seed=(0,1)"
    found = write_page(tmp_path / "W", tmp_path / "page.md", grid=grid)
    assert len(found["questions"]["aligned"]["missing"]) == 3
    text = (tmp_path / "page.md").read_text("utf-8")
    assert f"    python launch/experiments.py '--grid={grid}' --workdir=" in text  # for a shell
    assert "| movielens, ids, ease: aligned | missing |" in text
    assert found["pictures"] == {}
    assert [one.name for one in (tmp_path / "page").glob("*.png")] == ["of_somebody.png"]


def test_a_page_that_would_write_over_the_lines_is_refused(tmp_path):
    (tmp_path / "W").mkdir()
    make_results(tmp_path / "W", [Cell("d", "popular")])
    lines = (tmp_path / "W" / FILE).read_bytes()
    with pytest.raises(UserError, match="W.md would write over"):
        write_page(tmp_path / "W", tmp_path / "W.md")
    assert (tmp_path / "W" / FILE).read_bytes() == lines
    assert [*tmp_path.iterdir()] == [tmp_path / "W"]


@pytest.mark.parametrize(
    ("output", "message"), [("page.html", "is no .md file"), ("page.md", "has no line: run")]
)
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, output, message):
    with pytest.raises(UserError, match=message):
        write_page(tmp_path, tmp_path / output)
    assert [*tmp_path.iterdir()] == []


def test_the_script_writes_the_page_and_says_what_is_wrong_in_one_line(tmp_path):
    first = [cell for cell in cells(seeds=(0,)) if not cell.is_llm]
    (tmp_path / "W").mkdir()
    make_results(tmp_path / "W", first)
    page = tmp_path / "page.md"
    runs = [
        Script([str(SCRIPT), f"--workdir={tmp_path / name}", f"--output={page}"], dict(os.environ))
        for name in ("W", "nothing")
    ]
    written, wrong = (run.completed() for run in runs)
    assert (written.returncode, wrong.returncode) == (0, 1)
    assert "### movielens, test rows" in page.read_text("utf-8")
    assert wrong.stderr.startswith("experiments_report: ")
    assert wrong.stderr.count("\n") == 1
