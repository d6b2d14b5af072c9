"""A LoRA training step of SmolLM2-135M: ours against transformers, peft and PyTorch, side by side.

    python launch/benchmarks/train_step.py --data=<folder of a published data set> [--steps=8]
    python launch/benchmarks/train_step.py --data=<..> --architecture=llama-3.2-1b  # random

The folder has the published layout (item.csv, train_10000.csv, ...), for example Office_Products.
Every contestant has a process of its own and they take turns, one step each, so that a machine that
is faster at one time than at another is so for all of them; together they hold 21 GB (--only leaves
some out). They see the same rows (a history of ten titles and one target) and start from the same
weights and adapters (rank 8 on q, k, v, o; no dropout), with the same optimiser and schedule; the
CF logits are random. Contestants:

  ours               soft NTP (log_expectation) with the softmax over the trie's children (MSL)
  PyTorch, plain     the same objective as most people would write it: vocabulary logits of the
                     whole sequence, p_cf by a loop over rows and positions, dense masks and labels
  ours, NTP          plain next-token prediction, cross-entropy over the vocabulary
  PyTorch, floor     the same with the vocabulary's logits at the target's positions only: the least
                     that PyTorch has to do

PyTorch (needs torch, transformers and peft) runs under glibc's default allocator and again with one
that keeps its pages; on a GPU all compute there, and it runs once. The losses of the first two, and
of the last two, are those of one training: the table shows the last and the largest difference to
ours on the way. Times are medians of the steps after --warm_up ones, "CPU s" what all threads took
together (on a busy machine the fairer one); "of ours" is the median over the rounds of a
contestant's time by that of its twin of ours. Memory is the peak of the whole process, weights,
compilation and all, or of the GPU's allocator; ours does without PyTorch, which transformers
imports where it is installed, and has the environment of launch/quickstart.sh (huge pages).
MFU counts 4 FLOPs per weight of the layers and token (and attention; LoRA computes no gradient of a
base weight) against the peak of the GPU's data sheet, or on CPU against matrix products of this
machine, which XLA measures in every round (ceiling).
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from measuring import (
    PAGES_REUSED,
    QUICKSTART_MALLOC,
    Contestant,
    peak_memory_mb,
    share_the_gpu,
)
from train_step_inputs import (
    ALPHA,
    BETA,
    FORM,
    LORA,
    OPTIMIZER,
    TAU,
    Case,
    Inputs,
    random_weights,
)

from tca4rec_jax.data.downloads import fetch_file
from tca4rec_jax.launching import start
from tca4rec_jax.reporting import show_table, write_results
from tca4rec_jax.training.throughput import mean_context

_DATA = flags.DEFINE_string("data", None, "Folder of a data set in the published layout.")
_WEIGHTS = flags.DEFINE_string("weights", "smollm2-135m-instruct", "A GGUF file or its name.")
_ARCHITECTURE = flags.DEFINE_string(
    "architecture", "", "Random weights of this architecture (and the tokens of --weights)."
)
_ATTENTION = flags.DEFINE_string("attention", "xla", "Of ours: llm.attention.")
_BATCH = flags.DEFINE_integer("batch", 4, "Rows of a step.")
_STEPS = flags.DEFINE_integer("steps", 8, "Timed steps.")
_WARM_UP = flags.DEFINE_integer("warm_up", 2, "Steps before them.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of weights and activations.")
_ONLY = flags.DEFINE_list("only", [], "Contestants; all by default.")
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file for the numbers and the loss curves.")
_CASE = flags.DEFINE_string("case", None, "Internal: the one case this process measures, as JSON.")

REUSED = ", pages reused"
TWINS = {"ours": "PyTorch, plain", "ours, NTP": "PyTorch, floor"}  # of one loss
CEILING = "ceiling"
CONTESTANTS = [name for ours, theirs in TWINS.items() for name in (ours, theirs, theirs + REUSED)]


def ours(inputs: Inputs):
    """step number -> loss: our training step on one device a core."""
    import jax
    from flax import nnx

    from tca4rec_jax.core.collaborative_tokenizer import CFItems
    from tca4rec_jax.core.objective import Objective
    from tca4rec_jax.core.trie import DeviceTrie
    from tca4rec_jax.distributed.sharding import make_mesh, put, replicated, shard_batch
    from tca4rec_jax.llm.checkpoints.export import read_peft_adapter
    from tca4rec_jax.llm.checkpoints.loading import load_weights
    from tca4rec_jax.llm.config import DecoderOptions
    from tca4rec_jax.llm.decoder import Decoder
    from tca4rec_jax.recommenders import GENERATIVE
    from tca4rec_jax.training.optimizer import make_optimizer
    from tca4rec_jax.training.state import TrainState
    from tca4rec_jax.training.step import make_train_step

    start()
    case, mesh = inputs.case, make_mesh()
    dtype = jax.numpy.dtype(case.dtype)
    if case.architecture:
        architecture, params = random_weights(case.architecture)
        params = put(
            {path: value.astype(dtype) for path, value in params.items()}, replicated(mesh)
        )
    else:
        architecture, params = load_weights(
            case.weights, dtype, sharding=lambda *_: replicated(mesh)
        )
    lora, adapters = read_peft_adapter(Path(case.exported) / "adapters", architecture)
    options = DecoderOptions(attention=case.attention)
    decoder = Decoder(architecture, params, lora=lora, adapters=adapters, options=options)
    graph, adapters, base = nnx.split(decoder, nnx.LoRAParam, ...)
    optimizer = make_optimizer(OPTIMIZER, case.steps)
    soft = case.contestant == "ours"
    trie = DeviceTrie.of(inputs.compressed)
    items = CFItems(inputs.batches.store.item_table) if soft else None
    objective = Objective(
        ALPHA,
        BETA,
        TAU if soft else 1.0,
        form=FORM if soft else "cross_entropy",
        softmax="children" if soft else "vocabulary",
    )
    objective = jax.tree.map(np.float32, objective)
    state = TrainState(np.int32(0), adapters, optimizer.init(adapters))
    state, base, items, trie, objective = put(
        (state, base, items, trie, objective), replicated(mesh)
    )
    update = make_train_step(graph, state, base, optimizer, GENERATIVE.loss, mesh)

    def step(number: int) -> float:
        nonlocal state
        batch = shard_batch(mesh, inputs.batches.gather(inputs.rows(number)))
        state, metrics = update(state, base, batch, items, trie, objective)
        return float(metrics.loss)

    return step


def ceiling(dtype: str):
    """() -> FLOP/s of matrix products."""
    from tca4rec_jax.distributed.sharding import make_mesh
    from tca4rec_jax.training.throughput import peak_flops

    start()
    mesh = make_mesh()
    return lambda: peak_flops(mesh, dtype).flops


def default_contestants() -> list[str]:
    import jax

    on_cpu = jax.default_backend() == "cpu"
    return [name for name in CONTESTANTS if on_cpu or not name.endswith(REUSED)]


def take_turns(case: Case) -> None:
    """Runs in a contestant's process: a step for every line that it is sent, answered with JSON."""
    if case.contestant == CEILING:
        peak = ceiling(case.dtype)
        print("ready", flush=True)
        for _ in sys.stdin:
            print(json.dumps({"peak_flops": peak()}), flush=True)
        return
    if case.contestant in TWINS:
        sys.modules["torch"] = None  # as where it is not installed
        step_of = ours
    else:
        from train_step_pytorch import pytorch as step_of
    inputs = Inputs(case)
    step = step_of(inputs)
    print("ready", flush=True)
    for line in sys.stdin:
        rows = inputs.rows(int(line))
        began, cpu_began = time.perf_counter(), time.process_time()
        loss = step(int(line))
        answer = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu_began,
            "loss": loss,
            "tokens": int(inputs.batches.examples.tokens.lengths[rows].sum()),
            "context": mean_context(inputs.batches.examples.tokens.lengths[rows]),
            "memory_mb": peak_memory_mb(),
        }
        print(json.dumps(answer), flush=True)


def measure(cases: list[Case]) -> dict[str, list[dict]]:
    """{contestant: what it says of each step}; all take turns, and who fails is left out."""
    contestants = {}
    for case in cases:
        environment = PAGES_REUSED if case.contestant.endswith(REUSED) else {}
        if case.contestant in TWINS:
            environment = QUICKSTART_MALLOC
        elif case.contestant != CEILING:
            environment = environment | {"JAX_PLATFORMS": "cpu"}  # the schedule's
        contestants[case.contestant] = Contestant(
            __file__, dataclasses.asdict(case), environment=environment
        )
    for number in range(cases[0].steps):
        for name, one in contestants.items():
            if one.failure is None and one.step(number) and name != CEILING:
                print(f"{name}, step {number}: {one.steps[-1]['seconds']:.2f} s")
    for name, one in contestants.items():
        one.end()
        if one.failure:
            print(f"{name} is left out: {one.failure}")
    return {name: one.steps for name, one in contestants.items() if one.failure is None}


def export(folder: Path, weights: Path):
    """The base model and fresh adapters as transformers and peft read them; the architecture."""
    import jax

    from tca4rec_jax.llm.checkpoints.export import export_decoder
    from tca4rec_jax.llm.checkpoints.loading import load_weights
    from tca4rec_jax.llm.decoder import Decoder
    from tca4rec_jax.llm.lora import init_adapters
    from tca4rec_jax.llm.tokenizer import load_tokenizer

    if _ARCHITECTURE.value:
        architecture, params = random_weights(_ARCHITECTURE.value)
    else:
        architecture, params = load_weights(weights, jax.numpy.float32)
    adapters = init_adapters(architecture, LORA, jax.random.key(0))
    decoder = Decoder(architecture, params, lora=LORA, adapters=adapters)
    for kind, name in (("base", "base"), ("peft", "adapters")):
        export_decoder(
            folder / name, decoder, load_tokenizer(weights), kind=kind,
            dtype=decoder.embedding.dtype.name, base_model=str(weights),
        )  # fmt: skip
    return architecture


def table(found: dict[str, list[dict]], architecture, dtype: str, warm_up: int) -> dict:
    """{contestant: numbers to print} for one dtype."""

    def of_steps(name: str, field: str) -> np.ndarray:
        return np.array([step[field] for step in found[name][warm_up:]])

    rows = {}
    for name, steps in found.items():
        if name == CEILING:
            continue
        twin = "ours, NTP" if name.startswith(("ours, NTP", "PyTorch, floor")) else "ours"
        seconds, tokens = of_steps(name, "seconds"), of_steps(name, "tokens")
        context = of_steps(name, "context").mean()
        flops = architecture.flops_per_token("lora", context=context, vocabulary_share=0.0)
        rows[f"{dtype}, {name}"] = {
            "s a step": float(np.median(seconds)),
            "CPU s": float(np.median(of_steps(name, "cpu_seconds"))),
            "tokens/s": float(np.median(tokens / seconds)),
            "peak MB": steps[-1]["memory_mb"],
            "last loss": steps[-1]["loss"],
        }
        if CEILING in found:
            used = flops * tokens / seconds / of_steps(CEILING, "peak_flops")
            rows[f"{dtype}, {name}"]["MFU"] = float(np.median(used))
        if twin in found:
            apart = [abs(a["loss"] - b["loss"]) for a, b in zip(steps, found[twin], strict=True)]
            rows[f"{dtype}, {name}"] |= {
                "of ours": float(np.median(seconds / of_steps(twin, "seconds"))),
                "loss apart": max(apart),
            }
    return rows


def main(argv):
    del argv
    if _CASE.value:
        take_turns(Case(**json.loads(_CASE.value)))
        return
    if not _DATA.value:
        raise app.UsageError("--data is missing: a folder in the published layout")
    weights = Path(_WEIGHTS.value)
    weights = weights if weights.is_file() else fetch_file(_WEIGHTS.value)
    share_the_gpu()
    steps, numbers, rows = _WARM_UP.value + _STEPS.value, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        architecture = export(Path(folder), weights)
        for dtype in _DTYPES.value:
            cases = [
                Case(
                    contestant=name,
                    dtype=dtype,
                    data=_DATA.value,
                    weights=str(weights),
                    architecture=_ARCHITECTURE.value,
                    attention=_ATTENTION.value,
                    exported=folder,
                    batch=_BATCH.value,
                    steps=steps,
                )
                for name in (CEILING, *(_ONLY.value or default_contestants()))
            ]
            numbers[dtype] = measure(cases)
            rows |= table(numbers[dtype], architecture, dtype, _WARM_UP.value)
    title = f"LoRA step, batch {_BATCH.value}, {architecture.num_layers} layers"
    show_table(rows, title=title, digits=3)
    if _OUTPUT.value:
        write_results(Path(_OUTPUT.value), {"table": rows, "steps": numbers})


if __name__ == "__main__":
    app.run(main)
