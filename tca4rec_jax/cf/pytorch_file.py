"""Tensors of PyTorch checkpoints without PyTorch: the zip format of torch.save, and safetensors.

The pickle inside the zip file can only build dictionaries of tensors: any other class it names is
an error, so a hostile file runs no code.
"""

import collections
import io
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from tca4rec_jax.errors import UserError

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
_NESTED = ("state_dict", "model_state_dict", "model")


def read_state_dict(path: Path | str) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name (or of one under a key such as 'state_dict').

    Raises:
      UserError: a missing or damaged file, the format of PyTorch before 1.6, a pickle that names
        anything but tensors and dictionaries.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with zipfile.ZipFile(path) as archive:
            state = _unpickle(archive)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is not a zip file as torch.save has written since PyTorch 1.6; save it again "
            "with a newer PyTorch, or as safetensors"
        ) from error
    except (OSError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint ({error!r})") from error
    except (pickle.UnpicklingError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint ({error})") from error
    for key in _NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, np.ndarray) for v in state.values()):
        raise UserError(f"{path} holds no state dict; save model.state_dict()")
    return dict(state)


def _unpickle(archive: zipfile.ZipFile):
    (name,) = (n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl")
    folder = name[: -len("data.pkl")]
    order = f"{folder}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise UserError("it is big-endian")
    return _TensorUnpickler(archive, folder, archive.read(name)).load()


class _TensorUnpickler(pickle.Unpickler):
    """Builds NumPy arrays where the pickle has tensors, and refuses everything else."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, data: bytes):
        super().__init__(io.BytesIO(data))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str):
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}; only tensors in dictionaries are read. Save "
                "model.state_dict(), not the model"
            )
        return allowed[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to a {kind}, expected a storage")
        storage = np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), dtype)
        if len(storage) < count:
            raise pickle.UnpicklingError(f"storage {key} has {len(storage)} of {count} numbers")
        return storage


def _tensor(storage, offset, size, stride, *_):
    """A copy of a strided view; raises UserError if it reaches beyond the storage."""
    reach = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and not 0 <= offset <= reach < len(storage):
        raise UserError(f"a tensor of shape {tuple(size)} reaches beyond its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()
