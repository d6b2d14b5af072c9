"""SASRec models trained by the published PyTorch code (the layout of pmixer/SASRec.pytorch).

Axis letters: I items, S positions, D model.
"""

import dataclasses
from pathlib import Path

import numpy as np
from flax import nnx

from tca4rec_jax.cf.checkpoint import filled
from tca4rec_jax.cf.models.sasrec import SASRec, SASRecConfig
from tca4rec_jax.cf.pytorch_file import read_state_dict
from tca4rec_jax.errors import UserError


def read_sasrec(path: Path | str, config: SASRecConfig) -> SASRec:
    """A SASRec with the weights of a PyTorch state dict (.pt, .pth or .safetensors).

    Its attention has an output projection, which ours has not: with one head it is folded into the
    value projection, which gives the same outputs. Row 0 of the item table, padding, is dropped.
    The model has `mask_padding=False`, as that code does.

    Args:
      path: the checkpoint.
      config: what the file must hold; one head.

    Raises:
      UserError: an unreadable file, more than one head, a tensor that is missing, left over or of
        another shape (named, with the field of config.cf to set).
    """
    if config.heads != 1:
        raise UserError(f"cf.weights are read for one head, cf.heads is {config.heads}")
    tensors = {name: np.asarray(value, np.float32) for name, value in read_state_dict(path).items()}
    config = dataclasses.replace(config, mask_padding=False)
    _check(path, tensors, config)
    abstract = nnx.eval_shape(lambda: SASRec(config, rngs=nnx.Rngs(0)))
    return filled(abstract, _arrays(tensors, config))


def _check(path, tensors: dict[str, np.ndarray], config: SASRecConfig) -> None:
    """Raises UserError unless names and shapes are those of the config."""
    D, expected = config.units, {"item_emb.weight": (config.num_items + 1, config.units)}
    positions = tensors.get("pos_emb.weight", np.empty((0, 0))).shape
    extra = positions == (config.history_length + 1, D)  # one more where position 0 is padding
    expected["pos_emb.weight"] = (config.history_length + extra, D)
    for name in ("weight", "bias"):
        expected[f"last_layernorm.{name}"] = (D,)
    for block in range(config.blocks):
        for norm in ("attention_layernorms", "forward_layernorms"):
            expected |= {f"{norm}.{block}.{name}": (D,) for name in ("weight", "bias")}
        attention, forward = f"attention_layers.{block}", f"forward_layers.{block}"
        expected[f"{attention}.in_proj_weight"] = (3 * D, D)
        expected[f"{attention}.in_proj_bias"] = (3 * D,)
        expected[f"{attention}.out_proj.weight"] = (D, D)
        expected[f"{attention}.out_proj.bias"] = (D,)
        for layer in ("conv1", "conv2"):
            expected |= {f"{forward}.{layer}.weight": (D, D, 1), f"{forward}.{layer}.bias": (D,)}
    if set(tensors) != set(expected):
        raise UserError(
            f"{path} is no SASRec of cf.blocks={config.blocks}: missing tensors "
            f"{sorted(set(expected) - set(tensors))[:4]}, unknown tensors "
            f"{sorted(set(tensors) - set(expected))[:4]}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{path}: {name} has shape {tensors[name].shape}, expected {shape} for "
                f"{config.num_items} items and padding, cf.units={D} and "
                f"cf.history_length={config.history_length}"
            )


def _arrays(tensors: dict[str, np.ndarray], config: SASRecConfig) -> dict[str, np.ndarray]:
    """Our parameters by their dotted names."""
    arrays = {
        "item_table": tensors["item_emb.weight"][1:],
        "position_table": tensors["pos_emb.weight"][-config.history_length :],
    }

    def norm(ours, theirs):
        arrays[f"{ours}.scale"] = tensors[f"{theirs}.weight"]
        arrays[f"{ours}.bias"] = tensors[f"{theirs}.bias"]

    def linear(ours, weight, bias):
        arrays[f"{ours}.kernel"] = weight.T.astype(np.float32)
        arrays[f"{ours}.bias"] = bias.astype(np.float32)

    norm("final_norm", "last_layernorm")
    for block in range(config.blocks):
        norm(f"blocks.{block}.attention_norm", f"attention_layernorms.{block}")
        norm(f"blocks.{block}.feed_forward_norm", f"forward_layernorms.{block}")
        attention, forward = f"attention_layers.{block}", f"forward_layers.{block}"
        weights = np.split(tensors[f"{attention}.in_proj_weight"], 3)
        biases = np.split(tensors[f"{attention}.in_proj_bias"], 3)
        output = tensors[f"{attention}.out_proj.weight"].astype(np.float64)
        # The attention weights of a query sum to one, so the output's bias may join the value's.
        weights[2] = output @ weights[2]
        biases[2] = output @ biases[2] + tensors[f"{attention}.out_proj.bias"]
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            linear(f"blocks.{block}.{name}", weight, bias)
        for name, layer in (("inner", "conv1"), ("outer", "conv2")):
            convolution = f"{forward}.{layer}"
            weight = tensors[f"{convolution}.weight"][:, :, 0]
            linear(f"blocks.{block}.{name}", weight, tensors[f"{convolution}.bias"])
    return arrays
