"""The mesh's rules, and the tests that need eight devices, in a process of their own."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from forked import Script
from jax.sharding import PartitionSpec as P

from tca4rec_jax.distributed.sharding import (
    Rules,
    check_batch_size,
    leave_products_to_cublas,
    make_mesh,
    mesh_for_batches,
    sharding_of,
    tree_shardings,
)
from tca4rec_jax.llm.config import DecoderConfig

EIGHT_DEVICES = Path(__file__).parents[1] / "eight_devices"


@pytest.mark.slow(200)
def test_meshes_of_eight_devices():
    command = [str(Path(pytest.__file__).with_name("__main__.py")), str(EIGHT_DEVICES)]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    ran = Script(command, {"TCA4REC_TEST_DEVICES": "8"}).completed(900)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


def test_the_rules_refuse_collisions_and_unknown_axes():
    with pytest.raises(ValueError, match=r"'heads' and 'embed' .* mesh axis 'tensor'"):
        Rules(embed="tensor").spec(("layers", "heads", "embed"))
    with pytest.raises(ValueError, match="'embed' and 'embed' .* mesh axis 'fsdp'"):
        Rules().spec(("embed", "embed"))
    with pytest.raises(ValueError, match="rule 'heads': no mesh axis 'model'"):
        Rules(heads="model")
    with pytest.raises(ValueError, match="no rule for the axis 'experts'"):
        Rules().spec(("layers", "experts"))
    assert Rules().spec(("batch", None, "items")) == P(("data", "fsdp"), None, "tensor")


def test_meshes_that_do_not_fit_are_refused():
    assert len(jax.devices()) == 2
    assert dict(make_mesh().shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(tensor=2).shape) == {"data": 1, "fsdp": 1, "tensor": 2}
    assert dict(make_mesh(1).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes, message in (
        ({"fsdp": 0}, "mesh.fsdp is 0"),
        ({"data": 0}, "mesh.data is 0"),
        ({"fsdp": -1}, "mesh.fsdp is -1"),
        ({"tensor": 3}, "is 3, which does not divide the 2 devices"),
        ({"data": 2, "tensor": 2}, "of 4 devices, there are 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make_mesh(**sizes)
    with pytest.raises(
        ValueError, match=r"batch is 3, .* multiple of the 2 devices \(data x fsdp\)"
    ):
        check_batch_size(make_mesh(1, 2), 3, "batch")
    with pytest.raises(ValueError, match=r"is 6, .* batch, times training.micro_batches=2"):
        check_batch_size(make_mesh(1, 2), 6, "training.batch_size", micro_batches=2)
    check_batch_size(make_mesh(1, 2), 8, "training.batch_size", micro_batches=2)
    check_batch_size(make_mesh(1, 2), 3, "batch", "prompts")  # every device has all rows


def test_on_cpu_as_many_devices_share_a_batch_as_divide_it():
    for batches, fsdp, expected in (
        ({"batch": 4, "prompts": 6}, 1, 2),
        ({"batch": 3, "prompts": 6}, 1, 1),
        ({"batch": 4, "prompts": 5}, 1, 1),
        ({"batch": 2, "prompts": 1}, 2, 1),
    ):
        mesh = mesh_for_batches(-1, fsdp, 1, **batches)
        assert dict(mesh.shape) == {"data": expected, "fsdp": fsdp, "tensor": 1}
    with pytest.raises(ValueError, match="batch is 3"):  # said so, it stays so
        check_batch_size(mesh_for_batches(2, 1, 1, batch=3, prompts=3), 3, "batch")
    for sizes in ((-1, 0, 1), (-1, 3, 1), (0, 1, 1)):
        with pytest.raises(ValueError, match="mesh"):
            mesh_for_batches(*sizes, batch=4, prompts=4)


def test_what_does_not_divide_is_held_whole():
    mesh = make_mesh(1, 1, 2)
    assert sharding_of(mesh, ("embed", "vocabulary"), (6, 4)).spec == P(None, "tensor")
    assert sharding_of(mesh, ("vocabulary", "embed"), (5, 4)).spec == P()
    # 6 columns are 3 heads: half of a head is of no use.
    units = {"heads": 3}
    assert sharding_of(mesh, ("embed", "heads"), (6, 6), units=units).spec == P()
    assert sharding_of(mesh, ("embed", "heads"), (6, 6)).spec == P(None, "tensor")
    with pytest.raises(
        ValueError, match=r"logical axes \('embed',\) of an array of shape \(2, 3\)"
    ):
        sharding_of(mesh, ("embed",), (2, 3))


def test_a_trees_leaves_live_with_their_parameters():
    config = DecoderConfig(128, 32, 64, 2, 8, 8, 8)

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32)

    layers = {"q_proj": leaf(2, 32, 64), "attn_norm": leaf(2, 32)}
    tree = {
        "moments": {"layers": layers, "count": leaf()},
        "layers/down_proj": leaf(2, 64, 32),
        "adapters": {"q_proj": {"a": leaf(2, 32, 4)}},
    }
    places = tree_shardings(make_mesh(1, 1, 2), config, tree)
    found = jax.tree.map(lambda place: place.spec, places)
    assert found["moments"]["layers"] == {"q_proj": P(None, None, "tensor"), "attn_norm": P()}
    assert found["layers/down_proj"] == P(None, "tensor")
    assert found["moments"]["count"] == found["adapters"]["q_proj"]["a"] == P()
    with pytest.raises(ValueError, match="layers/experts"):
        tree_shardings(make_mesh(1), config, {"layers": {"experts": leaf(2, 3)}})


def test_products_are_left_to_cublas_unless_said_otherwise(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true --xla_x=1")
    leave_products_to_cublas()
    expected = "--xla_gpu_enable_triton_gemm=true --xla_x=1 --xla_gpu_dot_merger_threshold_mb=0"
    assert os.environ["XLA_FLAGS"] == expected
    leave_products_to_cublas()
    assert os.environ["XLA_FLAGS"] == expected
