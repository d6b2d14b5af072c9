"""The work on a tiny grid of made data, in this process."""

import pytest
import tiny_grid

from tca4rec_jax.experiments.grid import load_grid
from tca4rec_jax.experiments.measures import FLUENCY
from tca4rec_jax.experiments.results import TEST, VALIDATION, read_lines
from tca4rec_jax.experiments.runner import run_grid

TINY = tiny_grid.ROOT / "configs" / "experiments" / "tiny.py"
SMALL = "recommender=ids,alpha=(0,0.3),seed=0,guidance=0"


@pytest.fixture(scope="module")
def argument(tmp_path_factory):
    return tiny_grid.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, argument):
    """With the lines of the grid."""
    path = tmp_path_factory.mktemp("W")
    run_grid(load_grid(f"{TINY}:{argument},{SMALL},cf=bpr_mf"), path)
    return path


def test_what_an_llm_writes_alone_is_measured_on_both_splits(workdir):
    lines = read_lines(workdir)
    alone = {of for of in lines if of[0].is_llm}
    assert {of for of, line in lines.items() if FLUENCY in line.metrics} == alone
    assert {split for _, split in alone} == {VALIDATION, TEST}
