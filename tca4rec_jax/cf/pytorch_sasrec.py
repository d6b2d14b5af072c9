"""SASRec models trained by the published PyTorch code (the layout of pmixer/SASRec.pytorch).

Checkpoints are read without PyTorch: the zip format of torch.save, and safetensors. The pickle
inside the zip file can only build dictionaries of tensors: any other class it names is an error, so
a hostile file runs no code. Tensors are views of storages, and each storage is read once: a file
takes no more memory than it has bytes.
"""

import collections
import dataclasses
import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from flax import nnx
from safetensors.numpy import load_file

from tca4rec_jax.cf.checkpoint import filled
from tca4rec_jax.cf.models.sasrec import SASRec, SASRecConfig
from tca4rec_jax.errors import UserError, reading

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
_KIND, _REMEDY = "PyTorch checkpoint", "save model.state_dict() again, or as safetensors"

_OTHER_NORMS = (
    "%s has a row of positions for padding, as revisions of 2024 and later write, most of which "
    "have other layer norms: if it was trained by one with norm_first, set cf.sasrec.norm to 'pre' "
    "(True) or 'post' (False, its default)"
)


def read_sasrec(path: Path | str, config: SASRecConfig) -> SASRec:
    """A SASRec with the weights of a PyTorch state dict (.pt, .pth or .safetensors).

    Its attention has an output projection, which ours has not: with one head it is folded into the
    value projection, which gives the same outputs. Row 0 of the item table, padding, is dropped.
    The model has `mask_padding=False`, as that code does. Its layer norms stand where `config.norm`
    says: a state dict does not tell, and today's code has two ways of its own.

    Raises UserError for an unreadable file, a config of more than one head, a tensor that is
    missing, left over or of another shape (named, with the fields of config.cf to set).
    """
    if config.heads != 1:
        raise UserError(f"cf.weights are read for one head, cf.sasrec.heads is {config.heads}")
    config = dataclasses.replace(config, mask_padding=False)
    arrays = _arrays(path, read_state_dict(path), config)
    return filled(path, lambda: SASRec(config, rngs=nnx.Rngs(0)), arrays)


def _arrays(path, tensors: dict[str, np.ndarray], config: SASRecConfig) -> dict[str, np.ndarray]:
    """Our parameters by their dotted names; takes all out of `tensors`."""
    D, length = config.units, config.history_length
    needed_by = (
        f"cf.sasrec.blocks={config.blocks}, cf.sasrec.units={D}, cf.history_length={length} and "
        f"{config.num_items} items and padding"
    )
    arrays = {}

    def take(name, *shape):
        if name not in tensors:
            raise UserError(f"{path} is no SASRec of {needed_by}: {name} is missing")
        if (tensor := tensors.pop(name)).dtype not in _FLOATS:
            raise UserError(f"{path}: {name} is of {tensor.dtype}, expected floating point")
        tensor = np.asarray(tensor, np.float32)
        if tensor.shape != shape:
            raise UserError(
                f"{path}: {name} has shape {tensor.shape}, expected {shape} for {needed_by}"
            )
        return tensor

    def norm(ours, theirs):
        arrays[f"{ours}.scale"] = take(f"{theirs}.weight", D)
        arrays[f"{ours}.bias"] = take(f"{theirs}.bias", D)

    def linear(ours, weight, bias):
        arrays[f"{ours}.kernel"] = weight.T.astype(np.float32)
        arrays[f"{ours}.bias"] = bias.astype(np.float32)

    arrays["item_table"] = take("item_emb.weight", config.num_items + 1, D)[1:]
    padded = np.shape(tensors.get("pos_emb.weight", 0)) == (length + 1, D)  # position 0
    if padded and config.norm == "original":
        logging.warning(_OTHER_NORMS, path)
    arrays["position_table"] = take("pos_emb.weight", length + padded, D)[-length:]
    norm("final_norm", "last_layernorm")
    for block in range(config.blocks):
        norm(f"blocks.{block}.attention_norm", f"attention_layernorms.{block}")
        norm(f"blocks.{block}.feed_forward_norm", f"forward_layernorms.{block}")
        attention = f"attention_layers.{block}"
        weights = np.split(take(f"{attention}.in_proj_weight", 3 * D, D), 3)
        biases = np.split(take(f"{attention}.in_proj_bias", 3 * D), 3)
        output = take(f"{attention}.out_proj.weight", D, D).astype(np.float64)
        # The attention weights of a query sum to one, so the output's bias may join the value's.
        weights[2] = output @ weights[2]
        biases[2] = output @ biases[2] + take(f"{attention}.out_proj.bias", D)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            linear(f"blocks.{block}.{name}", weight, bias)
        for name, layer in (("inner", "conv1"), ("outer", "conv2")):
            convolution = f"forward_layers.{block}.{layer}"
            weight = take(f"{convolution}.weight", D, D, 1)[:, :, 0]
            linear(f"blocks.{block}.{name}", weight, take(f"{convolution}.bias", D))
    if tensors:
        raise UserError(
            f"{path} is no SASRec of {needed_by}: unknown tensors {sorted(tensors)[:4]}"
        )
    return arrays


def read_state_dict(path: Path | str) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name (or of one under a key such as 'state_dict').

    Raises UserError for a missing or damaged file, the format of PyTorch before 1.6, and a pickle
    that names anything but tensors and dictionaries.
    """
    path = Path(path)
    with reading(path, _KIND, remedy=_REMEDY):
        if path.suffix == ".safetensors":
            return load_file(path)
        state = _unpickled(path)
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, np.ndarray)
            for name, tensor in state.items()
        ):
            raise UserError("it holds no state dict; save model.state_dict()")
        return dict(state)


def _unpickled(path: Path) -> Any:
    """What the pickle in the zip file of torch.save describes."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"it is not a zip file as torch.save has written since PyTorch 1.6 ({error}); {_REMEDY}"
        ) from error
    with archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
                raise UserError(f"{member.filename} is compressed, or larger than the file")
        names = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(names) != 1:
            raise UserError(f"it holds {len(names)} files data.pkl, expected one")
        folder = names[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise UserError("it is big-endian")
        data = archive.read(names[0])
        for opcode, argument, _ in pickletools.genops(data):
            # Python makes room for as many objects as the highest number that one is put under.
            if opcode.name.endswith("PUT") and int(str(argument)) > len(data):
                raise UserError(f"its pickle numbers an object {argument}")
        return _TensorUnpickler(archive, folder, data).load()


class _TensorUnpickler(pickle.Unpickler):
    """Builds NumPy arrays where the pickle has tensors, and refuses everything else."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, data: bytes):
        super().__init__(io.BytesIO(data))
        self._archive, self._folder = archive, folder
        self._storages: dict[tuple, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle may name; raises UserError for anything else."""
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in allowed:
            raise UserError(
                f"it names {module}.{name}; only tensors in dictionaries are read. Save "
                "model.state_dict(), not the model"
            )
        return allowed[module, name]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        """The numbers of a storage, a file in the archive."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or dtype not in _STORAGES.values():
            raise UserError(f"it refers to a {kind} of {dtype}, expected a storage of numbers")
        if key not in self._storages:
            self._storages[key] = np.frombuffer(
                self._archive.read(f"{self._folder}data/{key}"), np.uint8
            )
        storage = self._storages[key].view(dtype)
        if len(storage) < count:
            raise UserError(f"storage {key} has {len(storage)} of {count} numbers")
        return storage


def _tensor(storage, offset, size, stride, *_):
    """A strided view of a storage; raises UserError if it reaches beyond."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, np.ndarray) or not all(
        type(number) is int and 0 <= number < 2**63 for number in numbers
    ):
        raise UserError(f"a tensor's offset, sizes and strides are {numbers}, expected at least 0")
    reach = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and max(reach, math.prod(size) - 1) >= len(storage):
        raise UserError(f"a tensor of shape {tuple(size)} reaches beyond its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)
