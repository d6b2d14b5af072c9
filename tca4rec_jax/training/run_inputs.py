"""What LLM runs are made from, by the names that their provenance has.

How and where they are made (kernels, the mesh, what is kept for the backward pass) is no input.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tca4rec_jax.cf.logits_store import read_manifest, split_path
from tca4rec_jax.data.sequences import RecData
from tca4rec_jax.data.templates import carried_vectors, reads_users, shows_ids
from tca4rec_jax.fileio import file_sha256
from tca4rec_jax.llm.config import DecoderOptions
from tca4rec_jax.llm.projector import ProjectorConfig
from tca4rec_jax.provenance import flatten
from tca4rec_jax.training.run_folder import RunFolder
from tca4rec_jax.training.validation import SECTION

# Of config.llm: the weights count by their content, random ones by what they are made of.
_NO_INPUTS = {
    "weights",
    "random",
    "architecture",
    *(one.name for one in dataclasses.fields(DecoderOptions)),
}

START = "training.start_from"
# Fields that were added when there were runs already, and their values that do as was done then.
ADDED = {
    "prompt.bos_token": "",
    "prompt.bos_before_target": False,
    "prompt.tokenised": "pieces",
    "objective.alpha_last": None,
    "objective.cf_dtype": "float32",
    "optimizer.warmup_fraction": None,
    "optimizer.warmup_from_zero": False,
    "optimizer.decay_steps": None,
    "optimizer.moments": "float32",
    "optimizer.epsilon": 1e-8,
    "training.unsupervised_end": 0,
    "training.tokens_per_batch": 0,
    "training.rows_per_mean": 0,
    "evaluation.text_match": False,
}


def compared(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by dotted name, to compare a run with: fields of ADDED that do as before are None."""
    return {
        name: None if name in ADDED and value == ADDED[name] else value
        for name, value in flatten(inputs)
    }


def recorded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a run writes down of its inputs: without ADDED fields that do as before, as then."""
    now = compared(inputs).items()
    return {name: value for name, value in now if value is not None or name not in ADDED}


def llm_inputs(config: ConfigDict, weights: str) -> dict[str, Any]:
    """What the LLM computes as it came; `weights` is its source's identity."""
    fields = {name: value for name, value in config.llm.items() if name not in _NO_INPUTS}
    return {"llm": fields, "weights": weights}


def inference_inputs(
    config: ConfigDict,
    *,
    weights: str,
    tokenizer: str,
    catalogue: str,
    ids: str,
    vectors: np.ndarray | None = None,
) -> dict[str, Any]:
    """What lists of a trained LLM depend on, besides its checkpoint; the rest are hashes.

    `vectors` are those of items, float32 [I, C], if placeholders carry them.
    """
    inputs = llm_inputs(config, weights) | {
        "recommender": config.recommender.to_dict(),
        "prompt": config.prompt.to_dict(),
        "data.history_length": config.data.history_length,
        "tokenizer": tokenizer,
        "catalogue": catalogue,
        "ids": ids,
    }
    if config.llm.train == "lora":
        inputs["lora"] = {n: v for n, v in config.lora.items() if n not in ("dropout", "train")}
    if vectors is not None:
        file = config.projector.weights
        inputs |= {
            "item vectors": hashlib.sha256(np.ascontiguousarray(vectors).data).hexdigest(),
            "projector": {
                n.name: config.projector[n.name] for n in dataclasses.fields(ProjectorConfig)
            },
            "projector.weights": file and file_sha256(Path(file)),
        }
    return compared(inputs)


def training_inputs(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """What a run's checkpoints depend on besides `inference_inputs` and the data.

    Raises StaleError if training.start_from is no run; one that has been started from it needs it
    no more.
    """
    training = (
        *("rows", "targets", "unsupervised_end", "tasks"),
        *("batch_size", "tokens_per_batch", "rows_per_mean", "buckets", "steps"),
    )
    inputs = {
        "objective": config.objective.to_dict(),
        "optimizer": config.optimizer.to_dict(),
        "training": {name: config.training[name] for name in training},
        "seed": config.seed,
        "llm.dropout": config.llm.dropout,
    }
    if config.llm.train == "lora":
        inputs |= {f"lora.{name}": config.lora[name] for name in ("dropout", "train")}
    if shows_ids(config.prompt):
        inputs["ids.train"] = config.ids.train
    if carried_vectors(config.prompt):
        names = "train", "weight_decay", "curriculum"
        inputs |= {f"projector.{name}": config.projector[name] for name in names}
    if name := config.training.start_from:
        inputs[START] = _start(RunFolder.of(workdir, config.run), RunFolder.of(workdir, name))
    return inputs


def _start(run: RunFolder, first: RunFolder) -> list:
    """What a run's first parameters are; where they are no more, what it says of them itself."""
    if run.trained_steps and not first.trained_steps and START in run.made_from.inputs:
        return run.made_from.inputs[START]
    return [first.made_from.fingerprint, first.trained_steps]


def is_aligned(config: ConfigDict) -> bool:
    """Whether a label of any step has a part of the CF model's."""
    return config.objective.alpha > 0 or (config.objective.alpha_last or 0) > 0


def data_inputs(
    config: ConfigDict, data: RecData, workdir: Path, teacher_reads: Sequence[str]
) -> dict[str, Any]:
    """The rows that are trained on and, if they are read, their CF logits and vectors.

    With those of further splits that the teacher reads, if there is one.
    Raises LogitsStoreError if the CF logits are missing or of another format.
    """
    split = training_split(config)
    inputs = {"training rows": data.splits[split].content_hash()}
    if is_aligned(config) or reads_users(config.prompt):
        manifest = read_manifest(split_path(config.cf.logits, workdir, split))
        inputs["CF logits"] = manifest["content_hash"]
    for other in teacher_reads if is_aligned(config) else ():
        manifest = read_manifest(split_path(config.cf.logits, workdir, other))
        inputs[f"CF logits of {other}"] = manifest["content_hash"]
        inputs[f"{other} rows"] = data.splits[other].content_hash()
    return inputs


def validation_inputs(config: ConfigDict, data: RecData, workdir: Path) -> dict[str, Any]:
    """What decides the best step of a validated run, besides what its lists depend on.

    Raises as `data_inputs`.
    """
    inputs = {
        SECTION: config.validation.to_dict(),
        "evaluation": {name: config.evaluation[name] for name in ("seed", "candidates")},
        "validation rows": data.splits[SECTION].content_hash(),
    }
    if reads_users(config.prompt):
        manifest = read_manifest(split_path(config.cf.logits, workdir, SECTION))
        inputs["CF logits of validation"] = manifest["content_hash"]
    return inputs


def training_split(config: ConfigDict) -> str:
    """The split whose rows are trained on."""
    return "train_sequences" if config.training.targets == "all" else "train"
