"""The config argument: strict keys, typed values, and debug on every config file."""

import importlib.util
from pathlib import Path

import pytest

from tca4rec_jax.config import apply_argument, default_config, run_name

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.py"))


def get_config(path, arg=""):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_takes_debug_and_overrides(path):
    config = get_config(path, "debug,alpha=0.25,training.batch_size=6,steps=9")
    assert config.is_locked
    assert config.llm.num_layers == 2
    assert (config.objective.alpha, config.training.batch_size, config.training.steps) == (
        0.25,
        6,
        9,
    )
    assert set(config.keys()) == set(default_config().keys())


def test_the_run_is_named_by_alpha_unless_told():
    assert run_name(apply_argument(default_config(), "alpha=0.5")) == "alpha_0.5"
    assert run_name(apply_argument(default_config(), "run=mine,alpha=1")) == "mine"


@pytest.mark.parametrize(
    "arg",
    ["nothing", "colour=red", "objective=1", "training.batch_size=many", "alpha=", "steps=0.5"],
)
def test_unknown_keys_and_wrong_types_are_errors(arg):
    with pytest.raises(ValueError, match="config argument"):
        apply_argument(default_config(), arg)
