"""A decoder's architecture: sizes, parameter shapes, logical axes, FLOPs; how its layers run."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tca4rec_jax.errors import UserError, check_choice
from tca4rec_jax.ranges import Count, Positive, Range, Rate, check_fields

# Which tensor axis is which, in the words a sharding module maps to mesh axes. The first pattern
# that matches the whole '/'-joined path of a parameter wins. 'heads' is the flattened Qh*H axis,
# 'norm' and 'adapter' are axes of small arrays whatever their size is.
LOGICAL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding", ("vocabulary", "embed")),
    (r"lm_head", ("embed", "vocabulary")),
    (r"final_norm", ("norm",)),
    (r"layers/(attn|mlp)(_post)?_norm", ("layers", "norm")),
    (r"layers/[qk]_norm", ("layers", None)),
    (r"layers/q_proj(_group_scale)?", ("layers", "embed", "heads")),
    (r"layers/[kv]_proj(_group_scale)?", ("layers", "embed", "kv_heads")),
    (r"layers/o_proj(_group_scale)?", ("layers", "heads", "embed")),
    (r"layers/(gate|up)_proj(_group_scale)?", ("layers", "embed", "feed_forward")),
    (r"layers/down_proj(_group_scale)?", ("layers", "feed_forward", "embed")),
    (r"layers/q_proj_(bias|scale)", ("layers", "heads")),
    (r"layers/[kv]_proj_(bias|scale)", ("layers", "kv_heads")),
    (r"layers/(gate|up)_proj_(bias|scale)", ("layers", "feed_forward")),
    (r"layers/(o|down)_proj_(bias|scale)", ("layers", "norm")),
    (r"adapters/(q|k|v|o|gate|up|down)_proj/a", ("layers", "adapter", "rank")),
    (r"adapters/(q|k|v|o|gate|up|down)_proj/b", ("layers", "rank", "adapter")),
    (r"new_rows/tables/embedding", (None, "embed")),
    (r"new_rows/tables/lm_head", ("embed", None)),
    (r"projector/layers/weight_\d+", (None, "embed")),
    (r"projector/layers/bias_\d+", ("norm",)),
)

# How projections can be quantised (quantisation.py) -> what is added to their paths for the scales.
SCALES = {"int8": "_scale", "nf4": "_group_scale"}
GROUP = 64  # inputs that share a scale in nf4
_SHOWN = 12  # arrays in a message

# No decoder has more; the tensors of each are named before any is read.
Layers = Annotated[int, Range("1 to 1000", lambda n: 1 <= n <= 1000)]


def logical_axes(path: str) -> tuple[str | None, ...]:
    """Logical axis names of the parameter at `path` ('layers/q_proj', 'adapters/q_proj/a', ...).

    Raises ValueError for a path that no row of LOGICAL_AXES matches.
    """
    for pattern, axes in LOGICAL_AXES:
        if re.fullmatch(pattern, path):
            return axes
    raise ValueError(f"parameter {path!r} has no logical axes; add a row to LOGICAL_AXES")


def check_shapes(
    what: str, arrays: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UserError naming the first arrays (anything with a shape) that are missing, unknown or
    of another shape."""
    problems = [f"missing {name}" for name in expected if name not in arrays]
    problems += [f"unknown {name}" for name in arrays if name not in expected]
    problems += [
        f"{name} has shape {tuple(arrays[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in arrays and tuple(arrays[name].shape) != shape
    ]
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"and {len(problems) - _SHOWN} more"]
    if problems:
        raise UserError(f"{what} do not fit the config: " + "; ".join(problems))


@dataclass(frozen=True)
class RopeScaling:
    """Longer wavelengths of the rotary positions than a model was pretrained with.

    kind: 'linear' divides every frequency by `factor`; 'llama3' divides those that turn fewer than
    `low_freq_factor` times in `original_max_position_embeddings`, keeps those that turn more than
    `high_freq_factor` times, and blends in between (Llama 3.1).
    """

    kind: Literal["linear", "llama3"]
    factor: Positive
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: Count = 8192

    def __post_init__(self):
        check_fields(self, "rope scaling ")
        low, high = self.low_freq_factor, self.high_freq_factor
        if high <= low:
            raise UserError(f"high_freq_factor ({high}) must be above low_freq_factor ({low})")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder with RMSNorm, rotary positions, grouped queries and a gated feed-forward.

    What families add is in the fields with a default; a parameter exists if it is in
    `parameter_shapes`.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_layers: Layers
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    rope_theta: Positive = 10000.0
    rms_norm_eps: Positive = 1e-5
    tie_embeddings: bool = False
    max_positions: Count = 2048
    rope_scaling: RopeScaling | None = None  # how the rotary frequencies are changed
    biases: tuple[str, ...] = ()  # the projections that add a bias ('q_proj', ...)
    qk_norm: bool = False  # each head of q and k is normalised (RMS) before the rotation
    sliding_window: Count | None = None  # a token sees so many keys, the last one its own
    full_layers: tuple[int, ...] = ()  # those that see everything in spite of sliding_window
    # Of the layers with a sliding window, which then have no rope_scaling; None: as the others.
    local_rope_theta: float | None = None
    norm_offset: float = 0.0  # added to the weight of every norm
    post_norms: bool = False  # what attention and feed-forward add is normalised first
    embedding_scale: float = 1.0  # multiplies the embeddings of tokens, not the head
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim's
    activation: str = "silu"  # of the gate, a key of blocks.ACTIVATIONS
    quantised: str = ""  # how the projections are stored, a key of SCALES; '': as floats
    family: str = "llama"  # model_type of the Hugging Face files; changes nothing that is computed

    def __post_init__(self):
        check_fields(self)
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            raise UserError(f"num_heads ({heads}) must be a multiple of num_kv_heads ({kv_heads})")
        if self.head_dim % 2:
            raise UserError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        check_choice("llm.quantise", self.quantised, (*SCALES, ""))
        for name, (inputs, _) in self.projection_shapes.items():
            if self.quantised == "nf4" and inputs % GROUP:
                raise UserError(
                    f"llm.quantise is 'nf4', which takes inputs in groups of {GROUP}, but {name}"
                    f" has {inputs}: use 'int8'"
                )
        unknown = sorted(set(self.biases) - set(self.projection_shapes))
        if unknown:
            raise UserError(
                f"biases of {unknown}; the projections are {', '.join(self.projection_shapes)}"
            )

    def first_layers(self, count: int) -> "DecoderConfig":
        """The config of its first layers only."""
        full_layers = tuple(layer for layer in self.full_layers if layer < count)
        changed: dict[str, Any] = {"num_layers": count, "full_layers": full_layers}
        if len(full_layers) == count:
            changed |= {"full_layers": (), "sliding_window": None}
        return dataclasses.replace(self, **changed)

    @property
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """(input, output) sizes of the seven weight matrices of one layer."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden_size, heads),
            "k_proj": (self.hidden_size, kv_heads),
            "v_proj": (self.hidden_size, kv_heads),
            "o_proj": (heads, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every base parameter by '/'-joined path; layers are stacked on axis 0."""
        hidden, head = (self.hidden_size,), (self.head_dim,)
        layer: dict[str, tuple[int, ...]] = {"attn_norm": hidden, "mlp_norm": hidden}
        for name, (inputs, outputs) in self.projection_shapes.items():
            layer[name] = inputs // 2 if self.quantised == "nf4" else inputs, outputs
            if self.quantised:
                scale = (outputs,) if self.quantised == "int8" else (inputs // GROUP, outputs)
                layer[name + SCALES[self.quantised]] = scale
            layer |= {f"{name}_bias": (outputs,)} if name in self.biases else {}
        layer |= {"attn_post_norm": hidden, "mlp_post_norm": hidden} if self.post_norms else {}
        layer |= {"q_norm": head, "k_norm": head} if self.qk_norm else {}
        shapes = {"embedding": (self.vocab_size, self.hidden_size), "final_norm": hidden}
        shapes |= {f"layers/{name}": (self.num_layers, *shape) for name, shape in layer.items()}
        if not self.tie_embeddings:
            shapes["lm_head"] = (self.hidden_size, self.vocab_size)
        return shapes

    def flops_per_token(
        self,
        kind: str = "forward",
        *,
        context: float = 0.0,
        vocabulary_share: float = 1.0,
        first_layer: int = 0,
        prefix_cached: bool = False,
    ) -> float:
        """Matrix-multiply FLOPs per token.

        kind: 'forward' (2 per weight), 'lora' (4: the base weights have no gradient; the adapters'
        own FLOPs are not counted) or 'full' (6); ValueError for another. `context` is the mean
        number of keys a token attends to ((S + 1) / 2 for a causal sequence of S);
        `vocabulary_share` the share of the tokens whose vocabulary logits are computed; layers
        below `first_layer` only run forward, or not at all if `prefix_cached`.
        """
        factors = {"forward": (2, 1), "lora": (4, 3), "full": (6, 3)}
        if kind not in factors:
            raise ValueError(f"kind must be one of {sorted(factors)}, got {kind!r}")
        layer_weights = sum(i * o for i, o in self.projection_shapes.values())
        layer_attention = 4 * self.num_heads * self.head_dim * context

        def layers(count: int, kind: str) -> float:
            per_weight, attention_passes = factors[kind]
            return count * (per_weight * layer_weights + attention_passes * layer_attention)

        head = factors[kind][0] * vocabulary_share * self.hidden_size * self.vocab_size
        trained = layers(self.num_layers - first_layer, kind)
        below = 0.0 if prefix_cached else layers(first_layer, "forward")
        return below + trained + head


@dataclass(frozen=True)
class DecoderOptions:
    """How the layers run; but for rounding, they compute the same with any.

    Attributes:
      remat: what is saved for the backward pass: with 'none' every activation, with 'products' the
        results of matrix products, from which the elementwise rest is computed again (less memory,
        and on CPU no slower), with 'full' only each layer's input.
      attention: 'xla', 'cudnn' (GPU; of prompts and beams, too) or 'splash' (TPU, in training); the
        two kernels cannot run a model whose layers differ in their sliding window.
      dropout: probability of leaving out an entry of the embeddings and of what each block adds, in
        training. Small models that are trained from scratch need it; adapters have their own.
    """

    remat: Literal["none", "products", "full"] = "products"
    attention: Literal["xla", "cudnn", "splash"] = "xla"
    dropout: Rate = 0.0

    def __post_init__(self):
        check_fields(self, "llm.")
