"""Every kind of recommender: what it changes of the config of tests/tiny_workdir.py.

test_every_kind.py, and eight_devices/test_every_kind.py, run each through all that a recommender
has to show. A new kind is a row here.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from tiny_gemma import write_gemma
from tiny_workdir import ITEMS, make_config

from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.data.dataset import prepare
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import write_text
from tca4rec_jax.train import train
from tca4rec_jax.training.batches import Batches


def no_files(workdir: Path, config: ConfigDict) -> None:
    """Most kinds need none."""


def gemma(workdir: Path, config: ConfigDict) -> None:
    """The LLM is a Gemma 3 of a GGUF file."""
    config.llm.weights = str(workdir / "gemma.gguf")
    if not Path(config.llm.weights).is_file():
        write_gemma(Path(config.llm.weights))


def write_ids(workdir: Path, config: ConfigDict) -> None:
    """Two tokens an item, and two items with the same."""
    ids = {str(item): [f"<a_{item // 4}>", f"<b_{min(item, 10) % 4}>"] for item in range(ITEMS)}
    write_text(workdir / "ids" / "ids.json", json.dumps(ids))


def train_on_texts(workdir: Path, config: ConfigDict) -> None:
    """The first stage of CoLLM: adapters of prompts without vectors."""
    if not (workdir / "llm" / "texts").exists():
        first = make_config(workdir, "texts")
        first.objective.alpha = 0.0
        train(Experiment(first, workdir))


class Kind(NamedTuple):
    """Fields of the config by their dotted names; what writes further files, and names them;
    whether it lists items."""

    changes: Mapping[str, Any] = {}
    write_files: Callable[[Path, ConfigDict], None] = no_files
    lists: bool = True


LAST = {"training.targets": "last"}
INSTRUCTION = LAST | {
    "prompt.templates": ("qa{history}.b{target}",),
    "prompt.item": '"{title}"',
    "prompt.separator": ".",
    "prompt.end": "<|end|>",
}
VECTORS = LAST | {
    "cf.model": "sasrec",
    "cf.max_epochs": 1,
    "cf.history_length": 4,
    "cf.sasrec.units": 6,
    "prompt.item": " {title}{vector}",
    "prompt.separator": ".",
}
FEATURES = VECTORS | {
    "prompt.templates": ("q{user}{history}.{target}",),
    "projector.activation": "relu",
}
KINDS = {
    "titles": Kind(),
    "bigrec": Kind(
        INSTRUCTION
        | {"decoding.mask": "after_softmax", "decoding.rules": "huggingface"}
        | {"decoding.length_penalty": 1.0}
    ),
    "bigrec, grounded": Kind(
        INSTRUCTION | {"decoding.find": "grounding", "decoding.grounding_tokens": 4}
    ),
    "msl": Kind(LAST | {"objective.softmax": "children", "objective.tau": 4.5}),
    "msl, adaptive tau": Kind(
        LAST
        | {"objective.softmax": "children", "objective.temperature": "adaptive"}
        | {"objective.eta": 0.9, "objective.tau": 1.5, "objective.scale_by_tau": True}
        | {"objective.mean_over": "decisions", "objective.form": "cross_entropy"}
    ),
    "yes or no": Kind(
        LAST
        | {"recommender.name": "answer", "recommender.answers": ("y", "n")}
        | {"prompt.templates": ("a{history}c{item}d{target}",), "prompt.separator": "."},
        lists=False,  # test_answer.py has more of it
    ),
    "yes or no, vectors": Kind(
        VECTORS
        | {"recommender.name": "answer", "recommender.answers": ("y", "n")}
        | {"prompt.templates": ("a{user}{history}c{item}{vector}d{target}",)}
        | {"prompt.item": " {title}", "objective.form": "cross_entropy"},
        lists=False,
    ),
    "tallrec, next title": Kind(INSTRUCTION | {"objective.form": "cross_entropy"}),
    "llara": Kind(
        VECTORS
        | {"prompt.templates": ("qa{history}.{target}", "b{history}.c{target}")}
        | {"projector.curriculum": True}
    ),
    "tca features": Kind(FEATURES | {"projector.width": 20}),
    "collm, second stage": Kind(
        FEATURES
        | {"projector.width": 60, "training.start_from": "texts", "lora.train": False}
        | {"objective.form": "cross_entropy"},
        train_on_texts,
    ),
    "attributes": Kind(
        LAST
        | {"data.attributes": ("brand",), "prompt.item": " {title}.{brand}"}
        | {"prompt.target": " {title}"}
    ),
    "several templates": Kind(
        LAST | {"prompt.templates": ("a{history}.{target}", "bc{history}de{target}")}
    ),
    "gemma 3": Kind({}, gemma),
    "chat": Kind(INSTRUCTION | {"prompt.chat": True}),
    "from scratch, ids": Kind(
        {"prompt.item": "{id}", "prompt.templates": ("{history}{target}",)}
        | {"prompt.separator": "", "prompt.end": "", "llm.weights": "random"}
        | {"llm.train": "full", "llm.dropout": 0.2, "llm.random.hidden_size": 16}
        | {"llm.random.num_layers": 2, "llm.random.num_kv_heads": 2, "llm.random.head_dim": 4},
        write_ids,
    ),
    "ids, new rows": Kind(
        LAST | {"prompt.item": "{id}", "prompt.target": "{id}", "prompt.separator": "."}, write_ids
    ),
    "ids, new rows, tasks": Kind(
        LAST
        | {"prompt.item": "{title}", "prompt.target": "{id}", "prompt.separator": "."}
        | {"training.tasks": ("{title}a {id}", "{id}b {title}z")},
        write_ids,
    ),
    "every weight": Kind({"llm.train": "full", "optimizer.learning_rate": 1e-3}),
}


def make_workdir_of(name: str, tiny: Path, workdir: Path) -> None:
    """A copy of a tiny work directory, with the data and the files of a kind."""
    shutil.copytree(tiny, workdir)
    experiment = experiment_of(name, workdir, "any")
    config = experiment.config
    if any(field.startswith(("data.", "cf.")) for field in KINDS[name].changes):
        shutil.rmtree(workdir / "data")
        shutil.rmtree(workdir / "cf")
        prepare(config.data, workdir / "data")
        run_cf(config.cf, experiment.data, workdir, history_length=4)


def experiment_of(name: str, workdir: Path, run: str, **changes: Any) -> Experiment:
    """Of a kind in its work directory; `changes` are further fields, with __ for the dot."""
    config, kind = make_config(workdir, run), KINDS[name]
    config.objective.alpha = 0.5
    kind.write_files(workdir, config)
    dotted = {field.replace("__", "."): value for field, value in changes.items()}
    config.update_from_flattened_dict(dict(kind.changes) | dotted)
    return Experiment(config, workdir)


def first_batches(batches: Batches, count: int) -> list[int]:
    """The first that read whatever the kind reads: a curriculum leaves the vectors out of some."""
    curriculum = batches.curriculum
    numbers = (n for n in itertools.count() if curriculum is None or curriculum.reads_vectors(n))
    return list(itertools.islice(numbers, count))
