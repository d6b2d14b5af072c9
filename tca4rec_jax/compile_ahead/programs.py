"""The real training step, prompt prefill and beam search of a config, lowered without any array.

Weights, optimiser state, batch, CF items and tries are shapes with shardings; the model is
`llm.architecture`, the catalogue a number of items (CatalogueSizes). Nothing is allocated, so a
model far larger than this machine compiles.
"""

import dataclasses
import math
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.stages import Lowered
from ml_collections import ConfigDict

from tca4rec_jax.cf.settings import vector_width
from tca4rec_jax.compile_ahead.catalogue import DECISIONS, TITLE_TOKENS, CatalogueSizes
from tca4rec_jax.compile_ahead.targets import Target
from tca4rec_jax.config import build
from tca4rec_jax.core.collaborative_tokenizer import DENSE
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.search_programs import (
    SearchProgram,
    Texts,
    Users,
    prompts_sharding,
    read_prompts,
    search_batch,
)
from tca4rec_jax.distributed.sharded_projection import cf_shardings
from tca4rec_jax.distributed.sharding import (
    check_batch_size,
    make_mesh,
    replicated,
    row_sharding,
    tree_shardings,
)
from tca4rec_jax.llm.architectures import architecture
from tca4rec_jax.llm.checkpoints.hugging_face import CONFIG, read_config
from tca4rec_jax.llm.config import SCALES, DecoderConfig
from tca4rec_jax.llm.decoder import Decoder, DecoderOptions
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters
from tca4rec_jax.training.batches import BatchShape, abstract_batch
from tca4rec_jax.training.run import Run
from tca4rec_jax.training.step import TRAINED, TrainState, in_dtype, make_train_step

PROGRAMS = ("train", "prefill", "search")
_TOKENS_PER_TITLE, _DECISIONS_PER_TITLE = 12, 4  # of a sequence of titles


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """The programs of a config on a target; `items` is the size of the catalogue.

    Raises ValueError where Run would: a mesh that does not fit the devices, a batch that does not
    divide over it, an unknown architecture.
    """

    config: ConfigDict
    target: Target
    items: int = 10_000

    def lower(self, program: str) -> Lowered:
        """One of PROGRAMS, lowered for the target."""
        return {"train": self.train, "prefill": self.prefill, "search": self.search}[program]()

    @property
    def architecture_name(self) -> str:
        return self.config.llm.architecture or Path(self.config.llm.weights).name

    @cached_property
    def architecture(self) -> DecoderConfig:
        llm = self.config.llm
        if llm.architecture is None and (Path(llm.weights) / CONFIG).is_file():
            found = read_config(llm.weights)
        else:
            found = architecture(self.architecture_name)
        num_layers = llm.num_layers or found.num_layers
        return dataclasses.replace(found, num_layers=num_layers, quantised=llm.quantise or "")

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        mesh = make_mesh(**self.config.mesh, devices=self.target.devices())
        check_batch_size(mesh, self.config.training.batch_size, "training.batch_size")
        batch_size = self.config.inference.batch_size
        check_batch_size(mesh, batch_size, "inference.batch_size", "prompts")
        return mesh

    @cached_property
    def sizes(self) -> CatalogueSizes:
        """Of a catalogue that divides over the devices, as cf_arrays pads it."""
        items = _round_up(self.items, self.mesh.size)
        return CatalogueSizes(items, self.architecture.vocab_size)

    @property
    def parameters(self) -> int:
        unquantised = dataclasses.replace(self.architecture, quantised="")
        return sum(map(math.prod, unquantised.parameter_shapes.values()))

    @property
    def trained_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self._split()[1]))

    @property
    def weight_bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._split()[1:]))

    def useful_flops(self) -> float:
        """Of a training step on all devices together: what DecoderConfig.flops_per_token counts."""
        shape, config, run = self.batch_shape(), self.config, Run(self.config, Path())
        vocabulary = config.objective.softmax == "vocabulary"
        per_token = self.architecture.flops_per_token(
            config.llm.train,
            context=(shape.tokens + 1) / 2,
            vocabulary_share=shape.positions / shape.tokens if vocabulary else 0.0,
            first_layer=run.shared_layers,
            frozen_kept=run.keeps_frozen_states,
        )
        return per_token * config.training.batch_size * shape.tokens

    def batch_shape(self) -> BatchShape:
        """Of the longest bucket, full to the last token."""
        training = self.config.training
        tokens = max(training.buckets)
        if training.targets == "last":
            return BatchShape(tokens, _round_up(TITLE_TOKENS, 8), 1, _round_up(DECISIONS, 8))
        titles = tokens // _TOKENS_PER_TITLE
        return BatchShape(tokens, tokens, titles, _round_up(titles * _DECISIONS_PER_TITLE, 8))

    def train(self, *, projected: bool = True) -> Lowered:
        """The training step; projected=False leaves the Collaborative Tokenizer out."""
        config, mesh, run = self.config, self.mesh, Run(self.config, Path())
        graph, params, base = self._split()
        moments = jax.eval_shape(run.optimizer().init, params)
        state = self._placed(TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, moments))
        base = self._placed(base)
        items = self.sizes.items_side(vector_width(config.cf)) if projected else None
        trie = self.sizes.trie()
        items, trie = jax.tree.map(_at, (items, trie), cf_shardings(mesh, items, trie))
        frozen = None
        if run.keeps_frozen_states:
            frozen = self.architecture.hidden_size, jnp.dtype(config.llm.dtype)
        shape = self.batch_shape()
        batch = abstract_batch(config.training.batch_size, shape, vector_width(config.cf), frozen)
        scalar, fields = jax.ShapeDtypeStruct((), jnp.float32), config.objective
        objective = Objective(scalar, scalar, scalar, fields.form, fields.softmax)
        step = make_train_step(
            graph,
            state,
            base,
            run.optimizer(),
            mesh=mesh,
            seed=config.seed,
            compute_dtype=run.compute_dtype,
        )
        batch, objective = _all_at(row_sharding(mesh), batch), _all_at(replicated(mesh), objective)
        return step.lower(state, base, batch, items, trie, objective)

    def prefill(self) -> Lowered:
        """Keys, values and last states of a batch of the longest prompts."""
        args, program = self._reading()
        return read_prompts.lower(*args, program=program, capacity=self.batch_shape().tokens)

    def search(self) -> Lowered:
        """Beam search of a batch after the longest prompts, without guidance or filters."""
        args, program = self._reading()
        read = partial(read_prompts, program=program, capacity=self.batch_shape().tokens)
        prompts, _ = jax.eval_shape(read, *args)
        prompts = jax.tree.map(_at, prompts, prompts_sharding(self.mesh, prompts))
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        weights = _all_at(replicated(self.mesh), ScoreWeights(*[scalar] * 4))
        state, _, _, trie, _ = args
        return search_batch.lower(state, prompts, Users(), DENSE, trie, weights, program=program)

    def _reading(self) -> tuple[tuple, SearchProgram]:
        """Arguments of `read_prompts` for a batch of the longest prompts, and the static one."""
        graph, state = self._inference()
        search = build(SearchConfig, self.config.decoding)
        trie = self.sizes.trie(score_edges=search.vocabulary)
        temperature_T = jax.ShapeDtypeStruct((1,), jnp.float32)
        trie, temperature_T = _all_at(replicated(self.mesh), (trie, temperature_T))
        batch, tokens = self.config.inference.batch_size, self.batch_shape().tokens
        texts = Texts(
            jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
        )
        texts = _all_at(row_sharding(self.mesh, "prompts"), texts)
        program = SearchProgram(self.mesh, graph, search)
        return (state, texts, None, trie, temperature_T), program

    def _decoder(self) -> Decoder:
        """As Run.decoder, of shapes."""
        llm, config = self.config.llm, self.architecture
        stored = jnp.dtype(llm.dtype if llm.train == "lora" else "float32")
        params = {
            path: jax.ShapeDtypeStruct(shape, stored_dtype(config, path, stored))
            for path, shape in config.parameter_shapes.items()
        }
        options = build(DecoderOptions, llm)
        if llm.train == "full":
            return Decoder(config, params, options=options)
        lora = build(LoRAConfig, self.config.lora)
        adapters = jax.eval_shape(partial(init_adapters, config, lora), jax.random.key(0))
        return Decoder(config, params, lora=lora, adapters=adapters, options=options)

    def _split(self) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        return nnx.split(self._decoder(), TRAINED[self.config.llm.train], ...)

    def _inference(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The trained decoder, as Run.trained_decoder."""
        graph, state = nnx.split(self._decoder())
        compute_dtype = Run(self.config, Path()).compute_dtype
        state = jax.eval_shape(partial(in_dtype, dtype=compute_dtype), state)
        return graph, self._placed(state)

    def _placed(self, tree):
        """A tree of parameters, each where it belongs."""
        return jax.tree.map(_at, tree, tree_shardings(self.mesh, self.architecture, tree))


def stored_dtype(config: DecoderConfig, path: str, floats: jnp.dtype) -> jnp.dtype:
    """Of a parameter: quantised projections are stored as codes with float32 scales."""
    if config.quantised and path.endswith(SCALES[config.quantised]):
        return jnp.dtype(jnp.float32)
    if config.quantised and path.removeprefix("layers/") in config.projection_shapes:
        return jnp.dtype(jnp.int8 if config.quantised == "int8" else jnp.uint8)
    return floats


def _at(leaf, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _all_at(sharding, tree):
    return jax.tree.map(partial(_at, sharding=sharding), tree)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
