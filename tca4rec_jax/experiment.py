"""An experiment: a config and a work directory, and everything that training and inference share.

Layout of a work directory (each part is written by the launch script named after it):
  data/                 prepare_data
  item_embeddings/      embed_items
  ids/, ids_of_others/  make_ids
  cf/logits/<split>/    train_cf
  llm/<run>/            train: training/run_folder.py says what is in it
  llm/hidden_states_<key>/  train, with training.cache_hidden_states
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from tca4rec_jax.config import (
    build,
    default_config,
    ranked_by,
    run_name,
    saved_config,
    score_weights,
)
from tca4rec_jax.config_checks import check_fits, check_llm
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.core.trie import DeviceTrie
from tca4rec_jax.data.prompts import Prompts
from tca4rec_jax.data.templates import carried_vectors
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.engine import BatchedSearch
from tca4rec_jax.distributed.multihost import check_processes_agree
from tca4rec_jax.distributed.sharded_projection import cf_arrays
from tca4rec_jax.distributed.sharding import (
    mesh_for_batches,
    parameter_sharding,
    put,
    tree_shardings,
)
from tca4rec_jax.errors import UserError
from tca4rec_jax.experiment_inputs import ExperimentInputs
from tca4rec_jax.fileio import fingerprint
from tca4rec_jax.llm.config import DecoderConfig, DecoderOptions
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters, merge_adapters
from tca4rec_jax.recommenders.ids import first_new_rows
from tca4rec_jax.recommenders.vectors import first_projector, item_vectors
from tca4rec_jax.training.checkpoint import Checkpoints
from tca4rec_jax.training.optimizer import OptimizerConfig, make_optimizer
from tca4rec_jax.training.run_folder import RunFolder
from tca4rec_jax.training.run_inputs import (
    data_inputs,
    inference_inputs,
    recorded,
    training_inputs,
    validation_inputs,
)
from tca4rec_jax.training.state import TrainState, held_parts, in_dtype
from tca4rec_jax.training.validation import ValidationConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment(ExperimentInputs):
    """The parts of a config and a work directory; each is made on first use.

    Arrays are made by `pretrained`, `put` and `compute` alone. compile_ahead overrides these, and
    the properties that read files or ask for devices, to get the same parts as shapes.
    """

    @classmethod
    def of_run(cls, workdir: Path, name: str) -> "Experiment":
        """With `config_of_run` of a run."""
        return cls(config_of_run(RunFolder.of(workdir, name)), workdir)

    def prompts(self, history_RxH: np.ndarray, candidates_RxN: np.ndarray | None = None) -> Prompts:
        """The prompts for histories, int32, padded on the left with PAD_ITEM.

        Raises UserError for templates that show candidates without any.
        """
        return self.recipe.show_history(self.items, history_RxH, self.config, candidates_RxN)

    @cached_property
    def item_vectors(self) -> np.ndarray | None:
        """float32 [I, C]: what placeholders of items carry; None if prompts have none."""
        return item_vectors(self) if carried_vectors(self.config.prompt) else None

    def search(self, beams: int | None = None) -> BatchedSearch:
        """The search for lists, of decoding.beams beams by default."""
        beams = self.config.decoding.beams if beams is None else beams
        return self.recipe.find_list(self.trie, self.config, self.mesh, beams)

    def cf_arrays(self, items: CFItems | None) -> tuple[CFItems | None, DeviceTrie]:
        """The CF items and the trie as the training step takes them, on the host."""
        return cf_arrays(self.mesh, items, self.training_trie)

    @property
    def directory(self) -> Path:
        """The folder of the LLM run that the config trains."""
        return RunFolder.of(self.workdir, run_name(self.config)).path

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The device mesh of training and inference."""
        training, prompts = self.config.training, self.config.inference.batch_size
        batch = training.batch_size // training.micro_batches
        return mesh_for_batches(**self.config.mesh, batch=batch, prompts=prompts)

    @cached_property
    def pretrained(self) -> tuple[DecoderConfig, dict[str, jax.Array]]:
        """The architecture and the weights at first, by path, on the mesh, in `stored_dtype`.

        Raises UserError, before any weight is read, for prompts longer than the longest sequence of
        the model, or adapters that fit none of its layers.
        """
        llm = self.config.llm
        check_fits(self.config, self.source.architecture)
        return self.source.load(
            jnp.dtype(self.stored_dtype),
            sharding=partial(parameter_sharding, self.mesh),
            quantised=llm.quantise or "",
            num_layers=llm.num_layers or 0,
        )

    @property
    def architecture(self) -> DecoderConfig:
        """The LLM's architecture, quantised as configured."""
        return self.pretrained[0]

    @cached_property
    def decoder(self) -> Decoder:
        """The decoder at first, with fresh adapters (which change nothing) if they are trained, and
        fresh rows of `new_tokens`.

        With a projector, too, if prompts have placeholders. Raises UserError for an unknown
        llm.train, llm.attention that does not run here, quantised weights that should be trained,
        and as `pretrained` and `first_projector`.
        """
        return self._decoder(reads_vectors=self.item_vectors is not None)

    def _decoder(self, *, reads_vectors: bool) -> Decoder:
        check_llm(self.config, self.mesh.devices.flat[0].platform)
        llm = self.config.llm
        # A projector of the user's is checked before any weight of the LLM is read.
        parts: dict[str, Any] = {"projector": first_projector(self) if reads_vectors else None}
        architecture, params = self.pretrained
        parts["new_rows"] = first_new_rows(self)
        parts["options"] = build(DecoderOptions, llm)
        if llm.train == "full":
            return Decoder(architecture, params, **parts)
        lora = build(LoRAConfig, self.config.lora)
        key = jax.random.key(self.config.seed)
        adapters = self.compute(partial(init_adapters, architecture, lora), key)
        return Decoder(architecture, params, lora=lora, adapters=adapters, **parts)

    @property
    def stored_dtype(self) -> str:
        """The pretrained weights' dtype; float32 if trained, or small updates were rounded away."""
        return self.config.llm.dtype if self.config.llm.train == "lora" else "float32"

    @property
    def compute_dtype(self) -> str | None:
        """The dtype that trained weights are rounded to before use; None for adapters."""
        return self.config.llm.dtype if self.config.llm.train == "full" else None

    @property
    def frozen_prefix(self) -> int:
        """How many layers, from the first, are the same in every run: they read texts alone."""
        changed = self.config.llm.train == "full" or self.new_tokens
        changed = changed or carried_vectors(self.config.prompt)
        return 0 if changed else self.config.lora.first_layer

    @property
    def caches_hidden_states(self) -> bool:
        """Whether training keeps the hidden states after the frozen prefix on disk."""
        return self.frozen_prefix > 0 and self.config.training.cache_hidden_states

    def flops_per_token(self, *, context: float, supervised: float) -> float:
        """Useful FLOPs of a training step per token; the children's few logits are not counted.

        A token attends to `context` keys on average; `supervised` is the share of tokens whose next
        token is supervised.
        """
        vocabulary = self.config.objective.softmax == "vocabulary"
        return self.architecture.flops_per_token(
            self.config.llm.train,
            context=context,
            vocabulary_share=supervised if vocabulary else 0.0,
            first_layer=self.frozen_prefix,
            prefix_cached=self.caches_hidden_states,
        )

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of config.optimizer over training.steps updates."""
        decay_of = {"projector": self.config.projector.weight_decay}
        decay_of |= dict.fromkeys(held_parts(self.config), 0.0)
        return make_optimizer(
            build(OptimizerConfig, self.config.optimizer),
            self.config.training.steps,
            decay_of=tuple(decay_of.items()),
        )

    def initial_state(self) -> tuple[nnx.GraphDef, TrainState, nnx.State]:
        """(graph, state, base) of the decoder, on the mesh; base holds the untrained parameters."""
        graph, *parts = nnx.split(self.decoder, self.recipe.trainable(self.config), ...)
        params, base = parts
        step = self.compute(partial(jnp.zeros, (), jnp.int32))
        moments = self.compute(self.optimizer().init, params)
        tau = None
        if self.objective.adapts:
            tau = self.compute(partial(jnp.full, (), self.objective.tau, jnp.float32))
        return graph, TrainState(step, params, moments, tau), base

    def decoder_from(self, graph: nnx.GraphDef, state: TrainState, base: nnx.State) -> Decoder:
        """The decoder of a state, its trained weights rounded to `compute_dtype`."""
        params = state.params
        if self.compute_dtype is not None:
            params = self.compute(self._round, params)
        return nnx.merge(graph, params, base)

    @cached_property
    def _round(self) -> Callable:
        """`in_dtype` of `compute_dtype`; one function, so that it is compiled once."""
        return partial(in_dtype, dtype=self.compute_dtype)

    @cached_property
    def inference_inputs(self) -> dict[str, Any]:
        """What the lists of a trained LLM depend on, besides the run's checkpoint: provenance."""
        return inference_inputs(
            self.config,
            weights=self.source.identity,
            tokenizer=self.source.tokenizer_identity,
            ids=fingerprint(self.ids.texts) if self.ids else "",
            catalogue=self.data.catalogue.content_hash(),
            vectors=self.item_vectors,
        )

    def search_inputs(
        self, weights: Sequence[ScoreWeights], beams: int | None = None
    ) -> dict[str, Any]:
        """What a `search` by each of the weights depends on, but the LLM, rows and CF logits."""
        how = {} if beams is None else {"beams": beams}
        return {
            "decoding": dataclasses.asdict(build(SearchConfig, self.config.decoding, **how)),
            "weights of scores": [one if one.guidance else one._replace(beta=1) for one in weights],
            "allowed items": self.item_filter.content_hash(),
        }

    @property
    def training_inputs(self) -> dict[str, Any]:
        """What the checkpoints of the config's run depend on: provenance."""
        fields = self.inference_inputs | training_inputs(self.config, self.workdir)
        fields |= data_inputs(self.config, self.data, self.workdir, self.recipe.teacher_reads)
        if self.validation.is_on:
            weights, beams = [score_weights(self.config, 0.0)], self.validation.beams
            fields |= validation_inputs(self.config, self.data, self.workdir)
            fields |= self.search_inputs(weights, beams) | ranked_by(self.config)
        return recorded(fields)

    @property
    def validation(self) -> ValidationConfig:
        """When training is validated, and what follows."""
        return build(ValidationConfig, self.config.validation)

    @property
    def runs(self) -> dict[str, RunFolder]:
        """The LLM runs of the work directory, by name."""
        return {run.path.name: run for run in RunFolder.all(self.workdir)}

    @cached_property
    def _warned_of(self) -> set[str]:
        """The runs that `check_run` has given a warning of."""
        return set()

    def check_run(self, name: str, *, guided: bool = False) -> RunFolder:
        """The folder of a run whose LLM may be taken for lists, with guidance or without.

        Nothing big is loaded. Training rows or CF logits that have changed since are said in a
        warning, once: the checkpoint is of those before.

        Raises FileNotFoundError for a run that was not trained, UserError for one that was trained
        for other inputs than those here now, or that is unfinished (unless inference.unfinished).
        """
        config, run = self.config, RunFolder.of(self.workdir, name)
        now = self.inference_inputs
        if guided and config.decoding.beta is None:
            now = now | {"objective.beta": config.objective.beta}
        run.check(now, unfinished=config.inference.unfinished)
        inputs = fingerprint([run.made_from.fingerprint, now])
        check_processes_agree(inputs, f"{run.path} or weights")
        try:
            trained_on, reads = config_of_run(run), self.recipe.teacher_reads
            inputs_now = data_inputs(trained_on, self.data, self.workdir, reads)
            changed = run.made_from.differences(inputs_now)
        except UserError as error:
            changed = [str(error)]
        if changed and name not in self._warned_of:
            self._warned_of.add(name)
            logging.warning(f"{run.path}: since it was trained, {'; '.join(changed)}")
        return run

    def run_step(self, name: str) -> int:
        """The step of the checkpoint that inference.checkpoint chooses of a run."""
        with self._checkpoints(RunFolder.of(self.workdir, name)) as checkpoints:
            return checkpoints.steps(self.config.inference.checkpoint)[0]

    def _checkpoints(self, run: RunFolder) -> Checkpoints:
        """Those of a run, to read one as inference.checkpoint says."""
        best = run.outcome.best if self.config.inference.checkpoint == "best" else None
        return Checkpoints(run.checkpoints, writable=False, best=best)

    def trained_decoder(self, name: str) -> Decoder:
        """The decoder with the checkpoint of a run (inference.checkpoint), in llm.dtype.

        Raises as `check_run`, before the weights are loaded, and UserError for a checkpoint of
        another run.
        """
        run = self.check_run(name)
        graph, state, base = self.initial_state()
        with self._checkpoints(run) as checkpoints:
            state, position = checkpoints.restore(state, self.config.inference.checkpoint)
        run.check_checkpoint(position)
        return self.decoder_from(graph, state, base)

    def inference_decoder(self, name: str) -> Decoder:
        """The LLM of a run without adapters: they are merged into float32 weights, which is faster.

        Weights of another dtype, or quantised, would round them away, so there the adapters stay.
        '' is the pretrained LLM; it reads no vectors unless projector.weights is given. Raises as
        `trained_decoder`.
        """
        if name:
            return self.merged(self.trained_decoder(name))
        reads_vectors = bool(self.config.projector.weights)
        decoder = self.decoder if reads_vectors else self._decoder(reads_vectors=False)
        params, _ = decoder.arrays()
        return self._without_adapters(decoder, in_dtype(params, self.compute_dtype))

    def merged(self, decoder: Decoder) -> Decoder:
        """A trained decoder as inference takes it: see `inference_decoder`."""
        llm = self.config.llm
        if llm.dtype != "float32" or llm.quantise:
            return decoder
        params, adapters = decoder.arrays()
        if decoder.lora is not None:
            params = merge_adapters(params, adapters, decoder.lora)
        return self._without_adapters(decoder, params)

    def _without_adapters(self, decoder: Decoder, params: dict[str, jax.Array]) -> Decoder:
        """A decoder of other parameters, on the mesh."""
        params = self.put(params, tree_shardings(self.mesh, decoder.config, params))
        parts: dict[str, Any] = {"projector": decoder.projector, "new_rows": decoder.new_rows}
        return Decoder(decoder.config, params, **parts, options=decoder.options)

    def put(self, tree, shardings):
        """Puts arrays, which every process has whole, on the mesh."""
        return put(tree, shardings)

    def compute(self, function: Callable, *args):
        """function(*args), jitted; a leaf of a parameter's path lives where the parameter does."""
        shapes = jax.eval_shape(function, *args)
        shardings = tree_shardings(self.mesh, self.architecture, shapes)
        return jax.jit(function, out_shardings=shardings)(*args)


def config_of_run(run: RunFolder) -> ConfigDict:
    """The config that a run was trained with, but the mesh of the devices here.

    Raises FileNotFoundError, or UserError if it is damaged.
    """
    config = saved_config(run.config)
    config.update(run=run.path.name, mesh=default_config().mesh)
    return config
