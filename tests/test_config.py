"""Configs: frozen values, strict typed arguments, debug on every config file, documented fields."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tca4rec_jax.config import (
    SHORT_NAMES,
    apply_argument,
    build,
    config_fields,
    config_value,
    default_config,
    run_name,
    score_weights,
    split_argument,
)
from tca4rec_jax.config_checks import validate
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.summary import check_cutoffs
from tca4rec_jax.llm.architectures import ARCHITECTURES, architecture
from tca4rec_jax.llm.lora import LoRAConfig
from tca4rec_jax.ranges import range_words

ROOT = Path(__file__).parents[1]
GRIDS = ROOT / "configs" / "experiments"  # tests/experiments/test_grid.py
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if path.parent != GRIDS)
PUBLISHED = [path for path in CONFIGS if "published_config(" in path.read_text()]
FROZEN = json.loads((ROOT / "tests" / "goldens" / "configs.json").read_text())


def get_config(path, arg=""):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def values(config):
    return {name: config_value(config, name) for name in config_fields()}


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
    validate(config)
    for one in (config, get_config(path)):
        check_cutoffs(one)


@pytest.mark.parametrize("name", FROZEN)
def test_no_value_of_a_config_changes_unnoticed(name):
    """A field that came later has its default in these configs."""
    found, defaults = values(get_config(ROOT / name)), values(default_config())
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(defaults)) | FROZEN[name]


def test_own_data_take_nothing_over_that_only_reproduces_movielens():
    found, defaults = values(get_config(ROOT / "configs/own_data.py")), values(default_config())
    for name in ("decoding.exclude_history", "prompt.bos"):
        assert found[name] == defaults[name], name


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_config_evaluates_as_published(path):
    """method.md: 10 beams, masked after the softmax, means over the length, every test row."""
    config = get_config(path)
    search = build(SearchConfig, config.decoding)
    assert (search.beams, search.mask, search.rules) == (10, "after_softmax", "huggingface")
    assert score_weights(config, guidance=0.0) == ScoreWeights(0.0, 1.0, 1.0, length_penalty=1.0)
    assert (config.evaluation.split, config.evaluation.rows) == ("test", 0)
    assert config.inference.checkpoint == "last"
    assert config.evaluation.cutoffs == (1, 3, 5, 10)
    assert build(LoRAConfig, config.lora) == LoRAConfig(8, 16.0, 0.05, "(q|k|v|o)_proj")
    assert architecture(config.llm.weights) in ARCHITECTURES.values()


def test_the_run_is_named_by_alpha_unless_told():
    assert run_name(apply_argument(default_config(), "alpha=0.5")) == "alpha_0.5"
    rising = apply_argument(default_config(), "alpha=0,objective.alpha_last=0.5")
    assert run_name(rising) == "alpha_0_to_0.5"
    assert run_name(apply_argument(default_config(), "run=mine,alpha=1")) == "mine"


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "."])
def test_a_run_does_not_leave_its_work_directory(name):
    with pytest.raises(UserError, match="is .*: expected .*the name of a folder"):
        validate(apply_argument(default_config(), f"run={name}"))
    config = default_config()
    config.evaluation.variants = (("LLM", name, 0.0),)
    with pytest.raises(UserError, match="is .*: expected .*the name of a folder"):
        validate(config)
    with pytest.raises(UserError, match="is .*: expected .*the name of a folder"):
        Recommender.load("work", name)


def test_the_temperature_of_guidance_is_that_of_the_objective_unless_told():
    config = apply_argument(default_config(), "beta=2")
    assert score_weights(config, 1.0) == ScoreWeights(1.0, 2.0, 1.0, 0.0)
    config = apply_argument(config, "decoding.beta=3")
    assert score_weights(config, 1.0).beta == 3.0
    with pytest.raises(UserError, match="temperature is 0.0: expected 0.000001 to"):
        score_weights(apply_argument(config, "decoding.temperature=0"), 1.0)


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        ("training.buckets=(64,128),steps=3", {"training.buckets": (64, 128), "training.steps": 3}),
        ("training.buckets=[64]", {"training.buckets": (64,)}),
        ('prompt.separator="a, b",seed=2', {"prompt.separator": "a, b", "seed": 2}),
        ("prompt.separator='it\\'s, \"so\"'", {"prompt.separator": 'it\'s, "so"'}),
        ("prompt.separator=User's,seed=2", {"prompt.separator": "User's", "seed": 2}),
        ("prompt.end='\\n'", {"prompt.end": "\n"}),
        ("lora.targets=(q|k)_proj", {"lora.targets": "(q|k)_proj"}),
        ("decoding.exclude_history=true", {"decoding.exclude_history": True}),
        ("decoding.exclude_history=False", {"decoding.exclude_history": False}),
        ("run=None,llm.num_layers=4", {"run": None, "llm.num_layers": 4}),
        ("tau=2,cf.ease.regularisation=1", {"objective.tau": 2.0, "cf.ease.regularisation": 1.0}),
        (
            "evaluation.variants=((\"LLM, it's\",'a',0),),evaluation.rows=5",
            {"evaluation.variants": (("LLM, it's", "a", 0),), "evaluation.rows": 5},
        ),
        ("data.split=(.5,.25,.25)", {"data.split": (0.5, 0.25, 0.25)}),
    ],
)
def test_arguments_are_parsed_by_the_type_of_the_field(arg, expected):
    config = apply_argument(default_config(), arg)
    found = {name: config_value(config, name) for name in expected}
    assert found == expected
    assert [*map(type, found.values())] == [*map(type, expected.values())]


def of_type(value):
    """Values that a field may have whose default is of this type."""
    text = st.text("ab ,=|'\"()[]{}\\\né", max_size=8)
    return {
        int: st.integers(-9, 9),
        bool: st.booleans(),
        float: st.floats(-9, 9),
        str: text,
        tuple: st.lists(st.one_of(text, st.integers(-9, 9)), max_size=3).map(tuple),
    }[type(value)]


SETTINGS = st.dictionaries(
    st.sampled_from([name for name, field in config_fields().items() if field.default is not None]),
    st.integers(0, 2**32),
    max_size=4,
).flatmap(
    lambda chosen: st.fixed_dictionaries(
        {name: of_type(config_value(default_config(), name)) for name in chosen}
    )
)


@given(SETTINGS)
def test_whatever_repr_writes_is_read(settings):
    arg = ",".join(f"{name}={value!r}" for name, value in settings.items())
    assert split_argument(arg) == [f"{name}={value!r}" for name, value in settings.items()]
    config = apply_argument(default_config(), arg)
    assert values(config) == values(default_config()) | settings


@pytest.mark.parametrize(
    "arg",
    [
        "nothing",
        "colour=red",
        "objective=1",
        "training.batch_size=many",
        "training.batch_size=True",
        "training.buckets=64",
        "alpha=",
        "steps=0.5",
        "steps=None",
        "training.buckets=(64",
        "prompt.separator='a",
        "decoding.exclude_history=yes",
    ],
)
def test_unknown_keys_and_wrong_types_are_errors(arg):
    with pytest.raises(UserError, match="config argument"):
        apply_argument(default_config(), arg)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("llm.train=half", "llm.train is 'half'"),
        ("training.targets=first", "training.targets is 'first': expected one of"),
        ("form=hinge", "objective.form is 'hinge'"),
        ("training.steps=0", "training.steps is 0"),
        ("lora.rank=0", "rank"),
        ("decoding.beams=0", "beams"),
        ("decoding.length_penalty=-1.0", "length_penalty"),
        ("data.source=mail", "data.source"),
        ("cf.model=svd", "cf.model is 'svd'"),
        ("cf.sasrec.loss=mse", "cf.sasrec.loss is 'mse': expected one of"),
        ("cf.bert4rec.heads=3", "heads is 3: expected a divisor of its 64 units"),
        ("cf.lightgcn.negatives=0", "cf.lightgcn.negatives is 0: expected at least 1"),
        ("llm.quantise=int2", "llm.quantise is 'int2'"),
        ("inference.checkpoint=first", "inference.checkpoint is 'first': expected one of"),
        ("llm.dtype=bf16", "llm.dtype is 'bf16': expected one of"),
        ("llm.attention=flash", "llm.attention is 'flash': expected one of"),
        ("evaluation.split=tests", "evaluation.split is 'tests': expected one of"),
        ("optimizer.decay_steps=9", "decay_steps is 9, .* expected at least 1000, training.steps"),
        ("optimizer.epsilon=0", "optimizer.epsilon is 0.0: expected above 0"),
        ("seed=4294967296", "seed is 4294967296: expected 0 to 4294967295"),
        ("beta=1e-39", "objective.beta is 1e-39: expected 0.000001 to"),
        ("training.buckets=(128,64)", r"training.buckets is \(128, 64\): expected ascending"),
        ("training.buckets=(0,64)", r"training.buckets is \(0, 64\): expected at least 1"),
        ("training.buckets=(64.5,)", "expected a whole number"),
        ("training.profile_steps=(3,3)", "profile_steps is .*: expected ascending"),
        ("training.profile_steps=(3,)", "profile_steps is .*: expected 2 values"),
        ("data.split=(.8,.2,0)", "data.split is .*: expected three above 0 that sum to 1"),
        ("data.split=(.8,.1,.2)", "data.split is .*: expected three above 0 that sum to 1"),
        ("data.split=(.8,.2)", "data.split is .*: expected 3 values"),
        ("data.min_history=11", "data.min_history is 11: expected at most data.history_length, 10"),
        ("data.path=gs://bucket/x", "data.path is 'gs://bucket/x': expected a local path"),
        ("evaluation.cutoffs=()", "evaluation.cutoffs is .*: expected at least one"),
        ("evaluation.cutoffs=(5,3)", "evaluation.cutoffs is .*: expected ascending"),
        ("evaluation.temperatures=()", "evaluation.temperatures is .*: expected at least one"),
        ("evaluation.variants=(('a',),)", "evaluation.variants is .*: expected 3 values"),
        ("evaluation.variants=(('a','b',-1.),)", "evaluation.variants is .*: expected at least 0"),
        ("lora.targets='('", r"lora.targets is '\(': expected a regular expression"),
        ("data.encoding=latin1000", "data.encoding is 'latin1000': expected a text encoding"),
        ("prompt.item=''", "prompt.item is '': expected a text that is not empty"),
        ("prompt.templates=()", r"prompt.templates is \(\): expected at least one"),
        ("prompt.templates=('{history}',)", "{history} once, then {target} once, at its end"),
        ("prompt.item='{title'", "prompt.item has '{title': expected '}'"),
        ("run=../x", "run is '../x': expected the name of a folder"),
        ("run=..", "run is '..': expected the name of a folder"),
    ],
)
def test_a_value_out_of_range_is_named(arg, message):
    with pytest.raises(UserError, match=message):
        validate(apply_argument(default_config(), arg))


NUMBERS = {name: field for name, field in config_fields().items() if field.type in (int, float)}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range(name):
    bad = {int: [-2], float: [-2.0, math.nan, math.inf]}[NUMBERS[name].type]
    for value in bad:
        config = default_config()
        config.update_from_flattened_dict({name: value})
        with pytest.raises(UserError, match=f"^{name} is {value}: expected "):
            validate(config)


def test_every_other_field_has_a_range_or_takes_anything():
    rest = {name: field for name, field in config_fields().items() if name not in NUMBERS}
    anything = {name for name, field in rest.items() if not range_words(field.annotation)}
    assert {name for name in anything if rest[name].type is not bool} == {
        "cf.logits",  # a folder or a URL
        "llm.architecture",  # checked where the names are
        "recommender.name",
        "prompt.separator",
        "prompt.target",
        "prompt.end",
        "prompt.placeholder",
        "prompt.bos_token",
        "evaluation.variants",
        "evaluation.differences",
    }


def test_every_field_is_described_with_the_default_that_it_has():
    fields = config_fields()
    assert all(field.description.endswith(".") for field in fields.values())
    found = values(default_config())
    assert [(name, field.default) for name, field in fields.items()] == list(found.items())
    assert set(flat(default_config().to_dict())) == set(found)
    assert set(SHORT_NAMES.values()) <= set(found)


def flat(section, prefix=""):
    for key, value in section.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
