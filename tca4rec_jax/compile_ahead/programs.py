"""The training step, prompt prefill and beam search of a config, lowered without any array.

An AbstractExperiment makes shapes with shardings instead of arrays; the model is
`llm.architecture`, the catalogue a number of items (CatalogueSizes), or two answers. Everything
else is the code that trains and searches. Nothing is allocated, so a model far larger than this
machine compiles.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.stages import Lowered

from tca4rec_jax.batching import round_up
from tca4rec_jax.cf.settings import vector_width
from tca4rec_jax.compile_ahead.catalogue import (
    ID_TOKENS,
    IDS,
    TITLES,
    AnswerSizes,
    CatalogueSizes,
    Measured,
)
from tca4rec_jax.compile_ahead.targets import Target
from tca4rec_jax.config import build
from tca4rec_jax.core.collaborative_tokenizer import DENSE, CFItems
from tca4rec_jax.core.trie import DeviceTrie
from tca4rec_jax.data.item_vectors import vectors_width
from tca4rec_jax.data.templates import carried_vectors, shows_ids
from tca4rec_jax.decoding import search_programs
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.grounding import TitleIndex
from tca4rec_jax.decoding.search_programs import SearchProgram, TextBatch, Users
from tca4rec_jax.distributed import sharding
from tca4rec_jax.distributed.sharded_search import item_shardings, search_shards, trie_shardings
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.llm.architectures import architecture
from tca4rec_jax.llm.checkpoints.hugging_face import CONFIG, read_config
from tca4rec_jax.llm.config import SCALES, DecoderConfig
from tca4rec_jax.llm.from_scratch import RANDOM, SPECIAL, FromScratch
from tca4rec_jax.train import TrainStep
from tca4rec_jax.training.batches import (
    BatchShape,
    abstract_batch,
    abstract_soft_tokens,
    rows_of_batch,
)


@dataclasses.dataclass(frozen=True, eq=False)
class AbstractExperiment(Experiment):
    """An experiment on a target's devices whose arrays are shapes with shardings.

    Raises UserError where an experiment would: a mesh that does not fit the devices, a batch that
    does not divide over it, an unknown architecture.
    """

    target: Target = dataclasses.field(kw_only=True)
    num_items: int = 10_000  # of the catalogue
    workdir: Path = Path()

    @property
    def architecture_name(self) -> str:
        """The name of the architecture: llm.architecture, or that of the weights."""
        return self.config.llm.architecture or Path(self.config.llm.weights).name

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The target's devices. Raises UserError if a batch does not divide among them."""
        mesh = sharding.make_mesh(**self.config.mesh, devices=self.target.devices())
        training, prompts = self.config.training, self.config.inference.batch_size
        parts = {"micro_batches": training.micro_batches}
        sharding.check_batch_size(mesh, training.batch_size, "training.batch_size", **parts)
        sharding.check_batch_size(mesh, prompts, "inference.batch_size", "prompts")
        return mesh

    @cached_property
    def stored_architecture(self) -> DecoderConfig:
        """The LLM's architecture: of its folder, if it is here, or by `architecture_name`."""
        llm = self.config.llm
        if llm.weights == RANDOM:
            return build(FromScratch, llm.random).architecture(len(SPECIAL) + ID_TOKENS)
        is_here = llm.architecture is None and (Path(llm.weights) / CONFIG).is_file()
        return read_config(llm.weights) if is_here else architecture(self.architecture_name)

    @cached_property
    def pretrained(self) -> tuple[DecoderConfig, dict[str, Any]]:
        """The LLM: its architecture and the shapes of its parameters, with their shardings."""
        llm, found = self.config.llm, self.stored_architecture
        num_layers = llm.num_layers or found.num_layers
        found = found.first_layers(num_layers)
        found = dataclasses.replace(found, quantised=llm.quantise or "")
        params = {}
        for path, shape in found.parameter_shapes.items():
            dtype = stored_dtype(found, path, jnp.dtype(self.stored_dtype))
            place = sharding.parameter_sharding(self.mesh, found, path)
            params[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        return found, params

    @cached_property
    def sizes(self) -> CatalogueSizes | AnswerSizes:
        """The sizes of what is generated, which divides over the devices as in `cf_arrays`."""
        vocabulary = max(self.architecture.vocab_size, self.new_tokens.stop)
        if self.answers:
            return AnswerSizes(self.mesh.size, vocabulary)
        items = round_up(self.num_items, self.mesh.size)
        return CatalogueSizes(items, vocabulary, self.measured)

    @property
    def answers(self) -> bool:
        """Whether the recommender answers Yes or No: what is generated is one of two answers."""
        return self.recipe.evaluated_by == "answers"

    @property
    def cf_part(self) -> tuple[int, CFItems]:
        """The width of a row's CF vector, and the item side: of answers the logits themselves."""
        if self.answers:
            return self.sizes.items, DENSE
        width = vector_width(self.config.cf)
        table_IxD: Any = jax.ShapeDtypeStruct((self.sizes.items, width), jnp.float32)
        return width, CFItems(table_IxD)

    @property
    def beams(self) -> int:
        """Those of a search: every answer's, or of lists decoding.beams."""
        return 2 if self.answers else self.config.decoding.beams

    @property
    def measured(self) -> Measured:
        """The catalogue that the sizes are derived from: of titles, or of ids."""
        return IDS if shows_ids(self.config.prompt) else TITLES

    @property
    def new_tokens(self) -> range:
        """Those of ids, if prompts have them, for an LLM that is not from scratch."""
        first, config = self.stored_architecture.vocab_size, self.config
        lacks = shows_ids(config.prompt) and config.llm.weights != RANDOM
        return range(first, first + ID_TOKENS * lacks)

    @cached_property
    def item_vectors(self) -> Any:
        """The shape of what placeholders of items carry, in projector.vectors or by the CF model.

        Raises UserError for a file that is no item vectors.
        """
        if not carried_vectors(self.config.prompt):
            return None
        file = self.config.projector.vectors
        width = vectors_width(Path(file)) if file else vector_width(self.config.cf)
        return jax.ShapeDtypeStruct((self.num_items, width), jnp.float32)

    def soft_tokens(self, titles: int) -> tuple[int, int] | None:
        """(placeholders of a row with so many titles, the width of a vector); None without."""
        if self.item_vectors is None:
            return None
        prompt = self.config.prompt
        text, of_item = prompt.templates[0], prompt.item.count("{vector}")
        around = text.count("{user}") + text.count("{vector}")  # the latter of {item}
        titles += text.count("{item}")
        return titles * of_item + around, self.item_vectors.shape[1]

    def cf_arrays(self, items: CFItems | None) -> tuple[CFItems | None, DeviceTrie]:
        """The items and a trie of the catalogue's sizes, as shapes."""
        return items, self.sizes.trie()

    def put(self, tree, shardings):
        """The tree's shapes with these shardings; nothing is allocated."""

        def at(leaf, place):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return jax.tree.map(at, tree, jax.tree.broadcast(shardings, tree))

    def compute(self, function: Callable, *args):
        """The shapes of the function's result, with their shardings; nothing runs."""
        shapes = jax.eval_shape(function, *args)
        return self.put(shapes, sharding.tree_shardings(self.mesh, self.architecture, shapes))

    @property
    def parameters(self) -> int:
        """The number of the LLM's parameters, without adapters."""
        unquantised = dataclasses.replace(self.architecture, quantised="")
        return sum(map(math.prod, unquantised.parameter_shapes.values()))

    @property
    def trained_parameters(self) -> int:
        """The number of parameters that training updates."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.initial_state()[1].params))

    @property
    def weight_bytes(self) -> int:
        """The bytes of all parameters on all devices together, each counted once."""
        _, state, base = self.initial_state()
        leaves = jax.tree.leaves((state.params, base))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    @property
    def longest(self) -> int:
        """The tokens of the longest prompts."""
        return max(self.config.training.buckets, default=self.config.prompt.max_tokens)

    @property
    def batch_shape(self) -> BatchShape:
        """The sizes of the bucket whose batches have the most tokens, full to the last.

        UserError as `rows_of_batch`, for a bucket that the data may leave empty, too.
        """
        training = self.config.training
        sizes = training.batch_size, training.tokens_per_batch
        buckets = training.buckets or (self.longest,)
        rows, tokens = max(
            ((rows_of_batch(tokens, *sizes), tokens) for tokens in buckets), key=math.prod
        )
        if training.targets == "last":
            one, of_item = (1, 1), (self.measured.tokens, self.measured.decisions)
            positions, decisions = one if self.answers else of_item
            return BatchShape(rows, tokens, round_up(positions, 8), 1, round_up(decisions, 8))
        items = tokens // self.measured.tokens_per_item
        decisions = round_up(items * self.measured.decisions_per_item, 8)
        return BatchShape(rows, tokens, tokens, items, decisions)

    @property
    def useful_flops(self) -> float:
        """Useful FLOPs of a training step, on all devices together."""
        rows, tokens, positions = self.batch_shape[:3]
        per_token = self.flops_per_token(context=(tokens + 1) / 2, supervised=positions / tokens)
        return per_token * rows * tokens


def train(experiment: AbstractExperiment, *, projected: bool = True) -> Lowered:
    """The training step; projected=False leaves the Collaborative Tokenizer out."""
    config, (width, items) = experiment.config, experiment.cf_part
    graph, state, base = experiment.initial_state()
    step = TrainStep(experiment, graph, state, base, items if projected else None)
    hidden = None
    if experiment.caches_hidden_states:
        hidden = experiment.architecture.hidden_size, jnp.dtype(config.llm.dtype)
    shape, history = experiment.batch_shape, config.data.history_length
    soft = experiment.soft_tokens(max(shape.titles, history))
    batch = abstract_batch(shape, width, hidden, soft)
    return step.lower(state, experiment.put(batch, sharding.row_sharding(experiment.mesh)))


def prefill(experiment: AbstractExperiment) -> Lowered:
    """Keys, values and last states of a batch of the longest prompts."""
    args, static = _prefill_arguments(experiment)
    return search_programs.read_prompts.lower(*args, **static)


def search(experiment: AbstractExperiment, *, guided: bool = False) -> Lowered:
    """The search of a batch after the longest prompts, without filters; `guided` by CF vectors."""
    args, static = _prefill_arguments(experiment)
    prompts, _ = search_programs.read_prompts.eval_shape(*args, **static)
    places = search_programs.prompts_sharding(experiment.mesh, prompts)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
    weights = experiment.put(ScoreWeights(*[scalar] * 4), sharding.replicated(experiment.mesh))
    state, _, _, trie, _ = args
    users, items = _guidance(experiment) if guided else (Users(), DENSE)
    titles = None
    if experiment.config.decoding.find == "grounding":
        size = trie.sizes.num_leaves, experiment.architecture.hidden_size
        vectors: Any = jax.ShapeDtypeStruct(size, jnp.float32)
        end: Any = jax.ShapeDtypeStruct((), jnp.int32)
        titles = experiment.put(TitleIndex(vectors, end), sharding.replicated(experiment.mesh))
    args = (state, experiment.put(prompts, places), users, items, trie, weights, titles)
    return search_programs.search_batch.lower(*args, program=static["program"])


PROGRAMS = {
    "train": train,
    "prefill": prefill,
    "search": search,
    "guided_search": functools.partial(search, guided=True),
}


def _guidance(experiment: AbstractExperiment) -> tuple[Users, CFItems]:
    """The CF vectors of a batch's users and of all items."""
    mesh, (width, items) = experiment.mesh, experiment.cf_part
    items = experiment.put(items, item_shardings(mesh, items))
    batch = experiment.config.inference.batch_size
    cf_BxD: Any = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    users = experiment.put(Users(cf_BxD), sharding.row_sharding(mesh, "prompts"))
    return users, items


def _prefill_arguments(experiment: AbstractExperiment) -> tuple[tuple, dict[str, Any]]:
    """The arguments of `read_prompts` for a batch of the longest prompts, and the static ones."""
    mesh, config = experiment.mesh, experiment.config
    graph, state = nnx.split(experiment.decoder_from(*experiment.initial_state()))
    search_config = build(SearchConfig, config.decoding, beams=experiment.beams)
    parts = search_shards(mesh)
    trie = experiment.sizes.trie(score_edges=search_config.vocabulary, parts=parts)
    trie = experiment.put(trie, trie_shardings(mesh, trie))
    temperature_T = jax.ShapeDtypeStruct((1,), jnp.float32)
    temperature_T = experiment.put(temperature_T, sharding.replicated(mesh))
    batch, tokens = config.inference.batch_size, experiment.longest
    shapes: Any = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((batch, tokens), (batch,))]
    soft = abstract_soft_tokens(batch, experiment.soft_tokens(config.data.history_length))
    texts = TextBatch(*shapes)._replace(soft=soft)
    texts = experiment.put(texts, sharding.row_sharding(mesh, "prompts"))
    program = SearchProgram(mesh, graph, search_config)
    return (state, texts, None, trie, temperature_T), {"program": program, "capacity": tokens}


def stored_dtype(config: DecoderConfig, path: str, floats: jnp.dtype) -> jnp.dtype:
    """The dtype of a parameter: quantised projections are stored as codes with float32 scales."""
    if config.quantised and path.endswith(SCALES[config.quantised]):
        return jnp.dtype(jnp.float32)
    if config.quantised and path.removeprefix("layers/") in config.projection_shapes:
        return jnp.dtype(jnp.int8 if config.quantised == "int8" else jnp.uint8)
    return floats
