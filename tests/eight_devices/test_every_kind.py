"""Every kind of recommender has the loss of one device on meshes of eight."""

import numpy as np
import pytest
from recommenders.kinds import KINDS, experiment_of, first_batches, make_workdir_of
from tiny_workdir import make_workdir

from tca4rec_jax.train import TrainStep, load_batches


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_workdir(path)
    return path


TRAINED = [kind for kind in KINDS if kind != "bigrec, grounded"]  # which is trained as bigrec
# Each has a loss, vectors, rows of the embedding or trained weights that the others have not.
WITHOUT_FSDP = ("titles", "yes or no", "llara", "ids, new rows", "every weight")


@pytest.mark.parametrize("kind", TRAINED)
def test_meshes_have_the_loss_of_one_device(kind, tiny, tmp_path):
    """All three axes, in micro-batches, too; then rows alone."""
    workdir = tmp_path / "workdir"
    make_workdir_of(kind, tiny, workdir)
    expected = first_losses(kind, workdir, 1, 1, 1, 1)
    for sizes in [(2, 2, 2, 2), (8, 1, 1, 1)][: 1 + (kind in WITHOUT_FSDP)]:
        np.testing.assert_allclose(first_losses(kind, workdir, *sizes), expected, rtol=1e-5)


def first_losses(kind, workdir, data, fsdp, tensor, micro_batches):
    """Of two steps: the second one's has the first one's gradient in it."""
    mesh = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
    training = {"training__batch_size": 8, "training__micro_batches": micro_batches}
    training["training__steps"] = 10  # of which some read vectors with a curriculum, too
    experiment = experiment_of(kind, workdir, "any", **training, **mesh)
    batches = load_batches(experiment)
    graph, state, base = experiment.initial_state()
    step = TrainStep(experiment, graph, state, base, batches.cf_items)
    losses = []
    for number in first_batches(batches, 2):
        state, metrics = step(state, batches(number))
        losses.append(float(metrics.loss))
    return losses
