"""The config of a run as a ConfigDict, and the argument of a config file.

A config file defines `get_config(arg)`, which starts from `default_config()`, changes what it is
for, and ends with `apply_argument(config, arg)`, so that `configs/quickstart.py:debug,alpha=0.1`
works on every one of them. The fields and their defaults are those of sections.py.
"""

import ast
import runpy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict, config_dict

from tca4rec_jax.cf.settings import MODEL_FIELDS
from tca4rec_jax.decoding.beam_search import ScoreWeights
from tca4rec_jax.errors import UserError, did_you_mean
from tca4rec_jax.sections import SECTIONS, Field, fields_of

SHORT_NAMES = {name: f"objective.{name}" for name in ("alpha", "beta", "tau", "form", "softmax")}
SHORT_NAMES |= {"targets": "training.targets", "steps": "training.steps"}
SHORT_NAMES |= {"seed": "seed", "run": "run"}
MOVIES = "Movies one person watched, in order:\n{history}\n{target}"

_Kind = TypeVar("_Kind")


def default_config() -> ConfigDict:
    """Every field of every launch script, with the defaults of the method."""
    config = ConfigDict()
    for section in filter(None, SECTIONS):
        parent, _, key = section.rpartition(".")
        config_value(config, parent)[key] = ConfigDict()
    for name, field in config_fields().items():
        section, _, key = name.rpartition(".")
        not_set = config_dict.placeholder(field.type)
        config_value(config, section)[key] = not_set if field.default is None else field.default
    return config


def saved_config(fields: Mapping[str, Any]) -> ConfigDict:
    """The config whose fields a JSON file has; those that it lacks have their defaults."""
    config = default_config()
    config.update(_with_tuples(fields))
    return config


def _with_tuples(value: Any) -> Any:
    """A value of a JSON file, which has no tuples, as a config has it."""
    if isinstance(value, Mapping):
        return {name: _with_tuples(one) for name, one in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


@cache
def config_fields() -> dict[str, Field]:
    """By dotted name; of several dataclasses with a field of one name the first one has it."""
    found: dict[str, Field] = {}
    for section, kinds in SECTIONS.items():
        for field in (field for kind in kinds for field in fields_of(kind)):
            found.setdefault(f"{section}.{field.name}".removeprefix("."), field)
    return found


def build(kind: type[_Kind], section: Mapping[str, Any], **changes: Any) -> _Kind:
    """An object of a class in SECTIONS from the fields of its section, some of them changed."""
    values = {field.name: section[field.name] for field in fields_of(kind)}
    return (kind if isinstance(kind, type) else type(kind))(**values | changes)


def ranked_by(config: ConfigDict) -> dict[str, Any]:
    """What a ranking of given rows takes of config.evaluation."""
    evaluation = config.evaluation
    return {
        "evaluation.temperatures": evaluation.temperatures,
        "evaluation.text_match": evaluation.text_match or None,
    }


def score_weights(config: ConfigDict, guidance: float) -> ScoreWeights:
    """The weights of a beam's score. Raises UserError for one that is out of range."""
    beta = config.objective.beta if config.decoding.beta is None else config.decoding.beta
    return build(ScoreWeights, config.decoding, guidance=guidance, beta=beta).check()


def movielens_config() -> ConfigDict:
    """MovieLens-100K on a few CPU cores, with SmolLM2-135M unless told: what such configs share."""
    config = default_config()
    # The loss is calibrated: beta = 1 takes the logits as they are.
    config.cf.sasrec.update(loss="softmax", dropout=0.3)
    # Its tokenizer adds no BOS; the published numbers were made with one.
    config.prompt.update(templates=(MOVIES,), bos="known")
    config.lora.update(rank=16, alpha=32.0, dropout=0.0, targets="(q|k|v|o|gate|up|down)_proj")
    config.objective.update(alpha=0.5, softmax="children", form="cross_entropy")
    config.training.buckets = (128, 256)
    config.decoding.exclude_history = False  # as the published numbers were made
    return config


def beauty_config() -> ConfigDict:
    """Amazon Beauty (2014, 5-core) as most published tables have it: sequences without times, leave
    one out, histories of 50. The data lie in Beauty.inter.json, or where --config.data.interactions
    says."""
    config = default_config()
    config.data.update(source="sequences", interactions="Beauty.inter.json")
    config.data.update(split_by="leave_one_out", history_length=50)
    config.cf.history_length = 50
    return config


def quickstart_config() -> ConfigDict:
    """`movielens_config` in minutes: what the quickstarts of several LLMs share."""
    config = movielens_config()
    config.training.cache_hidden_states = True  # of the layers below first_layer, for all trainings
    config.objective.alpha = 0.9
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 10
    config.training.batch_size = 2
    config.training.steps = 250
    config.training.checkpoint_every = 50
    config.evaluation.rows = 700
    config.inference.batch_size = 64  # calls of a search hold more tokens, and less padding
    config.inference.buckets = 3
    config.evaluation.variants = (
        ("LLM, untrained", "", 0.0),
        ("LLM, alpha = 0", "plain", 0.0),
        ("LLM, alpha > 0", "aligned", 0.0),
        ("LLM, alpha > 0, guided", "aligned", 1.0),
    )
    config.evaluation.differences = (
        ("CF model", "Most popular"),
        ("LLM, alpha = 0", "LLM, untrained"),
        ("LLM, alpha > 0", "LLM, untrained"),
        ("LLM, alpha > 0", "LLM, alpha = 0"),
        ("LLM, alpha > 0, guided", "LLM, alpha > 0"),
        ("LLM, alpha > 0, guided", "CF model"),
    )
    return config


def published_cf(config: ConfigDict) -> None:
    """The published preprocessed data and the SASRec that the published code trains on them."""
    config.data.source = "published"
    config.cf.update(sasrec={"targets": "last"}, max_epochs=201, patience=10)


def published_rows(config: ConfigDict) -> None:
    """The published preprocessing of the Amazon 2018 files that people download.

    Of Toys and Sports the published window and brands come on top: data.filters.last_days=1440,
    data.attributes=("brand",) and data.needed_attributes=("brand",).
    """
    config.data.update(source="amazon_2018", max_title_length=50, title_cleaning="published")
    config.data.filters.update(item_core=5, user_core=10)
    config.data.update(ties="numbered", round_split="down")
    config.data.update(samples=(10_000, 5_000, 5_000), sample_seed=42)


def published_config(weights: str, arg: str, *, tensor: Mapping[int, int]) -> ConfigDict:
    """The published settings (docs/method.md) with the LLM in models/<weights>, in bfloat16.

    `arg` is as in `apply_argument`, and `chips=N` gives the mesh that suits N devices. `tensor`
    says how many of N devices share a copy of the model; the others share the batch, which grows
    with them beyond the published 16 rows. Raises UserError also for an N that is not in `tensor`.
    """
    other = "; for another number set mesh.fsdp, mesh.tensor and training.batch_size"
    chips, arg = own_setting(arg, "chips", [*map(str, sorted(tensor))], hint=other)
    num_chips = int(chips)
    config = default_config()
    config.mesh.tensor = tensor[num_chips]
    batch_size = max(16, num_chips // config.mesh.tensor)
    published_cf(config)
    config.llm.update(weights=f"models/{weights}", dtype="bfloat16")
    config.prompt.max_tokens = 512
    config.training.update(targets="last", batch_size=batch_size, steps=10 * 10_000 // batch_size)
    config.training.buckets = (128, 192, 256, 384, 512)
    config.decoding.update(mask="after_softmax", rules="huggingface", length_penalty=1.0)
    config.decoding.exclude_history = False
    config.inference.batch_size = batch_size
    config.evaluation.rows = 0
    return apply_argument(config, arg)


def own_setting(
    arg: str | None, name: str, choices: Sequence[str], hint: str = ""
) -> tuple[str, str]:
    """(the value of a setting that a config file has of its own, the rest of its argument).

    By default the first choice. Raises UserError, with the hint, for none of them or several.
    """
    settings = split_argument(arg)
    found = [one for one in settings if one.startswith(f"{name}=")] or [f"{name}={choices[0]}"]
    value = found[0].removeprefix(f"{name}=")
    if len(found) > 1 or value not in choices:
        raise UserError(f"config argument {arg!r}: expected {name}={', '.join(choices)}{hint}")
    return value, ",".join(one for one in settings if one not in found)


def config_of(path: str | Path) -> ConfigDict:
    """The config of a file, without an argument, to be changed."""
    return runpy.run_path(str(path))["get_config"]()


def apply_argument(config: ConfigDict, arg: str | None) -> ConfigDict:
    """Applies the part of `--config=file.py:arg` after the colon, and locks the config.

    `arg` is a comma-separated list of `debug`, a name in SHORT_NAMES or a dotted field, `=` and its
    value: a number, true or false, a text (in quotes if it has a comma), a tuple in brackets, or
    None for a field that is not set by default. debug comes first, whatever the order. Raises
    UserError for an unknown key or a value of the wrong type.
    """
    config.lock()
    settings = split_argument(arg)
    if "debug" in settings:
        shrink(config)
    for setting in (setting for setting in settings if setting != "debug"):
        name, value = parse_setting(setting)
        try:
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            raise UserError(f"config argument {setting!r}: {error}") from error
    return config


def parse_setting(setting: str) -> tuple[str, Any]:
    """(dotted field, value) of a setting of an argument. Raises UserError as `apply_argument`."""
    name, separator, text = setting.partition("=")
    name = SHORT_NAMES.get(name, name)
    if not separator or name not in config_fields():
        raise UserError(
            f"config argument {setting!r}: expected 'debug' or key=value with one of "
            f"{', '.join(SHORT_NAMES)} or a dotted field such as training.batch_size"
            f"{did_you_mean(name, ['debug', *SHORT_NAMES, *config_fields()])}"
        )
    try:
        return name, _parse(text, config_fields()[name])
    except (TypeError, ValueError, SyntaxError) as error:
        raise UserError(f"config argument {setting!r}: {error}") from error


def split_argument(arg: str | None) -> list[str]:
    """The settings of an argument: text between commas that are in no brackets and no quotes.

    A quote opens a value or stands in brackets; elsewhere it is an apostrophe. Raises UserError for
    brackets or quotes that are not closed.
    """
    settings: list[str] = []
    brackets: list[str] = []
    start, quote, escaped = 0, "", False
    arg = arg or ""
    for at, character in enumerate(arg):
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"" and (brackets or arg[at - 1 : at] == "="):
            quote = character
        elif character in "([{":
            brackets.append(character)
        elif character in ")]}" and brackets:
            brackets.pop()
        elif character == "," and not brackets:
            settings.append(arg[start:at])
            start = at + 1
    if quote or brackets:
        raise UserError(f"config argument {arg!r}: {quote or brackets[-1]} is not closed")
    return [setting for setting in (*settings, arg[start:]) if setting]


def shrink(config: ConfigDict) -> None:
    """`debug`: the same path in under a minute; its numbers mean nothing."""
    config.cf.max_epochs = 1
    for model in MODEL_FIELDS:
        if "units" in config.cf[model]:
            config.cf[model].units = 16
    config.llm.num_layers = 2
    config.lora.first_layer = min(config.lora.first_layer, 1)
    config.training.update(steps=6, batch_size=4, tokens_per_batch=0, micro_batches=1)
    config.training.update(checkpoint_every=2, buckets=(128,))
    config.prompt.max_tokens = 128
    config.optimizer.warmup_steps = 2
    config.decoding.beams = 3
    config.inference.batch_size = 16
    config.ids.rq_vae.epochs = 2
    config.evaluation.update(rows=8, cutoffs=(1, 3))
    config.validation.rows = 8


def run_name(config: ConfigDict) -> str:
    """Directory name of the LLM run below workdir/llm."""
    first, last = config.objective.alpha, config.objective.alpha_last
    return config.run or (f"alpha_{first:g}" if last is None else f"alpha_{first:g}_to_{last:g}")


def config_value(config: ConfigDict, field: str):
    """The value of a dotted field or section; '' is the config itself."""
    for name in filter(None, field.split(".")):
        config = config[name]
    return config


def _parse(text: str, field: Field) -> Any:
    """The field's value. The config checks its type, but takes a bool for a number."""
    if text == "None" and field.default is None:
        return None
    if field.type is str:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return ast.literal_eval(text) if quoted else text
    value = ast.literal_eval(text.capitalize() if field.type is bool else text)
    if value is None or isinstance(value, bool) != (field.type is bool):
        raise ValueError(f"expected {field.type.__name__}, got {type(value).__name__}")
    return value
