"""The work on a tiny grid of made data, in this process."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_grid

from tca4rec_jax.config import default_config
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.experiments.analyses import speed_table, validation_curve
from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.grid import load_grid
from tca4rec_jax.experiments.measures import AGREEMENT, FLUENCY
from tca4rec_jax.experiments.page_cells import examples, how_they_learned
from tca4rec_jax.experiments.results import (
    CF,
    FILE,
    POPULAR,
    TEST,
    VALIDATION,
    Cell,
    read_lines,
)
from tca4rec_jax.experiments.runner import run_grid
from tca4rec_jax.experiments.setups import Results
from tca4rec_jax.experiments.tables import aligned_against_plain
from tca4rec_jax.experiments.work import Job, Work
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.training.validation import validations_of

TINY = tiny_grid.ROOT / "configs" / "experiments" / "tiny.py"
SMALL = "recommender=ids,alpha=(0,0.3),seed=0,guidance=0,ids.validation.every=3"


@pytest.fixture(scope="module")
def argument(tmp_path_factory):
    return tiny_grid.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, argument):
    """With the lines of the grid."""
    path = tmp_path_factory.mktemp("W")
    grid = load_grid(f"{TINY}:{argument},{SMALL},cf=bpr_mf")
    run_grid(dataclasses.replace(grid, keep_checkpoints=True), path)
    return path


def test_what_an_llm_writes_alone_is_measured_on_both_splits(workdir):
    lines = read_lines(workdir)
    alone = {of for of in lines if of[0].is_llm}
    assert {of for of, line in lines.items() if FLUENCY in line.metrics} == alone
    assert {split for _, split in alone} == {VALIDATION, TEST}


def test_runs_that_were_validated_have_a_speed(workdir):
    results = Results.read(workdir)
    question = aligned_against_plain(results)
    (setup,) = question.compared
    curve = validation_curve(results, setup)
    assert curve.steps == [3, 6]
    (line,) = results.of_setup(setup, TEST)
    log = validations_of(read_json_lines(workdir / line.run / "log.jsonl"))
    assert curve.nll_SxN.tolist() == [[log[step]["nll"] for step in (3, 6)]]
    assert line.seconds["train"] > log[3]["seconds"] + log[6]["seconds"]
    assert [*speed_table(results, question)] == ["movielens, ids, bpr_mf"]


def test_a_ranking_that_a_killed_process_has_paid_for_counts(workdir, argument, tmp_path):
    """It is killed between the ranking and the line."""
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    of = next(of for of in read_lines(tmp_path) if of[0].alpha and of[1] == TEST)
    for path in (tmp_path / "movielens" / "evaluation").glob("*.npz"):
        saved = dict(np.load(path))
        assert 0.0 < saved["seconds"] < 500.0
        np.savez(path, **saved | {"seconds": 1000.0})
    (tmp_path / FILE).unlink()
    work = Work(Cells(load_grid(f"{TINY}:{argument},{SMALL},cf=bpr_mf"), tmp_path))
    work.do(Job("again", (of[0],), TEST))
    assert 1000.0 < read_lines(tmp_path)[of].seconds["evaluate"] < 1500.0


def test_the_report_has_curves_and_rows_of_what_the_work_left(workdir):
    results = Results.read(workdir)
    learned = [*how_they_learned(results)]
    assert [one.title for one in learned] == ["Training", "movielens, ids"]
    pictures, *tables = learned[1].blocks
    assert [one.alt.partition(" over ")[0] for one in pictures.pictures] == [
        "loss",
        "nll_per_title",
        "grad_norm",
        "validation/nll",
    ]
    assert len(tables) == 4  # and no word of logs that are gone
    first, *below = examples(results)
    assert first.title == "Examples: movielens, ids"
    assert "Lists of bpr_mf, alpha = 0.3, seed 0" in first.blocks[0].text
    captions = [block.caption for block in below[1].blocks]
    assert captions[1:] == [
        f"{label} recommends" for label in ("CF model", "alpha = 0", "bpr_mf, alpha = 0.3")
    ]


def test_cf_lines_say_which_items_were_one_title():
    """By the trie of the first recommender: of titles, or of ids that tell items apart."""

    def inputs(*sequences):
        experiment = SimpleNamespace(
            config=default_config(),
            data=SimpleNamespace(
                catalogue=Catalogue(tuple("abc"), tuple("ABB")),
                splits={"train_sequences": SimpleNamespace(content_hash=str)},
            ),
            item_filter=ItemFilter(np.ones(3, bool)),
            trie=ItemTrie.build(sequences),
        )
        rows = SimpleNamespace(inputs=dict)
        return Work(None)._cf_inputs(experiment, rows, Cell("d", POPULAR))

    by_title, by_id = inputs([1, 3], [2, 3], [2, 3]), inputs([1, 3], [2, 3], [2, 4])
    assert {name for name in by_title if by_title[name] != by_id[name]} == {"items of one title"}
    assert by_title == inputs([2, 3], [1, 3], [1, 3])  # leaves of another order
    assert by_id == inputs([2, 4], [1, 3], [2, 3])
    assert by_id["items of one title"] is None  # older lines, which do not say it, hold still


def agreements(workdir):
    """{(cell, split): the CF models that the agreement of an LLM is known with}."""
    lines = Results.read(workdir).lines
    return {of: {*lines[of].metrics.get(AGREEMENT, {})} for of in lines if of[0].is_llm}


def test_lists_agree_with_a_cf_model_that_comes_later_as_with_one_that_was_there(
    workdir, argument, tmp_path
):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    assert {*map(frozenset, agreements(tmp_path).values())} == {frozenset({"bpr_mf"})}
    before = (tmp_path / FILE).read_bytes()
    grid = load_grid(f"{TINY}:{argument},{SMALL},cf=(bpr_mf,popularity)")
    work = Work(Cells(grid, tmp_path))
    cf = Cell("movielens", CF, "popularity")
    for split in (VALIDATION, TEST):
        work.do(Job("popularity", (cf,), split))
    both = agreements(tmp_path)
    assert {*map(frozenset, both.values())} == {frozenset({"bpr_mf", "popularity"})}
    assert (tmp_path / FILE).read_bytes().startswith(before)  # no line is computed again
    written = Results.read(tmp_path)
    shutil.rmtree(tmp_path / "agreement")  # as of lines that were there before it was measured
    Work(Cells(grid, tmp_path)).measure_agreement()
    assert Results.read(tmp_path).lines == written.lines
