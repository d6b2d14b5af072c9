"""A LoRA training step of SmolLM2-135M: ours against transformers, peft and PyTorch, side by side.

    python launch/benchmarks/train_step.py --data=<folder of a published data set> [--steps=8]
    python launch/benchmarks/train_step.py --data=<..> --architecture=llama-3.2-1b  # random
    python launch/benchmarks/train_step.py --data=<..> --variants=xla/products,cudnn/none

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
  PyTorch, compiled  the floor with every layer under torch.compile, adapters and backward pass
                     included, and rows padded to the bucket's length; left out on CPU unless --only
                     names it

PyTorch (needs torch, transformers and peft) attends with its fused kernels (sdpa). It runs under
glibc's default allocator and again with one that keeps its pages; on a GPU all compute there, and
it runs once. The losses of the first two, and of the last three, are those of one training: the
table shows the last and the largest difference to ours on the way. --variants are what ours runs
with (llm.attention/llm.remat): the first everywhere, each further one as a contestant more with the
loss of "ours". On a GPU the contestants load at the same time, and compile so in their first step
(--together). Times are medians of the steps after --warm_up ones, "CPU s" what all threads took
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
from tca4rec_jax.llm.config import DecoderOptions
from tca4rec_jax.reporting import show_table, write_results
from tca4rec_jax.training.throughput import mean_context

_DATA = flags.DEFINE_string("data", None, "Folder of a data set in the published layout.")
_WEIGHTS = flags.DEFINE_string(
    "weights", "smollm2-135m-instruct", "A GGUF file, its name or a Hugging Face folder."
)
_ARCHITECTURE = flags.DEFINE_string(
    "architecture", "", "Random weights of this architecture (and the tokens of --weights)."
)
_VARIANTS = flags.DEFINE_list("variants", ["xla/products"], "Of ours: llm.attention/llm.remat.")
_BATCH = flags.DEFINE_integer("batch", 4, "Rows of a step.")
_STEPS = flags.DEFINE_integer("steps", 8, "Timed steps.")
_WARM_UP = flags.DEFINE_integer("warm_up", 2, "Steps before them.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of weights and activations.")
_ONLY = flags.DEFINE_list("only", [], "Contestants, and the further variants; default: all.")
_TOGETHER = flags.DEFINE_enum(
    "together",
    None,
    ["nothing", "loading", "compiling"],
    "What contestants do at the same time; compiling: loading too. Default on a GPU compiling.",
)
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file for the numbers and the loss curves.")
_CASE = flags.DEFINE_string("case", None, "Internal: the one case this process measures, as JSON.")

REUSED = ", pages reused"
SOFT, PLAIN = "ours", "PyTorch, plain"  # of one loss
NTP, FLOOR, COMPILED = "ours, NTP", "PyTorch, floor", "PyTorch, compiled"  # of another
CEILING = "ceiling"
ON_CPU = [SOFT, PLAIN, PLAIN + REUSED, NTP, FLOOR, FLOOR + REUSED]
ON_GPU = [SOFT, PLAIN, NTP, FLOOR, COMPILED]


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
    from tca4rec_jax.llm.decoder import Decoder
    from tca4rec_jax.recommenders import GENERATIVE
    from tca4rec_jax.training.optimizer import make_optimizer
    from tca4rec_jax.training.state import TrainState
    from tca4rec_jax.training.step import make_train_step

    start()
    case, mesh = inputs.case, make_mesh()
    if case.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "float32")  # as PyTorch on a GPU
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
    options = DecoderOptions(attention=case.attention, remat=case.remat)
    decoder = Decoder(architecture, params, lora=lora, adapters=adapters, options=options)
    graph, adapters, base = nnx.split(decoder, nnx.LoRAParam, ...)
    optimizer = make_optimizer(OPTIMIZER, case.steps)
    soft = case.contestant != NTP
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


def is_ours(name: str) -> bool:
    return name.startswith(SOFT)


def twin(name: str) -> str:
    """The contestant of ours with the same loss."""
    return NTP if name.startswith((NTP, FLOOR, COMPILED)) else SOFT


def on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def contestants() -> dict[str, DecoderOptions]:
    """The names of all that take part, and what those of ours run with."""
    if unknown := set(_ONLY.value) - {*ON_CPU, *ON_GPU}:
        raise app.UsageError(f"--only: no contestant {sorted(unknown)[0]!r}")
    names = _ONLY.value or (ON_CPU if on_cpu() else ON_GPU)
    options = {}
    for variant in _VARIANTS.value:
        attention, _, remat = variant.partition("/")
        options[f"{SOFT}, {variant}"] = DecoderOptions(attention=attention, remat=remat)
    first, *others = options
    return dict.fromkeys([CEILING, *names], options[first]) | {n: options[n] for n in others}


def without_pytorch() -> None:
    """This process is as if it were not installed."""
    from transformers.utils import import_utils

    sys.modules |= dict.fromkeys(["torch", "torchvision", "torchaudio"])
    for name, asked in vars(import_utils).items():  # when transformers was imported
        if name.startswith("is_torch") and hasattr(asked, "cache_clear"):
            asked.cache_clear()


def take_turns(case: Case) -> None:
    """Runs in a contestant's process: a step for every line that it is sent, answered with JSON."""
    if case.contestant == CEILING:
        peak = ceiling(case.dtype)
        print("ready", flush=True)
        for _ in sys.stdin:
            print(json.dumps({"peak_flops": peak()}), flush=True)
        return
    if is_ours(case.contestant):
        without_pytorch()
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


def measure(cases: list[Case], together: str) -> dict[str, list[dict]]:
    """{contestant: what it says of each step}; all take turns, and who fails is left out.

    together: as the flag.
    """
    contestants = {}
    for case in cases:
        environment = PAGES_REUSED if case.contestant.endswith(REUSED) else {}
        if is_ours(case.contestant):
            environment = QUICKSTART_MALLOC
        elif case.contestant != CEILING:
            environment = environment | {"JAX_PLATFORMS": "cpu"}  # the schedule's
        contestants[case.contestant] = Contestant(
            __file__,
            dataclasses.asdict(case),
            environment=environment,
            wait=together == "nothing",
        )
    if together != "nothing":
        for one in contestants.values():
            one.wait()
    for number in range(cases[0].steps):
        at_once = number == 0 and together == "compiling"
        for one in contestants.values() if at_once else ():
            one.ask(number)
        for name, one in contestants.items():
            if one.failure is not None:
                continue
            taken = one.answered() if at_once else one.step(number)
            if taken and name != CEILING:
                print(f"{name}, step {number}: {one.steps[-1]['seconds']:.2f} s")
    for name, one in contestants.items():
        one.end()
        if one.failure:
            print(f"{name} is left out: {one.failure}")
    return {name: one.steps for name, one in contestants.items() if one.failure is None}


def export(folder: Path, weights: Path):
    """The base model and fresh adapters as transformers and peft read them; the architecture.

    In bfloat16 where nothing wider is measured, or known: random weights have no more.
    """
    import jax

    from tca4rec_jax.llm.checkpoints.export import write_hugging_face, write_peft_adapter
    from tca4rec_jax.llm.checkpoints.loading import load_weights
    from tca4rec_jax.llm.lora import init_adapters
    from tca4rec_jax.llm.tokenizer import load_tokenizer

    if _ARCHITECTURE.value:
        architecture, params = random_weights(_ARCHITECTURE.value)
    else:
        dtype = "bfloat16" if set(_DTYPES.value) == {"bfloat16"} else "float32"
        architecture, params = load_weights(weights, jax.numpy.dtype(dtype))
    adapters = init_adapters(architecture, LORA, jax.random.key(0))
    params, adapters = jax.device_get((params, adapters))  # one copy, and layers are cut here
    dtype, tokenizer = params["embedding"].dtype.name, load_tokenizer(weights)
    write_hugging_face(folder / "base", architecture, params, tokenizer, dtype=dtype)
    write_peft_adapter(folder / "adapters", architecture, LORA, adapters, base_model=str(weights))
    return architecture


def table(found: dict[str, list[dict]], architecture, dtype: str, warm_up: int) -> dict:
    """{contestant: numbers to print} for one dtype."""

    def of_steps(name: str, field: str) -> np.ndarray:
        return np.array([step[field] for step in found[name][warm_up:]])

    rows = {}
    for name, steps in found.items():
        if name == CEILING:
            continue
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
        if (of_ours := twin(name)) in found:
            pairs = zip(steps, found[of_ours], strict=True)
            apart = [abs(a["loss"] - b["loss"]) for a, b in pairs]
            rows[f"{dtype}, {name}"] |= {
                "of ours": float(np.median(seconds / of_steps(of_ours, "seconds"))),
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
    weights = weights if weights.exists() else fetch_file(_WEIGHTS.value)
    share_the_gpu()
    without_pytorch()
    together = _TOGETHER.value or ("nothing" if on_cpu() else "compiling")
    numbers, rows = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            Case(
                contestant=name,
                dtype=dtype,
                data=_DATA.value,
                weights=str(weights),
                architecture=_ARCHITECTURE.value,
                attention=options.attention,
                remat=options.remat,
                exported=folder,
                batch=_BATCH.value,
                steps=_WARM_UP.value + _STEPS.value,
            )
            for dtype in _DTYPES.value
            for name, options in contestants().items()
        ]
        Inputs(cases[0]).check_rows()
        architecture = export(Path(folder), weights)
        for dtype in _DTYPES.value:
            numbers[dtype] = measure([case for case in cases if case.dtype == dtype], together)
            rows |= table(numbers[dtype], architecture, dtype, _WARM_UP.value)
    title = f"LoRA step, batch {_BATCH.value}, {architecture.num_layers} layers"
    show_table(rows, title=title, digits=3)
    if _OUTPUT.value:
        write_results(Path(_OUTPUT.value), {"table": rows, "steps": numbers})


if __name__ == "__main__":
    app.run(main)
