"""The fields of a run, their defaults, and the argument of a config file.

A config file defines `get_config(arg)`, which starts from `default_config()`, changes what it is
for, and ends with `apply_argument(config, arg)`, so that `configs/quickstart.py:debug,alpha=0.1`
works on every one of them.
"""

import ast
from collections.abc import Mapping

from ml_collections import ConfigDict

from tca4rec_jax.errors import UserError

SHORT_NAMES = {
    "alpha": "objective.alpha",
    "beta": "objective.beta",
    "tau": "objective.tau",
    "form": "objective.form",
    "softmax": "objective.softmax",
    "supervision": "training.supervision",
    "steps": "training.steps",
    "seed": "seed",
    "run": "run",
}


def default_config() -> ConfigDict:
    """Every field of every launch script, with the defaults of the method (method.md)."""
    return ConfigDict(
        {
            "seed": 0,
            "run": "",  # name of the LLM run below workdir/llm; '' names it by alpha
            # Devices along each axis (sharding.py); data = -1 takes what the others leave.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "data": {
                "source": "movielens_100k",  # or 'files', 'published'
                "path": "",  # 'published': the directory
                "interactions": "",  # 'files': CSV or Parquet
                "catalogue": "",
                "user_column": "user",
                "item_column": "item",
                "timestamp_column": "timestamp",
                "title_column": "title",
                "history_length": 10,  # items
                "min_history": 0,  # 0: only rows with a full history
                "split": (0.8, 0.1, 0.1),
                "seed": 0,
                "max_title_length": 100,  # characters
            },
            "cf": {
                "model": "sasrec",  # a key of MODELS in cf/models.py
                "weights": "",  # a PyTorch SASRec to read instead of training
                "units": 64,
                "blocks": 2,
                "heads": 1,
                "history_length": 10,
                "dropout": 0.3,
                # '', 0 and -1 stand for what the model's paper does.
                "loss": "",  # 'softmax', 'bce', 'bpr'
                "labels": "",  # 'all', 'last', 'target'
                "negatives": 0,
                "regularisation": -1.0,
                "learning_rate": 1e-3,
                "batch_size": 256,
                "max_epochs": 40,
                "patience": 6,
                "seed": 0,
                "filter_seen": False,  # leave a row's history out of its CF ranking
                "logits": "",  # where the stores are: a folder, a bucket; '': WORKDIR/cf/logits
                "dtype": "float32",  # of the stores; or 'bfloat16', 'float16'
                "top_k": 0,  # keep so many logits per row and a floor; 0 keeps all
            },
            "llm": {
                # A name in data/downloads.py, a .gguf file or a Hugging Face folder.
                "weights": "smollm2-135m-instruct",
                "architecture": "smollm2-135m",  # in llm/architectures.py: planned for, not loaded
                "num_layers": 0,  # keep only the first layers; 0 keeps all
                "dtype": "float32",
                "quantise": "",  # the layers' frozen weights to 'int8' or 'nf4' (4.5 bits)
                "train": "lora",  # the adapters; 'full': every weight, in float32
                "attention": "xla",  # of training; or 'cudnn' (GPU), 'splash' (TPU)
                "layer_loop": "scan",
                "remat": "products",  # or 'none', 'full'
            },
            "lora": {
                "rank": 8,
                "alpha": 16.0,
                "dropout": 0.05,
                "targets": "(q|k|v|o)_proj",
                "first_layer": 0,  # layers below it are not adapted and not differentiated
            },
            "prompt": {"prefix": "", "before_title": " ", "end": "\n", "max_tokens": 256},
            "objective": {
                "alpha": 0.1,
                "beta": 1.0,
                "tau": 1.0,
                "form": "log_expectation",  # or 'cross_entropy'
                "softmax": "vocabulary",  # or 'children' (MSL)
            },
            "optimizer": {
                "learning_rate": 1e-4,
                "warmup_steps": 20,
                "weight_decay": 0.01,
                "clip": 1.0,
            },
            "training": {
                "supervision": "sequence",  # or 'last', one target per row
                "batch_size": 16,
                "steps": 1000,
                "buckets": (64, 128, 192, 256),  # padded lengths, tokens
                "checkpoint_every": 100,
                "keep_checkpoints": 2,  # the latest so many, and the one of the lowest loss
                "watchdog_seconds": 1800.0,  # a step that takes longer is a hung one; 0: none is
                # What the layers below lora.first_layer make of a row is kept in the work directory
                # and not run again (llm.dtype, tokens x width: 0.6 MB a row of SmolLM2-135M).
                "keep_frozen_states": False,
                "profile_steps": (0, 0),  # [first, last): jax.profiler's record of them
            },
            "decoding": {
                "beams": 10,
                "score": "before_softmax",  # or 'after_softmax'
                "rules": "exact",  # or 'huggingface'
                "temperature": 1.0,
                "length_penalty": 0.0,
                "exclude_history": False,  # never recommend what the user already has
                "allow": "",  # a text file, one item id per line: nothing else is recommended
                "deny": "",  # the same: these are not recommended
            },
            "evaluation": {
                "split": "test",
                "rows": 400,  # sampled with the seed; 0 takes all
                # Of an LLM run, here and wherever a trained run is loaded; or 'best': the lowest
                # mean training loss since the checkpoint before.
                "checkpoint": "last",
                "batch_size": 16,
                "buckets": 2,  # padded prompt lengths, each compiled once
                "examples": 5,
                # The target's likelihood is reported at the best of them for each model.
                "temperatures": (1.0, 1.25, 1.5, 2.0, 3.0),
                # What the table compares: (label, LLM run or '' for the untrained LLM, guidance).
                "variants": (("LLM, untrained", "", 0.0),),
                # Pairs of labels whose difference is reported with its interval.
                "differences": (),
            },
        }
    )


def movielens_config() -> ConfigDict:
    """MovieLens-100K with SmolLM2-135M on a few CPU cores: what configs/ of that pair share."""
    config = default_config()
    config.cf.loss = "softmax"  # calibrated: beta = 1 takes the logits as they are
    config.prompt.prefix = "Movies one person watched, in order:\n"
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.0
    config.lora.targets = "(q|k|v|o|gate|up|down)_proj"
    config.objective.alpha = 0.5
    config.objective.softmax = "children"
    config.objective.form = "cross_entropy"
    config.training.buckets = (128, 256)
    return config


def published_cf(config: ConfigDict) -> None:
    """The published preprocessed data and the SASRec that the published code trains on them."""
    config.data.source = "published"
    config.cf.dropout = 0.5
    config.cf.labels = "target"
    config.cf.max_epochs = 201
    config.cf.patience = 10


def published_config(
    architecture: str, weights: str, arg: str, *, tensor: Mapping[int, int]
) -> ConfigDict:
    """The published settings (method.md) with a large LLM in bfloat16: what its config file shares.

    Args:
      architecture: a name in llm/architectures.py.
      weights: the model's name on the hub, whose files are expected in models/<name>.
      arg: as in `apply_argument`, and `chips=N` for the mesh that suits N devices.
      tensor: number of devices -> how many of them share a copy of the model (mesh.tensor); the
        others share the batch, which grows with them beyond the published 16 rows.

    Raises:
      UserError: as `apply_argument`, or a number of devices that is not in `tensor`.
    """
    settings = [part for part in (arg or "").split(",") if part]
    chips = [part.removeprefix("chips=") for part in settings if part.startswith("chips=")]
    if len(chips) > 1 or not set(chips) <= set(map(str, tensor)):
        raise UserError(
            f"config argument {arg!r}: expected chips={', '.join(map(str, tensor))}; for another "
            "number set mesh.fsdp, mesh.tensor and training.batch_size"
        )
    num_chips = int(chips[0]) if chips else min(tensor)
    copies = num_chips // tensor[num_chips]
    config = default_config()
    config.mesh.tensor = tensor[num_chips]
    published_cf(config)
    config.llm.architecture = architecture
    config.llm.weights = f"models/{weights}"
    config.llm.dtype = "bfloat16"
    config.prompt.max_tokens = 512
    config.training.supervision = "last"
    config.training.buckets = (128, 192, 256, 384, 512)
    config.training.batch_size = max(16, copies)
    config.training.steps = 10 * 10_000 // config.training.batch_size
    config.decoding.score = "after_softmax"
    config.evaluation.batch_size = max(16, copies)
    return apply_argument(
        config, ",".join(part for part in settings if not part.startswith("chips="))
    )


def apply_argument(config: ConfigDict, arg: str | None) -> ConfigDict:
    """Applies the part of `--config=file.py:arg` behind the colon, and locks the config.

    `arg` is a comma-separated list of `debug`, a name in SHORT_NAMES or a dotted field, `=` and its
    value.

    Raises:
      UserError: an unknown key or a value of the wrong type.
    """
    config.lock()
    settings = [part for part in (arg or "").split(",") if part]
    if "debug" in settings:
        shrink(config)
    for setting in settings:
        if setting == "debug":
            continue
        name, separator, text = setting.partition("=")
        field = SHORT_NAMES.get(name, name)
        if not separator or not _has_field(config, field):
            raise UserError(
                f"config argument {setting!r}: expected 'debug' or key=value with one of "
                f"{', '.join(SHORT_NAMES)} or a dotted field such as training.batch_size"
            )
        try:
            config.update_from_flattened_dict({field: _parse(text, config_value(config, field))})
        except (TypeError, ValueError, SyntaxError) as error:
            raise UserError(f"config argument {setting!r}: {error}") from error
    return config


def shrink(config: ConfigDict) -> None:
    """`debug`: the same path in under a minute; its numbers mean nothing."""
    config.cf.max_epochs = 1
    config.cf.units = 16
    config.llm.num_layers = 2
    config.lora.first_layer = min(config.lora.first_layer, 1)
    config.training.steps = 6
    config.training.batch_size = 4
    config.training.checkpoint_every = 2
    config.training.buckets = (128,)
    config.prompt.max_tokens = 128
    config.optimizer.warmup_steps = 2
    config.decoding.beams = 3
    config.evaluation.rows = 8
    config.evaluation.batch_size = 4


def run_name(config: ConfigDict) -> str:
    """Directory name of the LLM run below workdir/llm."""
    return config.run or f"alpha_{config.objective.alpha:g}"


def config_value(config: ConfigDict, field: str):
    """The value of a dotted field."""
    for name in field.split("."):
        config = config[name]
    return config


def _has_field(config: ConfigDict, field: str) -> bool:
    try:
        return not isinstance(config_value(config, field), ConfigDict)
    except (KeyError, TypeError):
        return False


def _parse(text: str, current):
    if isinstance(current, str):
        return text
    value = ast.literal_eval(text)
    return float(value) if isinstance(current, float) and isinstance(value, int) else value
