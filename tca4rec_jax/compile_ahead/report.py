"""The output of compile_ahead: a table of the programs, the verdict with advice, JSON."""

from collections.abc import Sequence

from rich.filesize import decimal

from tca4rec_jax.compile_ahead.estimate import Estimate
from tca4rec_jax.compile_ahead.programs import AbstractExperiment

_GiB = 2.0**30
LEGEND = (
    "per device and run; by the data sheet: at least: every kernel at its FLOP/s or bandwidth, "
    "links: the collectives",
    "at its interconnect bandwidth, compiler: a TPU compiler's cycles",
)


def heading(experiment: AbstractExperiment) -> tuple[str, str]:
    """The run and the machine, in a line each."""
    config, architecture, target = experiment.config, experiment.architecture, experiment.target
    shape = experiment.batch_shape
    mesh = " x ".join(f"{name} {size}" for name, size in experiment.mesh.shape.items())
    kind = target.chip.device_kind if target.chip else "CPU"
    topology = f" ({target.topology})" if target.topology else ""
    parts = config.training.micro_batches
    generated = "two answers" if experiment.answers else f"{experiment.num_items:,} items"
    split = f" in {parts} micro-batches" if parts > 1 else ""
    return (
        f"{experiment.architecture_name}, {experiment.parameters / 1e9:.2f} billion parameters in "
        f"{architecture.num_layers} layers, {experiment.trained_parameters / 1e6:.1f} million "
        f"trained ({config.llm.train}), {config.llm.dtype}; batch {shape.rows} x "
        f"{shape.tokens} tokens{split}, {generated}",
        f"{target.name}: {target.num_devices} x {kind}{topology}, mesh {mesh}",
    )


def row(estimate: Estimate) -> dict[str, object]:
    """A program's row of the table, for one device and one run."""
    memory, work = estimate.memory, estimate.work
    collectives = [
        f"{found['count']:.0f} {kind} {decimal(int(found['bytes']))}"
        for kind, found in sorted(estimate.collectives.items())
    ]
    turns = f" (per turn of {work.unknown_loops} loops)" if work and work.unknown_loops else ""
    product, collective, compiler = (time and 1e3 * time for time in estimate.seconds.values())
    return {
        "arguments GiB": memory and memory.arguments / _GiB,
        "temporaries GiB": memory and memory.temporaries / _GiB,
        f"of {estimate.available / _GiB:.1f} GiB": f"{estimate.needed / _GiB:.2f}",
        "TFLOP": work and work.flops / 1e12,
        "memory traffic GB": work and work.bytes / 1e9,
        "collectives": (", ".join(collectives) or "none") + turns,
        "at least ms": product,
        "links ms": collective,
        "compiler ms": compiler,
        "": "fits" if estimate.fits else "does not fit",
    }


def compared(estimate: Estimate, plain: Estimate) -> str:
    """The share that the Collaborative Tokenizer adds to a training step, in percent."""
    parts = []
    for label, ours, theirs in (
        ("time at the data sheet's rates", estimate.seconds["product"], plain.seconds["product"]),
        ("the compiler's time", estimate.seconds["compiler"], plain.seconds["compiler"]),
        ("memory", estimate.needed, plain.needed),
        ("collectives", estimate.seconds["collective"], plain.seconds["collective"]),
    ):
        if ours is not None and theirs:
            parts.append(f"{label} {100 * (ours / theirs - 1):+.2f}%")
    return f"against plain next-token prediction: {', '.join(parts)}"


def advice(estimate: Estimate, experiment: AbstractExperiment) -> str:
    """What to change so that a program fits; '' if it does."""
    if estimate.fits:
        return ""
    llm, memory = experiment.config.llm, estimate.memory
    moments = experiment.config.optimizer.moments
    lacking = (estimate.needed - estimate.available) / _GiB
    shards = experiment.mesh.shape["fsdp"] * experiment.mesh.shape["tensor"]
    weights, available = experiment.weight_bytes, estimate.available
    heavy = weights / shards > available / 3 or (memory and memory.arguments > available / 2)
    trains = estimate.program == "train"
    options = {
        f"split the weights ({weights / _GiB:.1f} GiB, now over {shards}) over more devices: "
        "mesh.tensor, mesh.fsdp": heavy,
        "llm.dtype=bfloat16": heavy and llm.dtype == "float32" and llm.train == "lora",
        "llm.train=lora": heavy and trains and llm.train == "full",
        "optimizer.moments=factored": trains and llm.train == "full" and moments != "factored",
        "llm.remat=full": trains and llm.remat != "full",
        "more training.micro_batches": trains and llm.train == "lora",
        "a smaller training.batch_size, or more devices for it (mesh.data)": trains,
        "shorter training.buckets and prompt.max_tokens": trains,
        "a smaller inference.batch_size or more devices for it (mesh.data)": not trains,
        "fewer decoding.beams": estimate.program == "search" and not experiment.answers,
    }
    helpful = "; or ".join(option for option, helps in options.items() if helps)
    return f"{estimate.program} lacks {lacking:.2f} GiB: {helpful}"


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
    of_work = ("flops", "bytes", "unknown_loops", "host_transfers")
    return {
        "fits": estimate.fits,
        "memory": memory and memory._asdict(),
        "needed_bytes": estimate.needed,
        "available_bytes": estimate.available,
        "collectives": estimate.collectives,
        "compile_seconds": estimate.compile_seconds,
        **{f"{name}_seconds": time for name, time in estimate.seconds.items()},
        **{name: work and getattr(work, name) for name in of_work},
    }
