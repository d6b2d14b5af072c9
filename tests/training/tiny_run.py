"""A training run of a tiny decoder through the real batches, step, checkpoints and loop.

For tests that kill it, break it or move it to other devices: `start` runs it in a process of its
own, forked from a server that has imported everything, which takes a fraction of a second.
"""

import functools
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import forked
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.core.decisions import title_decisions
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.item_tokens import TextEncoder, tokenise_items
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.distributed.multihost import join_job, leave_job
from tca4rec_jax.distributed.sharded_projection import cf_arrays, cf_shardings
from tca4rec_jax.distributed.sharding import (
    local_rows,
    make_mesh,
    put,
    replicated,
    shard_batch,
    tree_shardings,
)
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters
from tca4rec_jax.recommenders import GENERATIVE
from tca4rec_jax.training.batches import Batches
from tca4rec_jax.training.checkpoint import Checkpoints
from tca4rec_jax.training.examples import build_examples, row_of_example
from tca4rec_jax.training.fault_tolerance import STOPPED, CheckpointError, Stopped
from tca4rec_jax.training.loop import LoopOptions, run_loop
from tca4rec_jax.training.optimizer import OptimizerConfig, make_optimizer
from tca4rec_jax.training.state import TrainState
from tca4rec_jax.training.step import make_train_step
from tca4rec_jax.training.throughput import Peak
from tca4rec_jax.training.validation import Validation, ValidationConfig

TITLES = ("ab", "abc", "b", "ad", "bd", "c")
BATCH, STEPS = 8, 60


class ArrayStore:
    """A CF store in memory."""

    def __init__(self, vectors, item_table):
        self.vectors, self.item_table, self.item_bias = vectors, item_table, None

    def read(self, positions):
        return self.vectors[positions]


def sequences() -> ItemSequences:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, 40)
    items = rng.integers(0, len(TITLES), lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return ItemSequences(np.arange(lengths.size) + 100, items, offsets, np.full(items.size, -1))


def make_params(config) -> dict[str, np.ndarray]:
    """Of the sizes of `init_params`, by NumPy: every process would trace and load its programs."""
    rng, scale = np.random.default_rng(2), config.hidden_size**-0.5
    return {
        path: np.ones(shape, np.float32)
        if path.endswith("_norm")
        else rng.normal(0, scale, shape).astype(np.float32)
        for path, shape in config.parameter_shapes.items()
    }


def run(
    folder,
    *,
    steps=STEPS,
    mesh=(-1, 1, 1),
    not_finite=(),
    step_hook=None,
    dropout=0.1,
    rank=4,
    every=20,
    validate_every=0,
    batch_hook=None,
    **options,
):
    """Trains in `folder` to its last step; the final parameters are the return value.

    Args:
      mesh: sizes of (data, fsdp, tensor).
      every: steps from one checkpoint to the next.
      not_finite: flat positions of `sequences()` whose CF vectors are infinite.
      step_hook: called with the number of every batch before it is trained on.
      validate_every: steps between validations, of the sum of the parameters in three batches.
      batch_hook: called with (the step, the batch) of a validation.
      options: of LoopOptions.
    """
    mesh, split, folder = make_mesh(*mesh), sequences(), Path(folder)
    letters = TextEncoder(*2 * [lambda text: [ord(c) for c in text]])
    tokens = tokenise_items({"title": TITLES}, letters, PromptTemplate(("P{history}\n{target}",)))
    compressed = ItemTrie.build(tokens.written).compress()
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(split.items.size, 4)).astype(np.float32)
    table = rng.normal(size=(len(TITLES), 4)).astype(np.float32)
    vectors[list(not_finite)] = np.inf
    store = ArrayStore(vectors, table)
    config = DecoderConfig(128, 32, 64, 1, 4, 2, 8, max_positions=64)
    lora = LoRAConfig(rank=rank, dropout=dropout, targets="(q|v)_proj")
    adapters = init_adapters(config, lora, jax.random.key(1))
    decoder = Decoder(config, make_params(config), lora=lora, adapters=adapters)
    decisions = title_decisions(compressed)
    examples = build_examples(split, tokens, decisions, targets="all", max_tokens=32)
    rows = functools.partial(local_rows, mesh)
    batches = Batches(examples, store, batch_size=BATCH, seed=0, buckets=(32,), local_rows=rows)
    optimizer = make_optimizer(OptimizerConfig(1e-2, warmup_steps=2), STEPS)
    graph, params, base = nnx.split(decoder, nnx.LoRAParam, ...)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    state, base = (put(tree, tree_shardings(mesh, config, tree)) for tree in (state, base))
    items, trie = cf_arrays(mesh, CFItems(store.item_table), compressed)
    items, trie = put((items, trie), cf_shardings(mesh, items, trie))
    objective = Objective(0.3, 1.0, 1.0, "cross_entropy", "children")
    objective = put(jax.tree.map(jnp.float32, objective), replicated(mesh))
    step = make_train_step(graph, state, base, optimizer, GENERATIVE.loss, mesh)
    row_R = row_of_example(examples, split)

    def metrics_of(state, after_batch):
        for batch in range(3):
            if batch_hook:
                batch_hook(int(state.step), batch)
            after_batch()
        return {"nll": float(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state.params)))}

    if validate_every:
        settings = ValidationConfig(validate_every)
        options["validation"] = Validation(settings, validate_every, metrics_of)
    state = run_loop(
        lambda state, batch: step(state, base, shard_batch(mesh, batch), items, trie, objective),
        state,
        _Hooked(batches, step_hook) if step_hook else batches,
        Checkpoints(folder / "checkpoints"),
        LoopOptions(
            directory=folder,
            total_steps=steps,
            checkpoint_every=every,
            inputs="",
            flops_per_token=1.0,
            peak=Peak(1e9, "measured"),
            describe=lambda example: f"row {row_R[example]} (user {split.user[row_R[example]]})",
            **options,
        ),
    )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]


class _Hooked:
    """Batches that tell of each one before it is handed out."""

    def __init__(self, batches, hook):
        self._batches, self._hook = batches, hook

    def __getattr__(self, name):
        return getattr(self._batches, name)

    def iterator(self, start, stop):
        for step, batch in enumerate(self._batches.iterator(start, stop), start):
            self._hook(step)
            yield batch


def start(folder, *, devices=1, job=(), kill_at=None, kill_in_save=None, **options):
    """A process that runs `run`; its final parameters are in folder/final.npz, its output in .out.

    Args:
      devices: of the process, on CPU.
      job: (coordinator, count, index) for one of several processes.
      kill_at: SIGKILL before this step, or of (a step, a batch) before this of its validation.
      kill_in_save: (step, seconds): SIGKILL so long after the save of a step was begun.
      options: of `_in_process` and `run`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    return forked.start(_in_process, str(folder), devices, job, kill_at, kill_in_save, options)


def output(folder, index=0) -> str:
    return (Path(folder) / f"{index}.out").read_text()


def final(folder) -> list[np.ndarray]:
    with np.load(Path(folder) / "final.npz") as saved:
        return [saved[name] for name in saved.files]


def _in_process(folder, devices, job, kill_at, kill_in_save, options):
    index = job[2] if job else 0
    out = os.open(f"{folder}/{index}.out", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = sys.__stderr__ = os.fdopen(out, "w", buffering=1)
    jax.config.update("jax_num_cpu_devices", devices)
    forked.keep_programs()
    logging.use_absl_handler()
    if job:
        join_job(*job)
    small_files_at = options.pop("small_files_at", None)
    pace, batch_pace = options.pop("pace", 0.0), options.pop("batch_pace", 0.0)

    def batch_hook(*step_and_batch):
        print("validates", *step_and_batch, flush=True)
        time.sleep(batch_pace)
        if step_and_batch == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(step):
        time.sleep(pace)
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == small_files_at:  # as good as a full disk to a checkpoint, not to the log
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    if kill_in_save:
        _kill_in_save(*kill_in_save)
    try:
        parameters = run(folder, step_hook=hook, batch_hook=batch_hook, **options)
    except Stopped as stopped:
        print(stopped, flush=True)
        leave_job()
        os._exit(STOPPED)
    except (CheckpointError, FloatingPointError, ValueError, jax.errors.JaxRuntimeError) as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        print(f"\n{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    if index == 0:
        np.savez(f"{folder}/final.npz", *parameters)
    sys.stdout.flush()


def _kill_in_save(step, seconds):
    save = Checkpoints.save

    def slow(self, state, *args):
        if int(state.step) == step:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        save(self, state, *args)

    Checkpoints.save = slow
