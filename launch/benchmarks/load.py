"""How much host memory and time it takes to load a checkpoint of Hugging Face (Linux).

    python launch/benchmarks/load.py                                  # 1.1 GB of float32
    python launch/benchmarks/load.py --stored=bfloat16 --loaded=bfloat16
    python launch/benchmarks/load.py --quantised=nf4

Makes a Llama with the widths of SmolLM2-360M and as many layers as the size asks for, in several
safetensors files, and loads it onto all devices as training does. Memory is the growth of the
process's peak resident memory, mapped pages of the files included, from before the call.
"""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from safetensors.numpy import save_file

from tca4rec_jax.distributed.sharding import make_mesh, replicated
from tca4rec_jax.launching import start
from tca4rec_jax.llm.checkpoints.hugging_face import INDEX, param_paths
from tca4rec_jax.llm.checkpoints.loading import load_weights
from tca4rec_jax.llm.config import SCALES, DecoderConfig
from tca4rec_jax.llm.families import config_fields

_GIGABYTES = flags.DEFINE_float("gigabytes", 1.1, "Size of the checkpoint (10^9 bytes).")
_STORED = flags.DEFINE_enum("stored", "float32", ["float32", "bfloat16"], "Type in the files.")
_QUANTISED = flags.DEFINE_enum("quantised", "", ["", *SCALES], "As llm.quantise.")
_LOADED = flags.DEFINE_enum("loaded", "float32", ["float32", "bfloat16"], "Type in memory.")


def sized_config(num_bytes: float, dtype: str) -> DecoderConfig:
    """SmolLM2-360M with another number of layers."""

    def size(layers):
        config = DecoderConfig(49152, 960, 2560, layers, 15, 5, 64, 1e5, 1e-5, True, 8192)
        values = sum(int(np.prod(shape)) for shape in config.parameter_shapes.values())
        return config, values * jnp.dtype(dtype).itemsize

    layers = 1
    while size(layers)[1] < num_bytes:
        layers += 1
    return size(layers)[0]


def write_checkpoint(folder: Path, config: DecoderConfig, dtype: str) -> None:
    """Uniform values; the tensors of a layer, and those of none, are a file each."""
    generator = np.random.default_rng(0)
    files: dict[str, dict[str, np.ndarray]] = {}
    for name, target in param_paths(config).items():
        shape = target.tensor_shape(config)
        files.setdefault(f"model-{target.layer}.safetensors", {})[name] = shape
    for file, shapes in files.items():
        tensors = {
            name: generator.random(shape, np.float32).astype(jnp.dtype(dtype))
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file)
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_fields(config)))


def memory(field: str) -> int:
    """VmRSS or VmHWM (the peak of it) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}")


def main(_):
    with tempfile.TemporaryDirectory() as name:
        folder, config = Path(name), sized_config(1e9 * _GIGABYTES.value, _STORED.value)
        # In a process of its own: memory that it frees would be used again unnoticed.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_checkpoint, args=(folder, config, _STORED.value)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit("the checkpoint was not written")
        start()
        mesh = make_mesh()
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        before, begin = memory("VmRSS"), time.perf_counter()
        _, params = load_weights(
            folder,
            jnp.dtype(_LOADED.value),
            sharding=lambda *_: replicated(mesh),
            quantised=_QUANTISED.value,
        )
        seconds, peak = time.perf_counter() - begin, memory("VmHWM") - before
        loaded = sum(value.nbytes for value in params.values())
    print(
        f"{stored / 1e9:.2f} GB of {_STORED.value}, {loaded / 1e9:.2f} GB as"
        f" {_QUANTISED.value or _LOADED.value} on {mesh.size} devices: {seconds:.1f} s;"
        f" peak {peak / 1e9:.2f} GB, {peak / stored:.2f} times the files,"
        f" {peak / loaded:.2f} times the parameters"
    )


if __name__ == "__main__":
    app.run(main)
