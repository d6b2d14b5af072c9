"""A made grid, written once; of its titles runs no log is left."""

import pytest
from made_results import make_data, make_logs, make_results

from tca4rec_jax.experiments.results import read_lines
from tca4rec_jax.experiments.setups import Results


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("made_grid")
    make_results(path)
    make_data(path)
    logged = [line for (cell, _), line in read_lines(path).items() if cell.recommender == "ids"]
    make_logs(path, logged, steps=300)
    return path


@pytest.fixture(scope="session")
def results(workdir):
    return Results.read(workdir)
