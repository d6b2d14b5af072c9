"""The real training step, prompt prefill and beam search of a config, lowered without any array.

Weights, optimiser state, batch, CF items and tries are shapes with shardings; the model is
`llm.architecture`, the catalogue a number of items (CatalogueSizes). Nothing is allocated, so a model
far larger than this machine compiles.
"""

import dataclasses
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.stages import Lowered
from ml_collections import ConfigDict

from tca4rec_jax.ahead.catalogue import DECISIONS, TITLE_TOKENS, CatalogueSizes
from tca4rec_jax.ahead.targets import Target
from tca4rec_jax.decoding.batched_search import search_batch
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig, run_prompts
from tca4rec_jax.llm.architectures import architecture
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder, DecoderOptions
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters
from tca4rec_jax.sharding import make_mesh, replicated
from tca4rec_jax.training.batches import BatchShape, abstract_batch
from tca4rec_jax.training.step import (
    TRAINED,
    Temperatures,
    init_state,
    make_optimizer,
    make_train_step,
)
from jax.sharding import NamedSharding, PartitionSpec as P, Mesh, AxisType

_TOKENS_PER_TITLE, _DECISIONS_PER_TITLE = 12, 4  # of a sequence of titles


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """The programs of a config on a target; `items` is the size of the catalogue."""

    config: ConfigDict
    target: Target
    items: int = 10_000

    @cached_property
    def architecture(self) -> DecoderConfig:
        llm = self.config.llm
        found = architecture(llm.architecture)
        return dataclasses.replace(found, num_layers=llm.num_layers or found.num_layers)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        d = np.array(self.target.devices())
        return Mesh(d, ("data",), axis_types=(AxisType.Auto,))

    @cached_property
    def sizes(self) -> CatalogueSizes:
        return CatalogueSizes(self.items, self.architecture.vocab_size)

    def batch_shape(self) -> BatchShape:
        """Of the longest bucket."""
        training = self.config.training
        tokens = max(training.buckets)
        titles = 1 if training.supervision == "last" else tokens // _TOKENS_PER_TITLE
        positions = TITLE_TOKENS if titles == 1 else tokens
        decisions = DECISIONS if titles == 1 else titles * _DECISIONS_PER_TITLE
        return BatchShape(tokens, _up(positions), titles, _up(decisions))

    def decoder(self) -> Decoder:
        llm, config = self.config.llm, self.architecture
        dtype = llm.dtype if llm.train == "lora" else "float32"
        params = {
            path: jax.ShapeDtypeStruct(shape, dtype)
            for path, shape in config.parameter_shapes.items()
        }
        options = DecoderOptions(llm.layer_loop, llm.remat, llm.attention)
        if llm.train == "full":
            return Decoder(config, params, options=options)
        lora = LoRAConfig(**self.config.lora)
        adapters = jax.eval_shape(partial(init_adapters, config, lora), jax.random.key(0))
        return Decoder(config, params, lora=lora, adapters=adapters, options=options)

    def train(self, *, projected: bool = True) -> Lowered:
        """The training step; projected=False leaves the Collaborative Tokenizer out."""
        config, mesh = self.config, self.mesh
        graph, params, base = nnx.split(self.decoder(), TRAINED[config.llm.train], ...)
        fields = config.optimizer
        optimizer = make_optimizer(
            learning_rate=fields.learning_rate,
            warmup_steps=fields.warmup_steps,
            total_steps=config.training.steps,
            weight_decay=fields.weight_decay,
            clip=fields.clip,
        )
        state = jax.eval_shape(partial(init_state, optimizer=optimizer), params)
        batch = abstract_batch(config.training.batch_size, self.batch_shape(), config.cf.units)
        trie, trie_shape = self.sizes.trie()
        items = self.sizes.items_side(config.cf.units) if projected else None
        scalars = Temperatures(*(jax.ShapeDtypeStruct((), jnp.float32),) * 3)
        step = make_train_step(
            graph,
            optimizer,
            mesh=mesh,
            trie_shape=trie_shape,
            form=config.objective.form,
            softmax=config.objective.softmax,
            seed=config.seed,
            compute_dtype=config.llm.dtype if config.llm.train == "full" else None,
        )
        everywhere = replicated(mesh)
        rows = NamedSharding(mesh, P("data"))
        return step.lower(
            _on(everywhere, state),
            _on(everywhere, base),
            _on(rows, batch),
            *(_on(everywhere, tree) for tree in (items, trie, scalars)),
        )


def _on(sharding, tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _up(value: int) -> int:
    return -(-value // 8) * 8
