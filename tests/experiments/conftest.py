"""A made grid, written once."""

import pytest
from made_results import make_results

from tca4rec_jax.experiments.setups import Results


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("made_grid")
    make_results(path)
    return path


@pytest.fixture(scope="session")
def results(workdir):
    return Results.read(workdir)
