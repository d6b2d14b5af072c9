"""The sections of a config: the classes here, and those of the modules that they configure.

They alone say what a field is called, its default and what it means. config.py makes a ConfigDict
of them.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from tca4rec_jax.cf.settings import MODEL_FIELDS, CFFields
from tca4rec_jax.cf.trainer import FitSchedule
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.data.filters import Filters
from tca4rec_jax.data.settings import DataConfig
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.llm.config import DecoderOptions
from tca4rec_jax.llm.from_scratch import FromScratch
from tca4rec_jax.llm.lora import LoRAConfig
from tca4rec_jax.llm.projector import ProjectorConfig
from tca4rec_jax.metrics import CUTOFFS
from tca4rec_jax.ranges import (
    Buckets,
    Count,
    Cutoffs,
    FolderName,
    FolderNameOrEmpty,
    LocalPath,
    Natural,
    NotNegative,
    Range,
    Seed,
    Span,
    Temperature,
    Temperatures,
    Text,
    annotations,
    plain_type,
)
from tca4rec_jax.semantic_ids.rq_vae import RQVAEConfig
from tca4rec_jax.semantic_ids.settings import IdsFields, Quantiser
from tca4rec_jax.trackers import TrackingConfig
from tca4rec_jax.training.optimizer import OptimizerConfig
from tca4rec_jax.training.validation import ValidationConfig


class RunFields(NamedTuple):
    """Fields of no section.

    Attributes:
      seed: of everything random but the data and the CF model, which have their own.
      run: the name of the LLM run below WORKDIR/llm; by default after alpha, as in alpha_0.1.
    """

    seed: Seed = 0
    run: FolderName | None = None


class MeshFields(NamedTuple):
    """Devices along each axis of the mesh.

    Attributes:
      data: copies of the model, which share the batch; -1 takes the devices that the others leave.
      fsdp: devices that share the batch and keep a part of every weight.
      tensor: devices that share the heads and the feed-forward width of one copy.
    """

    data: Annotated[int, Range("at least 1, or -1", lambda n: n >= 1 or n == -1)] = -1
    fsdp: Count = 1
    tensor: Count = 1


class LLMFields(NamedTuple):
    """The LLM and what of it is trained.

    Attributes:
      weights: a name in data/downloads.py, a .gguf file or a Hugging Face folder; 'random': a new
        decoder of the architecture `random`, which knows the tokens of semantic ids alone.
      architecture: a name in llm/architectures.py, to compile programs without weights; by default
        that in the folder `weights`, or the one that the name of `weights` begins with.
      num_layers: keep only the first layers; by default all.
      dtype: of the weights that are not trained.
      quantise: the layers' frozen weights, to 8 or 4.5 bits each; by default they keep `dtype`.
      train: 'lora' trains adapters, 'full' every weight, in float32.
    """

    weights: LocalPath = "smollm2-135m-instruct"
    architecture: str | None = None
    num_layers: Count | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantise: Literal["int8", "nf4"] | None = None
    train: Literal["lora", "full"] = "lora"


class AdapterFields(NamedTuple):
    """What becomes of the adapters.

    Attributes:
      train: whether training changes them, with llm.train=lora; those that stay as they are come
        from training.start_from, or change nothing.
    """

    train: bool = True


class ProjectorFields(NamedTuple):
    """The projector of the CF vectors that the placeholders of prompts carry.

    Attributes:
      vectors: a .npy file of the items' vectors, in the order of the catalogue; by default those
        of the CF logits.
      weights: a projector.safetensors to begin with; by default it begins at random.
      train: whether training changes it.
      weight_decay: its own, decoupled.
      curriculum: LLaRA's: a batch reads vectors with a probability that rises from 0 at the first
        step to 1 at the last, else the placeholders' own embedding.
    """

    vectors: LocalPath | None = None
    weights: LocalPath | None = None
    train: bool = True
    weight_decay: NotNegative = 1e-5
    curriculum: bool = False


class RecommenderFields(NamedTuple):
    """The recommender.

    Attributes:
      name: of its five choices, a key of recommenders.RECOMMENDERS.
      answers: of a recommender that answers: what it writes if the user will like an item, and if
        not.
    """

    name: str = "generative"
    answers: Annotated[tuple[Text, Text], Range("two, not the same", lambda a: a[0] != a[1])] = (
        " Yes",
        " No",
    )


class TrainingFields(NamedTuple):
    """The training of the LLM.

    Attributes:
      rows: how many rows are trained on, sampled with the run's seed; 0 takes all.
      targets: 'all' supervises every title of a user's sequence after the first, 'last' one title
        per row, as published.
      unsupervised_end: so many tokens at the end of every title, its end token first, are read but
        not trained on. The published code leaves out 2, though its lists are scored with them.
      tasks: further examples, one of every item each: texts with fields of items, as '{title} is
        {id}', the last of which, and what follows it, is to be generated. Plain next-token
        prediction; the log's NLL per title has their answers in it, too.
      batch_size: examples per step, over all devices.
      tokens_per_batch: a step takes as many times batch_size examples as so many tokens hold, with
        their padding, of each bucket; 0: batch_size.
      micro_batches: parts of a device's share of the batch that it goes through one after the
        other: the same step, in less memory.
      rows_per_mean: the loss is the mean of the means over so many rows each, as transformers'
        Trainer averages its micro-batches; 0: of all positions of the batch, each alike.
      steps: how many.
      buckets: padded lengths of an example, in tokens, each compiled once; none, (): the four with
        the least padding of the data.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: the latest so many are kept, the one of the lowest loss, and the best one by
        validation.
      watchdog_seconds: a step that takes longer is taken for hung and ends the process; 0: none is.
      cache_hidden_states: keep the hidden states after the frozen prefix, the layers below
        lora.first_layer, in the work directory instead of running it again (llm.dtype, tokens x
        width: 0.6 MB a row of SmolLM2-135M).
      profile_steps: (first, last + 1) of the steps that jax.profiler records; by default none.
      start_from: another LLM run: those of its parameters that this run has too are its first.
    """

    rows: Natural = 0
    targets: Literal["all", "last"] = "all"
    unsupervised_end: Natural = 0
    tasks: tuple[Text, ...] = ()
    batch_size: Count = 16
    tokens_per_batch: Natural = 0
    micro_batches: Count = 1
    rows_per_mean: Natural = 0
    steps: Count = 1000
    buckets: Buckets = (64, 128, 192, 256)
    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
    watchdog_seconds: NotNegative = 1800.0
    cache_hidden_states: bool = False
    profile_steps: Span | None = None
    start_from: FolderName | None = None


class DecodingFields(NamedTuple):
    """What may be recommended.

    Attributes:
      beta: temperature of the CF logits in guidance; by default objective.beta.
      exclude_history: never recommend what the user already has; by default if no user of the
        training data has an item twice.
      allow: a text file, one item id per line: nothing else is recommended.
      deny: a text file, one item id per line: these are not recommended.
      max_title_tokens: no title of more tokens, its end included, is recommended; by default any.
    """

    beta: Temperature | None = None
    exclude_history: bool | None = None
    allow: LocalPath | None = None
    deny: LocalPath | None = None
    max_title_tokens: Count | None = None


class InferenceFields(NamedTuple):
    """How a trained run is loaded and its prompts are batched: evaluation, recommending, export.

    Attributes:
      checkpoint: 'last', the 'best' by validation, or 'lowest_training_loss': of the mean since the
        checkpoint before.
      batch_size: prompts per call, over all devices.
      buckets: how many padded lengths of prompts there are, each compiled once.
      unfinished: take a run that has not all of its training.steps yet.
    """

    checkpoint: Literal["last", "best", "lowest_training_loss"] = "last"
    batch_size: Count = 16
    buckets: Count = 2
    unfinished: bool = False


class EmbeddingFields(NamedTuple):
    """The LLM's embeddings of items (launch/embed_items.py): its last hidden states, pooled.

    Attributes:
      text: of an item, a template of {title} and the catalogue's attributes, such as {brand}.
      pooling: 'mean' of the states at the text's tokens, or that at the 'last' one.
      max_tokens: of a text; the rest is cut.
      batch_size: texts per call, over all devices.
      buckets: how many padded lengths of texts there are, each compiled once.
    """

    text: Text = "{title}"
    pooling: Literal["mean", "last"] = "mean"
    max_tokens: Count = 256
    batch_size: Count = 64
    buckets: Count = 4


class EvaluationFields(NamedTuple):
    """What launch/evaluate.py compares.

    Attributes:
      split: whose rows are ranked.
      rows: how many are sampled; 0 takes all.
      seed: of the sample, the candidates and the intervals, whatever the training's seed is.
      cutoffs: K of the metrics, no more than decoding.beams; the largest is compared and drawn.
      hits: what counts in the table: the target 'item', or any with its 'title', as published. The
        other stands beside it.
      text_match: by title, compare what a list's tokens decode to with the title's text, as the
        published evaluation does.
      candidates: rank the target among so many items, itself and others outside the history, that
        are drawn with the seed; 0 ranks all items.
      examples: how many rows examples.md and report.html show.
      temperatures: of the LLM's logits; the likelihood of the target is reported at the best of
        them for each model.
      variants: (label, LLM run or '' for the untrained LLM, weight of the CF model) of each row of
        the table; by default all finished runs and the untrained LLM, alone.
      differences: pairs of labels whose difference is reported with its interval; by default, and
        with the flag --runs, each with what it is naturally compared to.
    """

    split: Literal["train_sequences", "train", "validation", "test"] = "test"
    rows: Natural = 400
    seed: Seed = 0
    cutoffs: Cutoffs = CUTOFFS
    hits: Literal["item", "title"] = "item"
    text_match: bool = False
    candidates: Annotated[int, Range("0 or at least 2", lambda n: n == 0 or n >= 2)] = 0
    examples: Natural = 5
    temperatures: Temperatures = (1.0, 1.25, 1.5, 2.0, 3.0)
    variants: tuple[tuple[str, FolderNameOrEmpty, NotNegative], ...] = ()
    differences: tuple[tuple[str, str], ...] = ()


SECTIONS: dict[str, tuple[Any, ...]] = {
    "": (RunFields,),
    "mesh": (MeshFields,),
    "data": (DataConfig,),
    "data.filters": (Filters,),
    "cf": (CFFields, FitSchedule),
    **{f"cf.{model}": kinds for model, kinds in MODEL_FIELDS.items()},
    "llm": (LLMFields, DecoderOptions),
    "llm.random": (FromScratch,),
    "lora": (LoRAConfig, AdapterFields),
    "projector": (ProjectorConfig, ProjectorFields),
    "recommender": (RecommenderFields,),
    "prompt": (PromptTemplate,),
    "ids": (IdsFields, Quantiser),
    "ids.rq_vae": (RQVAEConfig,),
    "objective": (Objective,),
    "optimizer": (OptimizerConfig,),
    "training": (TrainingFields,),
    "validation": (ValidationConfig,),
    "decoding": (DecodingFields, SearchConfig, ScoreWeights),
    "tracking": (TrackingConfig,),
    "inference": (InferenceFields,),
    "embedding": (EmbeddingFields,),
    "evaluation": (EvaluationFields,),
}
# A script's flag, a size of compiled programs, a choice of the caller, a section of its own.
_INTERNAL = {"guidance", "edge_chunk", "renormalise", "filters"}


class Field(NamedTuple):
    """A field of a section: `default` is None if not set, `annotation` says type and range."""

    name: str
    default: Any
    type: type
    annotation: Any
    description: str


def fields_of(kind: Any) -> Iterator[Field]:
    """The user's fields of a dataclass or NamedTuple, described by its docstring's Attributes.

    An object stands for its class with its values as defaults. The data give what has no default.
    """
    class_ = kind if isinstance(kind, type) else type(kind)
    hints, descriptions = annotations(class_), _descriptions(class_)
    for name, parameter in inspect.signature(class_).parameters.items():
        default = parameter.default if class_ is kind else getattr(kind, name)
        if name not in _INTERNAL and not callable(default):  # as the marker of no default is
            hint = hints[name]
            yield Field(name, default, plain_type(hint), hint, descriptions[name])


def required(kind: Any) -> list[str]:
    """The fields of a class without a default: sizes that the data give."""
    parameters = inspect.signature(kind).parameters if isinstance(kind, type) else {}
    return [name for name, one in parameters.items() if one.default is one.empty]


def _descriptions(kind: type) -> dict[str, str]:
    listed = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for entry in re.split(r"^  (?=\w)", listed, flags=re.MULTILINE)[1:]:
        names, _, text = entry.partition(":")
        found |= dict.fromkeys(re.split(r",\s+", names), " ".join(text.split()))
    return found
