"""Whether the fields of a config go together, beyond each one's range and choices."""

from ml_collections import ConfigDict

from tca4rec_jax.config import MOVIES, build, config_fields, config_value
from tca4rec_jax.data.templates import (
    ITEM_FIELDS,
    PromptTemplate,
    carried_vectors,
    check_fields_of,
    shows_ids,
)
from tca4rec_jax.errors import UserError, check_choice
from tca4rec_jax.llm.attention import check_implementation
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.from_scratch import RANDOM
from tca4rec_jax.llm.lora import LoRAConfig, adapter_shapes
from tca4rec_jax.ranges import check
from tca4rec_jax.sections import SECTIONS, required
from tca4rec_jax.training.state import TRAINED
from tca4rec_jax.training.validation import ValidationConfig


def validate(config: ConfigDict) -> None:
    """Raises UserError for a field that is none of its choices or out of its range."""
    for name, field in config_fields().items():
        check(name, config_value(config, name), field.annotation)
    if config.objective.cf_dtype == "bfloat16" and config.mesh.tensor > 1:
        raise UserError(
            "objective.cf_dtype is 'bfloat16', which adds item by item: set mesh.tensor=1, or "
            "objective.cf_dtype=float32"
        )
    decay, steps = config.optimizer.decay_steps, config.training.steps
    if decay is not None and decay < steps:
        raise UserError(
            f"optimizer.decay_steps is {decay}, after which nothing is learned: expected at least "
            f"{steps}, training.steps"
        )
    template = build(PromptTemplate, config.prompt)
    fields = (*ITEM_FIELDS, *config.data.attributes)
    check_fields_of(template.item_parts, fields, "prompt.item")
    check_fields_of(template.target_parts, fields, "prompt.target")
    for section, kinds in SECTIONS.items():  # what several fields have to do with each other
        for kind in kinds:
            build(kind, config_value(config, section), **dict.fromkeys(required(kind), 1))
    validation = build(ValidationConfig, config.validation)
    beams = validation.beams or config.decoding.beams
    if validation.is_on and validation.cutoff > beams:
        raise UserError(
            f"validation.metric is {validation.metric!r}, but its search has {beams} beams: set "
            f"validation.beams={validation.cutoff}, or a metric of fewer places"
        )
    if validation.is_on and 0 < config.evaluation.candidates <= validation.cutoff:
        raise UserError(
            f"validation.metric is {validation.metric!r}, which all evaluation.candidates="
            f"{config.evaluation.candidates} reach: give a metric of fewer places"
        )


def doubts(config: ConfigDict) -> list[str]:
    """What is allowed, but most likely not meant: a line each."""
    movies = ("movielens_100k", "movielens")
    if MOVIES in config.prompt.templates and config.data.source not in movies:
        return [
            f"prompt.templates is {config.prompt.templates}, with data.source={config.data.source}"
            ": if the items are no movies, say what they are with --config.prompt.templates in "
            "every step"
        ]
    return []


def check_fits(config: ConfigDict, architecture: DecoderConfig) -> None:
    """Raises UserError for prompts or adapters that do not fit an architecture."""
    longest = architecture.max_positions
    if config.prompt.max_tokens > longest:
        raise UserError(
            f"prompt.max_tokens is {config.prompt.max_tokens}: expected at most {longest}, the "
            f"positions of {config.llm.weights}"
        )
    if config.llm.train == "lora":
        architecture = architecture.first_layers(config.llm.num_layers or architecture.num_layers)
        adapter_shapes(architecture, build(LoRAConfig, config.lora))


def check_llm(config: ConfigDict, platform: str) -> None:
    """Raises UserError for fields of the LLM, and of what is trained, that do not go together."""
    llm, vectors = config.llm, carried_vectors(config.prompt)
    check_choice("llm.train", llm.train, TRAINED)
    if llm.weights == RANDOM and llm.train != "full":
        raise UserError(
            f"llm.weights is {RANDOM!r}, so every weight has to be trained: set llm.train=full"
        )
    if llm.train == "lora" and config.optimizer.moments == "factored":
        raise UserError(
            "optimizer.moments is 'factored', but the matrices of adapters are too narrow: set "
            "optimizer.moments=bfloat16, or llm.train=full"
        )
    trained = config.lora.train or (vectors and config.projector.train)
    if llm.train == "lora" and not trained and not (shows_ids(config.prompt) and config.ids.train):
        raise UserError(
            "nothing is trained: lora.train is False, and no projector or new tokens that prompts "
            "need with projector.train or ids.train"
        )
    if config.training.cache_hidden_states and (vectors or shows_ids(config.prompt)):
        raise UserError(
            "training.cache_hidden_states keeps what layers make of texts alone, but prompts carry "
            "vectors or ids: give training.cache_hidden_states=false"
        )
    if llm.quantise and llm.train == "full":
        raise UserError(
            f"llm.quantise is {llm.quantise!r}, but quantised weights cannot be trained: give"
            " llm.train=lora, or leave llm.quantise empty"
        )
    check_implementation(llm.attention, platform, llm.dtype)
    if llm.attention != "xla" and config.mesh.tensor > 1:
        raise UserError(
            f"llm.attention is {llm.attention!r}, a kernel that takes all heads of a row: set "
            "mesh.tensor=1, or llm.attention=xla"
        )
