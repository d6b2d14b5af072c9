"""Names of machines, and the compilers that are not installed with the project."""

from pathlib import Path

import jax
import pytest

from tca4rec_jax.compile_ahead import estimate, targets
from tca4rec_jax.compile_ahead.targets import CHIPS, Target, install_line
from tca4rec_jax.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "devices", "topology", "kind"),
    [
        ("v5e-16", 16, "4x4", "TPU v5 lite"),
        ("v5e-1", 1, "1x1", "TPU v5 lite"),
        ("v5p-8", 4, "2x2x1", "TPU v5"),  # counted in TensorCores, two a chip
        ("v5p-64", 32, "2x4x4", "TPU v5"),
        ("v6e-256", 256, "16x16", "TPU v6 lite"),
        ("h100-8", 8, "1x1x8", "NVIDIA H100 80GB HBM3"),
        ("a100-16", 16, "1x2x8", "NVIDIA A100-SXM4-80GB"),
        ("a6000-1", 1, "1x1x1", "NVIDIA RTX A6000"),
    ],
)
def test_names(name, devices, topology, kind):
    target = Target.parse(name)
    assert (target.num_devices, target.topology) == (devices, topology)
    assert target.chip.device_kind == kind
    assert target.chip.flops > 1e14


@pytest.mark.parametrize("name", ["v9-16", "v5e-12", "v5p-6", "h100-12", "h100-0", "", "v5e-x"])
def test_unknown_machines_are_errors(name):
    with pytest.raises(ValueError, match="target"):
        Target.parse(name)


def test_a_size_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(UserError, match="'v5p-9': v5p slices have 8, 16, 32, 64, 128, 256, 512"):
        Target.parse("v5p-9")


def test_every_gpu_has_its_description():
    for family, chip in CHIPS.items():
        if chip.platform == "cuda":
            text = Path(targets.__file__).with_name(f"{family}.txtpb").read_text()
            assert f'device_description_str: "{chip.device_kind}"' in text
            memory = next(line for line in text.splitlines() if "device_memory_size" in line)
            assert chip.memory < int(memory.split()[1]) < chip.memory / 0.9


def test_a_missing_compiler_is_an_error_with_the_line_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "COMPILERS", tmp_path)
    for name, wheel in (("v5e-16", "libtpu=="), ("h100-8", "jax-cuda12-plugin==")):
        with pytest.raises(UserError, match=wheel):
            Target.parse(name).devices()
    Target.parse("cpu").devices()


def test_ci_installs_the_tpu_compiler_of_that_line():
    folder, wheel = install_line("tpu").split()[-2:]
    assert f"\n{wheel} " in (ROOT / "launch" / "locks" / "tpu.txt").read_text()
    ci = (ROOT / ".ci" / "run").read_text()
    assert f"{folder} " in ci
    assert "--requirement=launch/locks/tpu.txt" in ci


def test_products_that_triton_finds_no_tiles_for_are_left_to_cublas():
    asked = []

    class Untiled:
        def compile(self, compiler_options):
            asked.append(compiler_options)
            if "xla_gpu_enable_triton_gemm" not in (compiler_options or {}):
                raise jax.errors.JaxRuntimeError(message)
            return "compiled"

    message = "INTERNAL: Couldn't find output tile sizes for dot"
    assert estimate._compiled(Untiled(), {"xla_gpu_autotune_level": 0}) == "compiled"
    assert [options["xla_gpu_autotune_level"] for options in asked] == [0, 0]
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        estimate._compiled(Untiled(), {})
    assert len(asked) == 3
