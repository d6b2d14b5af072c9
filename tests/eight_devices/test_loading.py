"""A checkpoint is read straight onto the shards of a mesh."""

import dataclasses
import functools
import json

import jax
import numpy as np
from safetensors.numpy import save_file

from tca4rec_jax.distributed.sharding import make_mesh, parameter_sharding
from tca4rec_jax.llm.checkpoints import loading
from tca4rec_jax.llm.checkpoints.hugging_face import is_transposed, param_paths
from tca4rec_jax.llm.checkpoints.loading import load_weights
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.families import config_fields

CONFIG = DecoderConfig(64, 32, 48, 2, 8, 8, 4)


def write_folder(folder):
    """{path: the parameter} of what was written."""
    rng, tensors, params = np.random.default_rng(0), {}, {}
    for name, (path, layer) in param_paths(CONFIG).items():
        value = rng.normal(size=CONFIG.parameter_shapes[path][layer is not None :])
        value = value.astype(np.float32)
        params.setdefault(path, []).append(value)
        tensors[name] = np.ascontiguousarray(value.T if is_transposed(path) else value)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_fields(CONFIG)))
    save_file(tensors, folder / "model.safetensors")
    return {
        path: np.stack(values) if path.startswith("layers/") else values[0]
        for path, values in params.items()
    }


def test_every_device_reads_its_shards_and_no_more(tmp_path, monkeypatch):
    written = write_folder(tmp_path / "model")
    mesh = make_mesh(2, 2, 2)
    largest, shard = [0], loading._shard

    def recorded(*args, **kwargs):
        part = shard(*args, **kwargs)
        largest[0] = max(largest[0], part.size)
        return part

    monkeypatch.setattr(loading, "_shard", recorded)
    config, params = load_weights(
        tmp_path / "model", sharding=functools.partial(parameter_sharding, mesh)
    )
    assert dataclasses.replace(config, max_positions=CONFIG.max_positions) == CONFIG
    assert largest[0] == 2 * 32 * 48 // 4
    shards = {"layers/q_proj": (2, 16, 16), "layers/down_proj": (2, 24, 16), "embedding": (32, 16)}
    shards |= {"lm_head": (16, 32), "layers/mlp_norm": (2, 32)}
    for path, value in params.items():
        np.testing.assert_array_equal(value, written[path])
        assert len({s.device for s in value.addressable_shards}) == 8
        for part in value.addressable_shards:
            assert part.data.shape == shards.get(path, part.data.shape)
            np.testing.assert_array_equal(part.data, written[path][part.index])
    assert all(path in params for path in shards)
    assert jax.tree.leaves(params)[0].sharding.mesh == mesh
