"""Projection and loss, forward and backward: ours against a PyTorch loop and dense masks in JAX.

    python launch/benchmarks/collaborative_tokenizer.py          # 10 thousand to 1 million items
    python launch/benchmarks/collaborative_tokenizer.py --items=10000 --vocabularies=49152 \\
        --config=configs/quickstart.py --workdir=runs/quickstart

Every case runs in a process of its own, one after the other. Titles are drawn from the tokens of
the MovieLens-100K titles (a Markov chain: prefixes are shared as in a real catalogue); a row has
one target. Contestants, with the softmax over the vocabulary unless it says children (MSL):

  ours                    node_log_mass (segment_sum over the trie) and the loss; jitted
  ours (children)         the same, softmax over the trie's children
  dense JAX               [batch, positions, items] masks; jitted; left out where they don't fit
  PyTorch                 a loop over batch and position, a dictionary trie and scatter_add, on the
                          logits of the whole sequence, prompt included, as a model of transformers
                          returns them: as most people would write it; needs torch
  PyTorch, title only     the same on the logits of the title's tokens alone

PyTorch runs under glibc's default allocator and again with one that keeps its pages
(MALLOC_MMAP_MAX_=0 and so on; ours always does). Its dictionary is not timed. Every contestant is
called untimed until a call takes no new pages, five times at most.

With --config and --workdir of a run whose data and CF logits are prepared, the whole training step
of its LLM is timed too, with and without the projection, step by step in turn.

Time is the median of the repeats; memory is the peak beyond the inputs and the gradient.
Axis letters: B batch, T title tokens, I items, V vocabulary, C children, K decisions of a title.
"""

import dataclasses
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from catalogues import movielens_titles, sample_titles
from measuring import cf_distributions_loop, memory_mb, prefixes, restart_peak, run_alone

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.launching import CONFIG, WORKDIR, start
from tca4rec_jax.memory import keep_freed_pages
from tca4rec_jax.reporting import show_table, write_results

_ITEMS = flags.DEFINE_list("items", ["10000", "100000", "1000000"], "Sizes of the catalogue.")
_VOCABULARIES = flags.DEFINE_list("vocabularies", ["49152", "128256"], "Sizes of the vocabulary.")
_BATCH = flags.DEFINE_integer("batch", 16, "Rows, each with one target.")
_PROMPT = flags.DEFINE_integer("prompt", 128, "Tokens before the title.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each contestant.")
_STEPS = flags.DEFINE_integer("steps", 20, "Timed training steps of each kind.")
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file for the numbers.")
_CASE = flags.DEFINE_string("case", None, "Internal: the one case this process measures, as JSON.")

ALPHA, BETA, TAU, FORM = 0.1, 1.0, 1.0, "log_expectation"
UNTIMED = 5  # calls at most
FEW_PAGES = 1000
DENSE_LIMIT_BYTES = 4 << 30  # of one [B, T, I] array
TITLE_ONLY, REUSED = ", title only", ", pages reused"
PYTORCH = [f"PyTorch{part}{pages}" for part in ("", TITLE_ONLY) for pages in ("", REUSED)]
CONTESTANTS = ("ours", "ours (children)", "dense JAX", *PYTORCH)


@dataclasses.dataclass(frozen=True)
class Case:
    contestant: str
    catalogue: str  # file written by `write_catalogue`
    vocabulary: int
    batch: int
    prompt: int
    repeats: int


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What every contestant gets; the rest of its preparation is not timed."""

    titles: Ragged  # int32 [I]
    target_B: np.ndarray  # int64
    label_BxT: np.ndarray  # int32, 0 behind the end
    weight_BxT: np.ndarray  # float32
    cf_BxI: np.ndarray  # float32
    logits_BxTxV: np.ndarray  # float32


def write_catalogue(path: Path, titles: Ragged) -> None:
    np.savez(path, values=titles.values, offsets=titles.offsets)


def make_inputs(case: Case) -> Inputs:
    with np.load(case.catalogue) as file:
        titles = Ragged(file["values"], file["offsets"])
    rng = np.random.default_rng(1)
    target_B = rng.choice(len(titles), case.batch, replace=False)
    lengths_B = titles.lengths[target_B]
    longest = int(lengths_B.max())
    return Inputs(
        titles,
        target_B,
        titles.pad(target_B, longest, 0).astype(np.int32),
        (np.arange(longest) < lengths_B[:, None]).astype(np.float32),
        rng.normal(0, 2, (case.batch, len(titles))).astype(np.float32),
        rng.standard_normal((case.batch, longest, case.vocabulary), np.float32) * 3,
    )


def ours(inputs: Inputs, children: bool):
    """A function of nothing that computes (loss, gradient) by segment sums over the trie."""
    from tca4rec_jax.core.collaborative_tokenizer import DENSE
    from tca4rec_jax.core.decisions import Targets, title_decisions
    from tca4rec_jax.core.losses import of_logits, tca_loss
    from tca4rec_jax.core.objective import Objective
    from tca4rec_jax.core.trie import DeviceTrie

    compressed = ItemTrie.build(inputs.titles).compress()
    trie = DeviceTrie.of(compressed)
    decisions = title_decisions(compressed).pad(inputs.target_B)
    objective = Objective(ALPHA, BETA, TAU, FORM, "children" if children else "vocabulary")

    def loss(logits_BxTxV, cf_BxI, label_BxT, weight_BxT):
        targets = Targets.of_titles(label_BxT, weight_BxT, decisions)
        cf_Bx1xI = cf_BxI[:, None, :]
        sums = tca_loss(logits_BxTxV, of_logits, targets, cf_Bx1xI, DENSE, trie, objective)
        return sums.total / sums.positions

    return _jitted(loss, inputs)


def dense(inputs: Inputs):
    """The same by masks [B, T, I] and dense [B, T, V] soft labels."""
    import jax
    import jax.numpy as jnp

    batch, longest = inputs.label_BxT.shape
    item_I = np.arange(len(inputs.titles))
    token_IxL = inputs.titles.pad(item_I, int(inputs.titles.lengths.max()), -1)
    token_IxT = jnp.asarray(token_IxL[:, :longest], jnp.int32)

    def loss(logits_BxTxV, cf_BxI, label_BxT, weight_BxT):
        same_BxIxT = token_IxT[None] == label_BxT[:, None, :]
        agrees_BxIxT = jnp.cumprod(same_BxIxT, axis=2).astype(bool)
        below_BxIxT = jnp.pad(agrees_BxIxT[:, :, :-1], ((0, 0), (0, 0), (1, 0)), constant_values=1)
        below_BxIxT &= token_IxT[None] >= 0
        q_BxIxT = jax.nn.softmax(jnp.where(below_BxIxT, cf_BxI[:, :, None] / BETA, -1e30), axis=1)
        row, place = jnp.arange(batch)[:, None, None], jnp.arange(longest)[None, None, :]
        next_1xIxT = jnp.maximum(token_IxT, 0)[None]
        cf_BxTxV = jnp.zeros_like(logits_BxTxV).at[row, place, next_1xIxT].add(q_BxIxT)
        y_BxTxV = (1 - ALPHA) * jax.nn.one_hot(label_BxT, logits_BxTxV.shape[2]) + ALPHA * cf_BxTxV
        p_BxTxV = jax.nn.softmax(logits_BxTxV / TAU)
        loss_BxT = -jnp.log(jnp.sum(y_BxTxV * p_BxTxV, axis=2))
        return jnp.sum(loss_BxT * weight_BxT) / jnp.sum(weight_BxT)

    return _jitted(loss, inputs)


def _jitted(loss, inputs: Inputs):
    import jax

    step = jax.jit(jax.value_and_grad(loss))
    arguments = jax.device_put(
        (inputs.logits_BxTxV, inputs.cf_BxI, inputs.label_BxT, inputs.weight_BxT)
    )
    return lambda: jax.block_until_ready(step(*arguments))


def pytorch_loop(inputs: Inputs, prompt: int):
    """The same by a loop over rows and positions, on logits of `prompt` more tokens a row."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    below = {
        prefix: tuple(map(torch.tensor, lists))
        for prefix, lists in prefixes(inputs.titles, inputs.target_B).items()
    }
    titles = [inputs.titles[item].tolist() for item in inputs.target_B]
    starts = [prompt] * len(titles)
    before = ((0, 0), (prompt, 0))
    label_BxS = torch.tensor(np.pad(inputs.label_BxT, before)).long()
    weight_BxS = torch.tensor(np.pad(inputs.weight_BxT, before))
    logits_BxSxV = torch.tensor(np.pad(inputs.logits_BxTxV, (*before, (0, 0))), requires_grad=True)
    cf_BxI, vocabulary = torch.tensor(inputs.cf_BxI), logits_BxSxV.shape[2]

    def step():
        logits_BxSxV.grad = None
        cf_BxSxV = cf_distributions_loop(below, titles, starts, cf_BxI, BETA, logits_BxSxV)
        onehot_BxSxV = torch.nn.functional.one_hot(label_BxS, vocabulary).float()
        y_BxSxV = (1 - ALPHA) * onehot_BxSxV + ALPHA * cf_BxSxV
        p_BxSxV = torch.softmax(logits_BxSxV / TAU, dim=-1)
        loss_BxS = -torch.log((y_BxSxV * p_BxSxV).sum(dim=-1))
        loss = (loss_BxS * weight_BxS).sum() / weight_BxS.sum()
        loss.backward()
        return loss.detach().numpy(), logits_BxSxV.grad.numpy()[:, prompt:]

    return step


def measure(case: Case) -> dict:
    """Milliseconds of a call, MB beyond inputs and gradient, the loss and a slope to compare."""
    inputs = make_inputs(case)
    if case.contestant.startswith("PyTorch"):
        step = pytorch_loop(inputs, 0 if TITLE_ONLY in case.contestant else case.prompt)
    else:
        keep_freed_pages()
        children = case.contestant == "ours (children)"
        step = dense(inputs) if case.contestant == "dense JAX" else ours(inputs, children)
    before = memory_mb("VmRSS")
    for call in range(UNTIMED):
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        loss, gradient = step()  # the first compiles
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages
        if call and pages < FEW_PAGES:
            break
    restart_peak()
    seconds = []
    for _ in range(case.repeats):
        began = time.perf_counter()
        loss, gradient = step()
        seconds.append(time.perf_counter() - began)
    peak = memory_mb("VmHWM") - before - gradient.nbytes / 1e6
    direction = np.random.default_rng(2).standard_normal(gradient.shape, np.float32)
    return {
        "ms": 1e3 * float(np.median(seconds)),
        "memory_mb": max(peak, 0.0),
        "loss": float(loss),
        "gradient": float(np.vdot(direction, gradient)),
    }


def training_overhead(config, workdir: Path, steps: int) -> dict:
    """Milliseconds of a training step with and without the projection, and their ratio.

    Both see the same batches, one after the other in turn; the ratio is the median over them.
    """
    import jax

    from tca4rec_jax.experiment import Experiment
    from tca4rec_jax.train import TrainStep, load_batches

    start()
    experiment = Experiment(config, workdir)
    batches, (graph, state, base) = load_batches(experiment), experiment.initial_state()
    step = {
        items is not None: TrainStep(experiment, graph, state, base, items)
        for items in (batches.cf_items, None)
    }
    states = {projected: jax.tree.map(jax.numpy.copy, state) for projected in step}
    longest = max(range(len(batches.shapes)), key=lambda b: batches.shapes[b].tokens)
    rows = [batches.rows(index) for index in range(batches.per_epoch)]
    rows = [r for r in rows if (batches.bucket_of_example[r] == longest).all()][: steps + 1]
    seconds = {True: [], False: []}
    for number, chosen in enumerate(rows):
        batch = batches.gather(chosen)
        for kind in (True, False) if number % 2 else (False, True):
            began = time.perf_counter()
            states[kind], metrics = step[kind](states[kind], batch)
            jax.block_until_ready(metrics)
            seconds[kind].append(time.perf_counter() - began)
    with_, without = (np.array(seconds[kind][1:]) for kind in (True, False))  # the first compiles
    return {
        "ms with projection": 1e3 * float(np.median(with_)),
        "ms without": 1e3 * float(np.median(without)),
        "ratio": float(np.median(with_ / without)),
    }


def main(argv):
    del argv
    if _CASE.value:
        print(json.dumps(measure(Case(**json.loads(_CASE.value)))))
        return
    real, results = movielens_titles(), {}
    with tempfile.TemporaryDirectory() as folder:
        for count in map(int, _ITEMS.value):
            titles = sample_titles(real, count, seed=0)
            path = Path(folder) / f"{count}.npz"
            write_catalogue(path, titles)
            began = time.perf_counter()
            trie = ItemTrie.build(titles)
            built = time.perf_counter() - began
            print(f"{count} items: {trie.num_nodes} trie nodes, built in {built:.2f} s")
            for vocabulary in map(int, _VOCABULARIES.value):
                for name in CONTESTANTS:
                    if name == "dense JAX" and 4 * _BATCH.value * titles.lengths.max() * count > (
                        DENSE_LIMIT_BYTES
                    ):
                        print(f"{name} is left out: one of its masks has over 4 GiB")
                        continue
                    case = Case(
                        name, str(path), vocabulary, _BATCH.value, _PROMPT.value, _REPEATS.value
                    )
                    found = run_alone(
                        __file__,
                        dataclasses.asdict(case),
                        name,
                        pages_reused=name.endswith(REUSED),
                    )
                    if found:
                        results[f"{count} items, V = {vocabulary}, {name}"] = found
                        print(f"{count} items, V = {vocabulary}, {name}: {found['ms']:.0f} ms")
    if CONFIG.value:
        found = training_overhead(CONFIG.value, Path(WORKDIR.value), _STEPS.value)
        results["training step"] = found
    show_table(results, title="Projection and loss", digits=3)
    if _OUTPUT.value:
        write_results(Path(_OUTPUT.value), results)


if __name__ == "__main__":
    app.run(main)
