"""An LLM run put together from a config and a work directory, and its training.

Layout of a work directory (each part is written by the launch script named beside it):
  data/                 prepare_data
  cf/logits/<split>/    train_cf
  llm/<run>/            train: checkpoints/, log.jsonl, config.json (what the run began with),
                        profile/ where training.profile_steps asks for it
  llm/frozen_<layers>/  train, with training.keep_frozen_states
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from tca4rec_jax.cf.logits_store import LogitsStore, open_store, split_path
from tca4rec_jax.config import build, run_name
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.dataset import load as load_data
from tca4rec_jax.data.downloads import ASSETS, fetch_file
from tca4rec_jax.data.prompts import PromptTemplate, TitleTokens, tokenise_titles
from tca4rec_jax.data.sequences import RecData
from tca4rec_jax.distributed.multihost import barrier, check_processes_agree, is_main_process
from tca4rec_jax.distributed.sharded_projection import put_cf
from tca4rec_jax.distributed.sharding import (
    check_batch_size,
    local_rows,
    mesh_for_batches,
    parameter_sharding,
    put,
    replicate,
    replicated,
    tree_shardings,
)
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.attention import check_implementation
from tca4rec_jax.llm.checkpoints.export import decoder_arrays, merge_adapters
from tca4rec_jax.llm.checkpoints.gguf import load_gguf
from tca4rec_jax.llm.checkpoints.hugging_face import load_hugging_face
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters
from tca4rec_jax.llm.options import DecoderOptions
from tca4rec_jax.llm.tokenizer import load_tokenizer
from tca4rec_jax.training.activation_cache import FrozenStates, frozen_layers_identity
from tca4rec_jax.training.batches import Batches
from tca4rec_jax.training.checkpoint import Checkpoints
from tca4rec_jax.training.examples import build_examples, row_of_example
from tca4rec_jax.training.fault_tolerance import check_folder
from tca4rec_jax.training.loop import train
from tca4rec_jax.training.step import (
    TRAINED,
    Metrics,
    TrainState,
    in_dtype,
    make_optimizer,
    make_train_step,
)
from tca4rec_jax.training.throughput import mean_context, peak_flops


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What a config and a work directory stand for; every part is made on first use."""

    config: ConfigDict
    workdir: Path

    @cached_property
    def data(self) -> RecData:
        return load_data(self.workdir / "data")

    @cached_property
    def weights_path(self) -> Path:
        """A pinned download by name, or the user's own GGUF file or Hugging Face folder."""
        weights = self.config.llm.weights
        return fetch_file(weights) if weights in ASSETS else Path(weights)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(self.weights_path)

    @cached_property
    def titles(self) -> TitleTokens:
        return tokenise_titles(
            self.data.catalogue.titles,
            partial(self.tokenizer.encode, add_special_tokens=False),
            build(PromptTemplate, self.config.prompt),
            self.tokenizer.bos_token_id,
        )

    @cached_property
    def trie(self) -> ItemTrie:
        return ItemTrie.build(self.titles.titles)

    @cached_property
    def compressed_trie(self) -> ItemTrie:
        return self.trie.compress()

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        training, inference = self.config.training, self.config.inference
        return mesh_for_batches(
            **self.config.mesh, batch=training.batch_size, prompts=inference.batch_size
        )

    @cached_property
    def decoder(self) -> Decoder:
        """The pretrained decoder on the mesh; with fresh adapters (which change nothing) if they
        are what is trained, else in float32, so that small updates are not rounded away.

        Raises UserError for an unknown llm.train, llm.attention, ..., for quantised weights that
        should be trained, or if prompt.max_tokens exceeds the longest sequence of the model.
        """
        llm = self.config.llm
        if llm.train not in TRAINED:
            raise UserError(f"llm.train is {llm.train!r}: expected one of {', '.join(TRAINED)}")
        if llm.quantise and llm.train == "full":
            raise UserError(
                f"llm.quantise is {llm.quantise!r}, but quantised weights cannot be trained: give"
                " llm.train=lora, or leave llm.quantise empty"
            )
        options = build(DecoderOptions, llm)
        check_implementation(llm.attention, jax.default_backend(), llm.dtype)
        if llm.attention != "xla" and self.mesh.shape["tensor"] > 1:
            raise UserError(
                f"llm.attention is {llm.attention!r}, a kernel that takes all heads of a row: set "
                "mesh.tensor=1, or llm.attention=xla"
            )
        load = load_hugging_face if self.weights_path.is_dir() else load_gguf
        stored = llm.dtype if llm.train == "lora" else "float32"
        architecture, params = load(
            self.weights_path,
            jnp.dtype(stored),
            sharding=partial(parameter_sharding, self.mesh),
            quantised=llm.quantise or "",
            num_layers=llm.num_layers or 0,
        )
        if self.config.prompt.max_tokens > architecture.max_positions:
            raise UserError(
                f"prompt.max_tokens is {self.config.prompt.max_tokens}, but {llm.weights} has "
                f"positions for {architecture.max_positions}: shorten the history"
            )
        if llm.train == "full":
            return Decoder(architecture, params, options=options)
        lora = build(LoRAConfig, self.config.lora)
        init = jax.jit(
            partial(init_adapters, architecture, lora), out_shardings=replicated(self.mesh)
        )
        adapters = init(jax.random.key(self.config.seed))
        return Decoder(architecture, params, lora=lora, adapters=adapters, options=options)

    def _placed(self, architecture: DecoderConfig, tree):
        """A tree of parameters, each where it belongs."""
        return put(tree, tree_shardings(self.mesh, architecture, tree))

    @property
    def directory(self) -> Path:
        return self.workdir / "llm" / run_name(self.config)

    def cf_store(self, split: str, positions: np.ndarray | None = None) -> LogitsStore:
        """The CF logits of a split, checked against it.

        Args:
          positions: the flat positions that will be read; only their shards are read and checked.
        """
        path = split_path(self.config.cf.logits, self.workdir, split)
        return open_store(path, self.data.splits[split], self.data.catalogue, positions=positions)

    def optimizer(self):
        fields = self.config.optimizer
        return make_optimizer(
            learning_rate=fields.learning_rate,
            warmup_steps=fields.warmup_steps,
            total_steps=self.config.training.steps,
            weight_decay=fields.weight_decay,
            clip=fields.clip,
        )

    def initial_state(self) -> tuple[nnx.GraphDef, TrainState, nnx.State]:
        """(graph, state, base) of the decoder, on the mesh; base is what is not trained."""
        graph, params, base = nnx.split(self.decoder, TRAINED[self.config.llm.train], ...)
        init = self.optimizer().init
        places = tree_shardings(self.mesh, self.decoder.config, jax.eval_shape(init, params))
        moments = jax.jit(init, out_shardings=places)(params)
        step = replicate(self.mesh, jnp.zeros((), jnp.int32))
        return graph, TrainState(step, params, moments), base

    def trained_decoder(self, name: str) -> Decoder:
        """The decoder with what a checkpoint of a run holds (inference.checkpoint), in llm.dtype.

        Raises FileNotFoundError if the run was not trained, ValueError if its adapters were not
        those of the config.
        """
        directory = self.workdir / "llm" / name / "checkpoints"
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: no such run; train it with --config.run={name}")
        if self.config.llm.train == "lora":
            _check_adapters(directory.parent / "config.json", self.config.lora)
        graph, state, base = self.initial_state()
        with Checkpoints(directory, writable=False) as checkpoints:
            state, _ = checkpoints.restore(state, self.config.inference.checkpoint)
        return nnx.merge(graph, in_dtype(state.params, self.compute_dtype), base)

    @property
    def compute_dtype(self) -> str | None:
        """What trained weights are rounded to before they are used; None for adapters."""
        return self.config.llm.dtype if self.config.llm.train == "full" else None

    @property
    def shared_layers(self) -> int:
        """How many of the LLM's layers, from the first, training leaves as they came."""
        return self.config.lora.first_layer if self.config.llm.train == "lora" else 0

    @property
    def keeps_frozen_states(self) -> bool:
        return self.shared_layers > 0 and self.config.training.keep_frozen_states

    @property
    def frozen_states(self) -> FrozenStates | None:
        """Where what these layers make of the rows is kept, if it is (the loop fills it)."""
        if not self.keeps_frozen_states:
            return None
        llm = self.config.llm.to_dict()
        layers = frozen_layers_identity(llm, self.shared_layers, self.weights_path)
        return FrozenStates(self.workdir / "llm" / f"frozen_{layers}", self.decoder, self.mesh)

    def inference_decoder(self, name: str) -> Decoder:
        """The LLM of a run without adapters: they are merged into float32 weights, which is faster.

        Weights of another dtype, or quantised, would round them away, and the adapters stay. '' is
        the LLM as it came. Raises FileNotFoundError as `trained_decoder`.
        """
        llm = self.config.llm
        if name and (llm.dtype != "float32" or llm.quantise):
            return self.trained_decoder(name)
        decoder = self.trained_decoder(name) if name else self.decoder
        params, adapters = decoder_arrays(decoder)
        params = in_dtype(params, self.compute_dtype)
        if name:
            params = merge_adapters(params, adapters, decoder.lora)
        params = self._placed(decoder.config, params)
        return Decoder(decoder.config, params, options=decoder.options)


def _check_adapters(began_with: Path, lora: ConfigDict) -> None:
    """Whether a run was trained with the adapters of a config; its dropout does not matter."""
    trained = json.loads(began_with.read_text())["lora"] if began_with.exists() else {}
    for name in sorted(set(trained) - {"dropout"}):
        if trained[name] != lora.get(name):
            raise UserError(
                f"{began_with}: the run was trained with lora.{name}={trained[name]}, but the "
                f"config says {lora.get(name)}: give --config.lora.{name}={trained[name]}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """A run's training, ready to go: `step` is (state, device batch) -> (state, metrics)."""

    state: TrainState
    batches: Batches
    step: Callable[[TrainState, object], tuple[TrainState, Metrics]]


def prepare_training(run: Run, *, projected: bool = True) -> Training:
    """Checks a run's inputs against each other and puts them on the mesh.

    Args:
      projected: False leaves the projection of the CF logits out of the step, which then is plain
        next-token prediction whatever objective.alpha is.

    Raises:
      UserError: a field out of range, or inputs that do not fit each other.
    """
    config = run.config
    training, objective = config.training, Objective(**config.objective).check()
    check_batch_size(run.mesh, training.batch_size, "training.batch_size")
    titles = run.titles  # the tokenizer first: its reader of a GGUF file is kept for the weights
    split = training_split(config)
    examples = build_examples(
        run.data.splits[split],
        titles,
        run.compressed_trie,
        targets=training.targets,
        max_tokens=config.prompt.max_tokens,
    )
    graph, state, base = run.initial_state()
    batches = Batches.create(
        examples,
        None,
        batch_size=training.batch_size,
        seed=config.seed,
        buckets=training.buckets,
        local_rows=local_rows(run.mesh, training.batch_size),
        frozen=run.frozen_states,
    )
    store = run.cf_store(split, batches.cf_positions(training.steps))
    batches = dataclasses.replace(batches, store=store)
    logging.info(
        "%d examples, %d supervised titles, %d batches an epoch of shapes %s, %.1f%% padding",
        len(examples),
        len(examples.cf_position.values),
        batches.per_epoch,
        batches.shapes,
        100 * batches.padding_share,
    )
    items = CFItems(store.item_table, store.item_bias) if projected else None
    items, trie = put_cf(run.mesh, items, run.compressed_trie)
    step = make_train_step(
        graph,
        state,
        base,
        run.optimizer(),
        mesh=run.mesh,
        seed=config.seed,
        compute_dtype=run.compute_dtype,
    )
    objective = jax.tree.map(jnp.float32, objective)
    objective = replicate(run.mesh, objective)
    return Training(
        state, batches, lambda state, batch: step(state, base, batch, items, trie, objective)
    )


def training_split(config: ConfigDict) -> str:
    """The split whose rows are trained on."""
    return "train_sequences" if config.training.targets == "all" else "train"


def train_run(run: Run) -> TrainState:
    """Trains (or goes on training) the LLM of a run; see loop.train for what it writes.

    Raises:
      UserError: as `prepare_training`, a folder that can't be written to, or processes that were
        not given the same; before any step.
    """
    config, training = run.config, run.config.training
    check_folder(run.directory, num_bytes=0)
    check_processes_agree(_sha256(config.to_json_best_effort()), "config (or flags)")
    prepared = prepare_training(run)
    check_folder(run.directory, num_bytes=sum(a.nbytes for a in jax.tree.leaves(prepared.state)))
    began_with = run.directory / "config.json"
    if is_main_process() and not began_with.exists():
        began_with.write_text(config.to_json_best_effort(indent=2))
    barrier("config.json")
    seen = began_with.read_text() if began_with.exists() else ""
    check_processes_agree(_sha256(seen), str(began_with))
    sequences = run.data.splits[training_split(config)]
    row_R = row_of_example(prepared.batches.examples, sequences)
    return train(
        prepared.step,
        prepared.state,
        prepared.batches,
        Checkpoints(run.directory / "checkpoints", keep=training.keep_checkpoints),
        mesh=run.mesh,
        total_steps=training.steps,
        checkpoint_every=training.checkpoint_every,
        log_path=run.directory / "log.jsonl",
        identity=_identity(config, prepared.batches),
        name=run_name(config),
        flops_per_token=_flops_per_token(run, prepared.batches),
        peak=peak_flops(run.mesh, config.llm.dtype),
        profile_steps=training.profile_steps or (0, 0),
        watchdog_seconds=training.watchdog_seconds,
        describe=lambda example: (
            f"row {row_R[example]} of {training_split(config)} "
            f"(user {sequences.user[row_R[example]]}, example {example})"
        ),
    )


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _flops_per_token(run: Run, batches: Batches) -> float:
    """Useful FLOPs of a training step per token; the children's few logits are not counted."""
    examples, kind = batches.examples, run.config.llm.train
    supervised = examples.position.values.size / examples.tokens.values.size
    return run.decoder.config.flops_per_token(
        kind,
        context=mean_context(examples.tokens.lengths),
        vocabulary_share=supervised if run.config.objective.softmax == "vocabulary" else 0.0,
        first_layer=run.shared_layers,
        frozen_kept=run.keeps_frozen_states,
    )


def _identity(config: ConfigDict, batches: Batches) -> dict:
    """What a run's checkpoints depend on besides the number of steps."""
    fields = {name: config[name].to_dict() for name in ("llm", "lora", "prompt", "objective")}
    return fields | {
        "targets": config.training.targets,
        "batch_size": config.training.batch_size,
        "buckets": [shape.tokens for shape in batches.shapes],
        "examples": len(batches.examples),
        "seed": config.seed,
    }
