"""Training an LLM: `train(experiment)`, to be read from top to bottom."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.stages import Lowered

from tca4rec_jax.config_checks import validate
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.prompts import Prompts
from tca4rec_jax.data.templates import reads_users
from tca4rec_jax.distributed.multihost import check_processes_agree, only_writing_job
from tca4rec_jax.distributed.sharded_projection import cf_shardings
from tca4rec_jax.distributed.sharding import check_batch_size, local_rows, replicated, shard_batch
from tca4rec_jax.errors import UserError, items_named
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.llm.projector import ProjectorConfig
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.recommenders.vectors import soft_rows
from tca4rec_jax.trackers import Trackers
from tca4rec_jax.training.activation_cache import ActivationCache
from tca4rec_jax.training.batches import Batch, Batches, NoLogits, mean_of_means
from tca4rec_jax.training.checkpoint import Checkpoints, checkpoints_to_fit
from tca4rec_jax.training.curriculum import Curriculum
from tca4rec_jax.training.examples import Examples, row_of_example
from tca4rec_jax.training.fault_tolerance import check_folder
from tca4rec_jax.training.loop import LoopOptions, run_loop
from tca4rec_jax.training.run_folder import COMMAND, RunFolder, inputs_of
from tca4rec_jax.training.run_inputs import is_aligned, llm_inputs, training_split
from tca4rec_jax.training.state import Metrics, TrainState, held_parts
from tca4rec_jax.training.step import StepOptions, make_train_step
from tca4rec_jax.training.temperature import check_eta
from tca4rec_jax.training.throughput import mean_context, peak_flops
from tca4rec_jax.training.validation import Validation
from tca4rec_jax.validator import Validator


def train(experiment: Experiment) -> TrainState:
    """Trains the LLM of an experiment, or goes on training it; `run_loop` says what is written.

    Raises UserError, before any step, for a field out of range, inputs that do not fit each other,
    a folder that can't be written to, or processes that were not given the same.
    """
    config, directory = experiment.config, experiment.directory
    check_folder(directory, num_bytes=0)
    check_processes_agree(config.to_json_best_effort(), "config (or flags)")
    validate(config)
    with only_writing_job(directory):
        return _train(experiment)


def _train(experiment: Experiment) -> TrainState:
    config, training = experiment.config, experiment.config.training
    validator = Validator(experiment) if experiment.validation.is_on else None

    # What the run is made from, and the one that is there.
    run = RunFolder(experiment.directory)
    made_from = Provenance("LLM run", COMMAND, experiment.training_inputs)
    check_processes_agree(made_from.fingerprint, "data, CF logits or weights")
    run.begin(made_from, config.to_json_best_effort(indent=2))

    first = first_run(experiment) if training.start_from and not run.saved_steps else None

    # Examples, batches, and the CF logits that the batches read.
    batches = load_batches(experiment)

    # The state and the step, on the devices.
    graph, state, base = experiment.initial_state()
    if first is not None:
        with Checkpoints(first.checkpoints, writable=False) as checkpoints:
            state = state._replace(params=checkpoints.restore_common(state.params))
    step = TrainStep(experiment, graph, state, base, batches.cf_items)

    validation = None
    if validator is not None:
        validation = validator.of_states(
            lambda state: experiment.decoder_from(graph, state, base), batches.per_epoch
        )

    every = validation.every if validation else 0
    count = checkpoints_to_fit(training, run.saved_steps, every)
    num_bytes = count * sum(a.nbytes for a in jax.tree.leaves(state))
    check_folder(run.path, num_bytes, f"the {count} checkpoints to come that it holds at a time")

    # The loop.
    checkpoints = Checkpoints(run.checkpoints, keep=training.keep_checkpoints)
    options = _loop_options(experiment, made_from, batches.examples, validation)
    return run_loop(step, state, batches, checkpoints, options)


def _loop_options(
    experiment: Experiment,
    made_from: Provenance,
    examples: Examples,
    validation: Validation | None,
) -> LoopOptions:
    config, directory = experiment.config, experiment.directory
    training, identity, split = config.training, inputs_of(made_from), training_split(config)
    sequences = experiment.data.splits[split]
    row_R = row_of_example(examples, sequences)

    def describe(example: int) -> str:
        row = row_R[example]
        if row < 0:
            return f"example {example}, which is of training.tasks"
        return f"row {row} of {split} (user {sequences.user[row]}, example {example})"

    return LoopOptions(
        directory=directory,
        total_steps=training.steps,
        checkpoint_every=training.checkpoint_every,
        inputs=identity,
        flops_per_token=experiment.flops_per_token(
            context=mean_context(examples.tokens.lengths),
            supervised=examples.position.values.size / examples.tokens.values.size,
        ),
        peak=peak_flops(experiment.mesh, config.llm.dtype),
        profile_steps=training.profile_steps or (0, 0),
        watchdog_seconds=training.watchdog_seconds,
        describe=describe,
        validation=validation,
        open_trackers=partial(Trackers.open, config, directory, made_from, identity),
    )


def first_run(experiment: Experiment) -> RunFolder:
    """The run whose parameters are the first of this one's (training.start_from).

    Raises FileNotFoundError if it was not trained, UserError if it is unfinished, this very run, or
    of other weights, or if parameters that both runs have mean something else there: adapters of
    another lora, a projector of other item vectors, rows of other semantic ids or tokens.
    """
    config, name = experiment.config, experiment.config.training.start_from
    run = RunFolder.of(experiment.workdir, name)
    if run.path == experiment.directory:
        raise UserError(
            f"training.start_from is {name!r}, this run itself: name another --config.run"
        )
    now = {"weights": experiment.source.identity, "llm.num_layers": config.llm.num_layers}
    run.check(now, unfinished=config.inference.unfinished)
    before, inputs = run.made_from.inputs, experiment.inference_inputs
    shared = [f"lora.{name}" for name in ("rank", "alpha", "targets", "first_layer")]
    shared += [f"projector.{field.name}" for field in dataclasses.fields(ProjectorConfig)]
    shared += ["item vectors"]
    if experiment.ids and before.get("ids"):  # rows of new tokens are by number
        shared += ["ids", "tokenizer"]
    both = before.keys() & inputs.keys()
    run.made_from.check({name: inputs[name] for name in shared if name in both}, run.path)
    return run


def load_batches(experiment: Experiment) -> Batches:
    """The batches of the training split, with the CF logits that the run reads.

    Raises UserError for fields out of range, or inputs that do not fit each other.
    """
    config, training, mesh = experiment.config, experiment.config.training, experiment.mesh
    check_batch_size(
        mesh,
        training.batch_size,
        "training.batch_size",
        micro_batches=training.micro_batches,
    )
    if experiment.objective.adapts:
        children = experiment.compressed_trie.child_count
        check_eta(config.objective.eta, int(children[int(children[0] == 1)]))
    split = training_split(config)
    with items_named(experiment.data.catalogue.item_ids):
        examples = experiment.recipe.build_examples(
            experiment.data.splits[split], experiment.items, experiment.training_trie, config
        )
    batches = Batches(
        examples,
        batch_size=training.batch_size,
        seed=config.seed,
        buckets=training.buckets,
        tokens_per_batch=training.tokens_per_batch,
        local_rows=partial(local_rows, mesh),
    )
    if training.rows_per_mean:
        decided = config.objective.mean_over == "decisions"
        averaged = examples.decisions.node if decided else examples.position
        batches.row_weights = mean_of_means(averaged.lengths, training.rows_per_mean)
    shapes = ", ".join(f"{shape.rows} x {shape.tokens}" for shape in batches.shapes)
    logging.info(
        f"{len(examples):,} examples, {examples.cf_position.values.size:,} supervised titles, "
        f"{batches.per_epoch:,} batches an epoch of {shapes} tokens, "
        f"{100 * batches.padding_share:.1f}% padding"
    )
    _read_cf(experiment, batches)
    if experiment.caches_hidden_states:  # last: the decoder reads the weights
        prefix = {"layers": experiment.frozen_prefix}
        inputs = prefix | llm_inputs(config, experiment.source.identity)
        made_from = Provenance("hidden states", "launch/train.py", inputs)
        folder = RunFolder.hidden_states(experiment.workdir, made_from)
        batches.cache = ActivationCache(folder, experiment.decoder, mesh, made_from)
    return batches


def _read_cf(experiment: Experiment, batches: Batches) -> None:
    """Gives batches the CF logits that they read, and the vectors of placeholders."""
    config, examples = experiment.config, batches.examples
    batches.store = NoLogits(experiment.trie.num_items)
    users: dict[str, Any] = {}
    if is_aligned(config) or reads_users(config.prompt):
        positions = batches.cf_positions(config.training.steps)
        store = experiment.cf_store(training_split(config), positions)
        cf = examples.cf_position
        # That of another example for one of a task, which has no user.
        target_R = cf.values[np.minimum(cf.offsets[:-1], cf.values.size - 1)]
        users = {"cf": lambda rows_B: store.read(target_R[rows_B]), "cf_items": store.cf_items}
        if is_aligned(config):
            batches.store = experiment.recipe.teacher(experiment, training_split(config), store)
    batches.soft = soft_rows(experiment, Prompts(examples.tokens, examples.slots), **users)
    if config.projector.curriculum:
        batches.curriculum = Curriculum(config.seed, config.training.steps)


class TrainStep:
    """The jitted update with all that it takes besides a state and a batch, on the mesh.

    `graph`, `state` and `base` are from Experiment.initial_state. Without the item side of the CF
    logits the step is plain next-token prediction, whatever objective.alpha is.
    """

    def __init__(
        self,
        experiment: Experiment,
        graph: nnx.GraphDef,
        state: TrainState,
        base: nnx.State,
        items: CFItems | None,
    ):
        config, self._mesh = experiment.config, experiment.mesh
        self._program = make_train_step(
            graph,
            state,
            base,
            experiment.optimizer(),
            experiment.recipe.loss,
            self._mesh,
            StepOptions(
                config.seed,
                held_parts(config),
                experiment.compute_dtype,
                config.training.micro_batches,
                config.training.steps if config.objective.alpha_last is not None else 0,
            ),
        )
        items, trie = experiment.cf_arrays(items)
        items, trie = experiment.put((items, trie), cf_shardings(self._mesh, items, trie))
        objective = jax.tree.map(jnp.float32, experiment.objective.check())
        objective = experiment.put(objective, replicated(self._mesh))
        self._base, self._inputs = base, (items, trie, objective)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update; the batch holds this process' rows, the state is donated."""
        return self._program(state, self._base, shard_batch(self._mesh, batch), *self._inputs)

    def lower(self, state: TrainState, batch: Batch) -> Lowered:
        """The lowered update of a state and a batch on the mesh, which may be abstract."""
        return self._program.lower(state, self._base, batch, *self._inputs)
