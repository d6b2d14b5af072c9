"""Two places that both went on with a grid."""

import shutil

import numpy as np
import pytest
from made_results import cells, make_results

from tca4rec_jax.errors import UserError
from tca4rec_jax.experiments.merging import take_over
from tca4rec_jax.experiments.results import FILE, RowRanks, read_lines
from tca4rec_jax.lease import LeaseError, only_writer
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.training.run_folder import RunFolder


def gains_more(cell):
    return 1.0 + (cell.alpha or 0.0)


@pytest.fixture
def places(tmp_path):
    """(here, there): seed 0 was done in both, with other results, 1 here, 2 there."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    make_results(here, cells(seeds=(0, 1)))
    make_results(there, cells(seeds=(0, 2)), gain=gains_more)
    return here, there


def run(workdir, name, *steps, made_from="a", logged=0):
    """A run with checkpoints."""
    found = RunFolder.of(workdir / "movielens", name)
    for step in steps:
        (found.checkpoints / str(step)).mkdir(parents=True)
    found.path.mkdir(parents=True, exist_ok=True)
    Provenance("LLM run", "train", {"llm": made_from}).save(found.path)
    lines = (f'{{"step": {step}, "seconds": 1}}\n' for step in range(max(*steps, logged, 0)))
    found.log.write_text("".join(lines))
    return found


def test_lines_that_are_not_here_are_appended_and_the_others_stay(places):
    here, there = places
    mine, theirs = read_lines(here), read_lines(there)
    text = (here / FILE).read_text()
    ranks = {of: RowRanks.read(here / line.ranks).nll_RxT for of, line in mine.items()}
    assert take_over(there, here) == len(theirs.keys() - mine.keys()) > 0
    assert read_lines(here) == theirs | mine
    assert (here / FILE).read_text().startswith(text)
    for of, line in read_lines(here).items():
        nll_RxT = RowRanks.read(here / line.ranks).nll_RxT
        expected = ranks[of] if of in ranks else RowRanks.read(there / line.ranks).nll_RxT
        np.testing.assert_array_equal(nll_RxT, expected)
    assert take_over(there, here) == 0
    assert read_lines(there) == theirs


def test_an_empty_place_takes_all_but_leases_and_what_was_cut_off(places, tmp_path):
    _, there = places
    run(there, "r", 5)
    for name in ("claims/.x.lease", "movielens/llm/.r.lease", "rows/.y.npz.host.1.partial"):
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).touch()
    take_over(there, tmp_path / "new")
    (there / "claims" / ".x.lease").unlink()
    (there / "claims").rmdir()
    (there / "movielens/llm/.r.lease").unlink()
    (there / "rows/.y.npz.host.1.partial").unlink()
    files = [
        {path.relative_to(one) for path in one.rglob("*")} for one in (there, tmp_path / "new")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("here", "there", "taken"),
    [
        ({"steps": (5,)}, {"steps": (5, 10)}, True),
        ({"steps": (5, 10)}, {"steps": (5,)}, False),
        ({"steps": (5,), "made_from": "b"}, {"steps": (10,)}, False),
        ({"steps": (), "logged": 20}, {"steps": (10,)}, False),  # done, checkpoints deleted
        ({"steps": (), "made_from": "b"}, {"steps": (10,)}, True),  # begun
    ],
)
def test_the_run_that_is_further_is_taken_whole(here, there, taken, places):
    mine, theirs = (
        run(place, "r", *one.pop("steps"), **one)
        for place, one in zip(places, (dict(here), dict(there)), strict=True)
    )
    before = mine.saved_steps, mine.log.read_text()
    take_over(places[1], places[0])
    after = theirs.saved_steps, theirs.log.read_text()
    assert (mine.saved_steps, mine.log.read_text()) == (after if taken else before)


def test_a_run_that_is_being_trained_is_not_replaced(places):
    mine, _ = run(places[0], "r", 5), run(places[1], "r", 10)
    with only_writer(mine.path), pytest.raises(LeaseError):
        take_over(places[1], places[0])
    assert mine.saved_steps == [5]


def test_parts_are_taken_whole_and_not_mixed(places):
    here, there = places
    for place, names in (
        (here, ("cf/ease/a", "data/a")),
        (there, ("cf/ease/b", "cf/sasrec/b", "data/b")),
    ):
        for name in names:
            path = place / "movielens" / name
            path.parent.mkdir(parents=True)
            path.touch()
    take_over(there, here)
    found = {str(path.relative_to(here)) for path in (here / "movielens").rglob("[ab]")}
    assert found == {f"movielens/{name}" for name in ("cf/ease/a", "cf/sasrec/b", "data/a")}


def test_another_folder_that_is_not_there_or_damaged_is_named(places):
    here, there = places
    (there / FILE).write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        take_over(there, here)
    shutil.rmtree(there)
    with pytest.raises(UserError, match="there: no such work directory"):
        take_over(there, here)
