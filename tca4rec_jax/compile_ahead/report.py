"""The output of compile_ahead: a table of the programs, the verdict with advice, JSON."""

from collections.abc import Sequence

from tca4rec_jax.compile_ahead.estimate import Estimate
from tca4rec_jax.compile_ahead.programs import AbstractExperiment

_GiB = 2.0**30
LEGEND = (
    "per device and run; at least: every kernel at the data sheet's FLOP/s or bandwidth; links: "
    "the collectives at its\ninterconnect bandwidth; compiler: the cycles a TPU's compiler expects "
    "at the data sheet's clock"
)


def heading(experiment: AbstractExperiment) -> str:
    """The run and the machine in two lines."""
    config, architecture, target = experiment.config, experiment.architecture, experiment.target
    shape = experiment.batch_shape
    mesh = " x ".join(f"{name} {size}" for name, size in experiment.mesh.shape.items())
    kind = target.chip.device_kind if target.chip else "CPU"
    topology = f" ({target.topology})" if target.topology else ""
    return (
        f"{experiment.architecture_name}, {experiment.parameters / 1e9:.2f} billion parameters in "
        f"{architecture.num_layers} layers, {experiment.trained_parameters / 1e6:.1f} million "
        f"trained ({config.llm.train}), {config.llm.dtype}; batch {config.training.batch_size} x "
        f"{shape.tokens} tokens, {experiment.num_items:,} items\n"
        f"{target.name}: {target.num_devices} x {kind}{topology}, mesh {mesh}"
    )


def table(estimates: Sequence[Estimate]) -> dict[str, dict[str, object]]:
    """One row per program, for one device and one run of the program."""
    return {estimate.program: _row(estimate) for estimate in estimates}


def _row(estimate: Estimate) -> dict[str, object]:
    memory, work = estimate.memory, estimate.work
    return {
        "arguments GiB": memory and memory.arguments / _GiB,
        "temporaries GiB": memory and memory.temporaries / _GiB,
        f"of {estimate.available / _GiB:.1f} GiB": f"{estimate.needed / _GiB:.2f}",
        "TFLOP": work and work.flops / 1e12,
        "memory traffic GB": work and work.bytes / 1e9,
        "collectives": collectives_text(estimate)
        + (f" (per turn of {work.unknown_loops} loops)" if work and work.unknown_loops else ""),
        "at least ms": _milliseconds(estimate.product_seconds),
        "links ms": _milliseconds(estimate.collective_seconds),
        "compiler ms": _milliseconds(estimate.compiler_seconds),
        "": "fits" if estimate.fits else "does not fit",
    }


def collectives_text(estimate: Estimate) -> str:
    """The collectives and the bytes of a device's links: '57 all-gather 1.20 GB, ...'."""
    found = [
        f"{count:.0f} {kind} {_bytes(moved)}"
        for kind, (count, moved) in sorted(estimate.collectives().items())
    ]
    return ", ".join(found) or "none"


def compared(estimate: Estimate, plain: Estimate) -> str:
    """The share that the Collaborative Tokenizer adds to a training step, in percent."""
    parts = []
    for label, ours, theirs in (
        ("time at the data sheet's rates", estimate.product_seconds, plain.product_seconds),
        ("the compiler's time", estimate.compiler_seconds, plain.compiler_seconds),
        ("memory", estimate.needed, plain.needed),
        ("collectives", estimate.collective_seconds, plain.collective_seconds),
    ):
        if ours is not None and theirs:
            parts.append(f"{label} {100 * (ours / theirs - 1):+.2f}%")
    return f"against plain next-token prediction: {', '.join(parts)}"


def advice(estimate: Estimate, experiment: AbstractExperiment) -> str:
    """What to change so that a program fits; '' if it does."""
    if estimate.fits:
        return ""
    config, memory = experiment.config, estimate.memory
    lacking = (estimate.needed - estimate.available) / _GiB
    shards = experiment.mesh.shape["fsdp"] * experiment.mesh.shape["tensor"]
    options = []
    weights = experiment.weight_bytes / shards
    if weights > estimate.available / 3 or (memory and memory.arguments > estimate.available / 2):
        options.append(
            f"split the weights ({experiment.weight_bytes / _GiB:.1f} GiB, now over {shards}) over "
            "more devices: mesh.tensor, mesh.fsdp"
        )
        if config.llm.dtype == "float32" and config.llm.train == "lora":
            options.append("llm.dtype=bfloat16")
        if estimate.program == "train" and config.llm.train == "full":
            options.append("llm.train=lora")
    if estimate.program == "train":
        if config.llm.remat != "full":
            options.append("llm.remat=full")
        options.append("a smaller training.batch_size, or more devices for it (mesh.data)")
        options.append("shorter training.buckets and prompt.max_tokens")
    else:
        options.append("a smaller inference.batch_size or more devices for it (mesh.data)")
        if estimate.program == "search":
            options.append("fewer decoding.beams")
    return f"{estimate.program} lacks {lacking:.2f} GiB: " + "; or ".join(options)


def as_json(estimates: Sequence[Estimate], experiment: AbstractExperiment) -> dict:
    """All results, in bytes, FLOPs and seconds."""
    return {
        "target": experiment.target.name,
        "devices": experiment.target.num_devices,
        "mesh": dict(experiment.mesh.shape),
        "architecture": experiment.architecture_name,
        "parameters": experiment.parameters,
        "items": experiment.num_items,
        "useful_flops": experiment.useful_flops,
        "fits": all(estimate.fits for estimate in estimates),
        "programs": {estimate.program: _plain(estimate) for estimate in estimates},
    }


def _plain(estimate: Estimate) -> dict:
    memory, work = estimate.memory, estimate.work
    return {
        "fits": estimate.fits,
        "memory": memory and vars(memory),
        "needed_bytes": estimate.needed,
        "available_bytes": estimate.available,
        "flops": work and work.flops,
        "bytes": work and work.bytes,
        "collectives": {
            kind: {"count": count, "bytes": moved}
            for kind, (count, moved) in estimate.collectives().items()
        },
        "unknown_loops": work and work.unknown_loops,
        "host_transfers": work and work.host_transfers,
        "product_seconds": estimate.product_seconds,
        "collective_seconds": estimate.collective_seconds,
        "compiler_seconds": estimate.compiler_seconds,
        "compile_seconds": estimate.compile_seconds,
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
