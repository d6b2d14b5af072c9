"""Two devices under one service: threads that search beside each other."""

from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from tiny_workdir import make_config, make_workdir

from tca4rec_jax.experiment import Experiment
from tca4rec_jax.serving.model import Limits, ServedModel


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])  # each has a model, or they share one
def test_lists_and_explanations_are_those_of_one_thread(tmp_path, tensor):
    assert jax.device_count() == 2
    make_workdir(tmp_path)
    config = make_config(tmp_path, "any")
    config.mesh.tensor = tensor
    config.inference.batch_size = 2
    model = ServedModel(Experiment(config, tmp_path), "", Limits())
    assert (model.batch_sizes[0], model._experiment.mesh.size) == (2 // tensor, 2)
    histories = [["0", "1"], ["cc", "4", "5"]]
    searched = model.lists_after(histories, 3, 2.0, {})
    explained = [model.explanation_of(one, 3, 2.0, {}, leave_one_out=False) for one in histories]
    work = [searched, *explained] * 6

    alone = [model.run(*one) for one in work[:3]]
    with ThreadPoolExecutor(3) as threads:
        beside = list(threads.map(lambda one: model.run(*one), work))
        for number, found in enumerate(beside):
            assert found == alone[number % 3]
        with model._devices:  # of another thread that searches or warms up
            found = threads.submit(model.run, *searched)
            if tensor == 2:
                with pytest.raises(TimeoutError):
                    found.result(0.5)
            else:
                assert found.result(60) == alone[0]
        assert found.result(60) == alone[0]
