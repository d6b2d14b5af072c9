"""What a grid costs, said beforehand, and what follows once values are chosen."""

from pathlib import Path

import pytest

from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.costs import Costs, Kind
from tca4rec_jax.experiments.grid import load_grid
from tca4rec_jax.experiments.results import TEST, VALIDATION, Line, append, read_lines
from tca4rec_jax.experiments.runner import Plan, say

GRIDS = Path(__file__).parents[2] / "configs" / "experiments"
TINY, CLAIM = GRIDS / "tiny.py", GRIDS / "claim.py"
TRAIN, RANK = 12.0, 6.0  # seconds of a run, and of a cell's ranking


def cells_of(grid, workdir):
    return Cells(load_grid(str(grid)), workdir)


def add(cells, *ranked, rows=1):
    """The lines of cells; two cores were busy."""
    for cell, split in ranked:
        seconds = {"train": TRAIN if cell.is_llm else 0.0, "evaluate": RANK - 1, "measure": 1.0}
        metrics = {"ndcg@10": cell.alpha or 0.0, "nll per title": 1.0}
        cores = 2 * sum(seconds.values())
        key = f"{cell.label} {split}"
        append(cells.workdir, Line(key, cell, split, rows, 1, metrics, "", seconds, cores, "m", {}))


def estimate(cells, ranked):
    return Costs.of(read_lines(cells.workdir).values(), cells).estimate(ranked)


def test_a_run_counts_once_and_only_the_steps_after_its_last_checkpoint(tmp_path):
    cells = cells_of(TINY, tmp_path)
    llm = [(cell, TEST) for cell in cells.all if cell.is_llm and cell.alpha and cell.seed == 1]
    assert estimate(cells, llm) == (0.0, 0.0, llm)
    add(cells, llm[0])
    runs = {cells.run_name(cell) for cell, _ in llm}
    seconds = RANK * len(llm) + TRAIN * len(runs)
    assert estimate(cells, llm) == (seconds, 2 * seconds, [])
    run = cells.run_folder(llm[0][0])
    (run.checkpoints / "3").mkdir(parents=True)
    run.log.write_text("".join(f'{{"step": {step}, "seconds": 1}}\n' for step in range(5)))
    seconds -= TRAIN / 2  # it goes on after step 3 of 6
    assert estimate(cells, llm) == (seconds, 2 * seconds, [])


@pytest.mark.parametrize(
    ("grid", "cells_and_splits"),
    [
        (f"{TINY}:seed=(0,1,2)", 6 + 5 + 21),
        (f"{CLAIM}:data=movielens,recommender=ids", 8 + 28 + 42),
    ],
)
def test_the_estimate_of_a_grid_is_what_the_rest_of_it_takes(grid, cells_and_splits, tmp_path):
    cells = cells_of(grid, tmp_path)
    plan = Plan.of(cells)
    assert len(plan.missing) + plan.to_come == cells_and_splits
    baselines = [of for of in plan.missing if not of[0].is_llm]
    add(cells, *baselines)
    plan = Plan.of(cells)
    left = [*plan.missing, *plan.to_follow]
    assert estimate(cells, left) == (0.0, 0.0, left)  # not what baselines take
    add(cells, *[of for of in plan.missing if of[0].is_llm and not of[0].alpha])
    plan = Plan.of(cells)
    said = estimate(cells, [*plan.missing, *plan.to_follow])
    ranked, runs = 0, set()
    while plan.missing:
        ranked += len(plan.missing)
        runs |= {cells.run_name(cell) for cell, _ in plan.missing}
        add(cells, *plan.missing)
        plan = Plan.of(cells)
    seconds = RANK * ranked + TRAIN * len(runs)
    assert said == (seconds, 2 * seconds, [])
    assert len(plan.done) == cells_and_splits
    assert plan.is_done


def test_an_empty_work_directory_has_no_time_but_cells_and_steps(tmp_path, capsys):
    cells = cells_of(f"{CLAIM}:data=movielens", tmp_path)
    say(cells, Plan.of(cells))
    said = capsys.readouterr().out
    assert "0 cells are done, 92 are missing\n126 more follow once values are chosen" in said
    assert said.endswith("How long these 218 take is not known: nothing like them was measured\n")
    ids = next(line.split() for line in said.splitlines() if line.startswith("movielens, ids"))
    runs = 1 + 3 * 3 + 2 + 3 * 2  # of seed 0 all, of the others alpha = 0 and what is chosen
    assert ids[2:] == ["0", "28", "42", str(runs * 1200), "-", "-"]


def test_where_something_like_it_is_missing_the_time_is_a_least(tmp_path, capsys):
    cells = cells_of(f"{CLAIM}:data=movielens,recommender=(titles,ids)", tmp_path)
    plan = Plan.of(cells)
    add(cells, *[of for of in plan.missing if of[0].recommender == "ids"], rows=1000)
    plan = Plan.of(cells)
    say(cells, plan)
    said = capsys.readouterr().out
    assert "Missing cells take at least " in said
    every = [*plan.missing, *plan.to_follow]
    unknown = sum(cell.recommender != "ids" for cell, _ in every)
    assert f"{unknown} of these {len(every)} are not in it, or not wholly" in said
    (ids,) = [line for line in said.splitlines() if line.startswith("movielens, ids")]
    assert " about " in ids


def test_other_data_count_by_their_rows(tmp_path):
    cells = cells_of(CLAIM, tmp_path)
    on = {
        (cell.data, cell.recommender): cell
        for cell in cells.all
        if cell.is_llm and not cell.guidance
    }
    add(cells, (on["movielens", "titles"], VALIDATION), rows=1000)
    office = on["office", "titles"]
    training = TRAIN * office.steps / on["movielens", "titles"].steps
    assert estimate(cells, [(office, TEST)]).seconds == pytest.approx(training + 2 * RANK)
    assert estimate(cells, [(on["office", "llara"], TEST)]).unknown
    add(cells, (office, VALIDATION), rows=300)  # 10 / 3 as long a row, and nearer
    assert estimate(cells, [(office, TEST)]).seconds == pytest.approx(TRAIN + RANK * 2000 / 300)


def test_the_nearest_kind_is_of_the_same_recommender():
    kinds = [Kind("a", "x", TEST, True), Kind("a", "y", TEST, True), Kind("b", "x", "", False)]
    assert Kind("a", "y", VALIDATION, False).nearest(kinds) == kinds[1]
    assert Kind("a", "x", VALIDATION, False).nearest(kinds) == kinds[0]
    assert Kind("c", "x", TEST, True).nearest(kinds) is None


def test_a_run_that_has_begun_says_what_a_step_takes(tmp_path):
    cells = cells_of(TINY, tmp_path)
    cell = next(cell for cell in cells.all if cell.is_llm)
    log = cells.run_folder(cell).log
    log.parent.mkdir(parents=True)
    log.write_text(
        '{"step": 0, "seconds": 5}\n{"step": 1, "seconds": 2}\n{"step": 2, "seconds": 2}\n'
    )
    assert estimate(cells, [(cell, TEST)]) == (2.0 * cell.steps, 2.0 * cell.steps, [(cell, TEST)])
