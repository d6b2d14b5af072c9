"""Low-rank adapters (LoRA, arXiv 2106.09685): W x + (alpha / rank) B A dropout(x).

Adapters are a tree of their own, {projection: {'a': [L, in, R], 'b': [L, R, out]}}, so that a
checkpoint of them never holds the base model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import DecoderConfig, check_shapes
from tca4rec_jax.ranges import Count, Natural, Positive, Rate, Regex, check_fields

Adapters = dict[str, dict[str, jax.Array]]


@dataclass(frozen=True)
class LoRAConfig:
    """Which projections are adapted, and how.

    Attributes:
      rank: R, the inner width of an adapter.
      alpha: an adapter's product is scaled by alpha / rank.
      dropout: probability of leaving out an input of the adapters, in training.
      targets: regular expression, matched against a projection's whole name.
      first_layer: the layers below it keep adapters that change nothing and are not trained. They
        then need no backward pass and no saved activations: with half of the layers below, a
        training step costs three quarters.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Rate = 0.05
    targets: Regex = r"(q|k|v|o)_proj"
    first_layer: Natural = 0

    def __post_init__(self):
        check_fields(self, "lora.")

    @property
    def scale(self) -> float:
        """What the product of an adapter is multiplied by."""
        return self.alpha / self.rank


def adapter_shapes(config: DecoderConfig, lora: LoRAConfig) -> dict[str, dict[str, tuple]]:
    """Shapes of the adapters by projection.

    Raises UserError if `targets` matches no projection or `first_layer` leaves no layer.
    """
    layers = config.num_layers
    if lora.first_layer >= layers:
        raise UserError(
            f"lora.first_layer is {lora.first_layer}: expected at most {layers - 1}, the model's "
            "last layer, or nothing would be trained"
        )
    shapes = {
        name: {"a": (layers, inputs, lora.rank), "b": (layers, lora.rank, outputs)}
        for name, (inputs, outputs) in config.projection_shapes.items()
        if re.fullmatch(lora.targets, name)
    }
    if not shapes:
        raise UserError(
            f"lora.targets is {lora.targets!r}: expected to match a projection, one of "
            f"{', '.join(config.projection_shapes)}"
        )
    return shapes


def check_adapters(config: DecoderConfig, lora: LoRAConfig, adapters: Adapters | None) -> None:
    """Raises UserError as `check_shapes`, for adapters that do not have lora's shapes."""
    trees = {"adapters": adapters}, {"adapters": adapter_shapes(config, lora)}
    check_shapes("adapters", *(flatten_dict(tree, sep="/") for tree in trees))


def init_adapters(config: DecoderConfig, lora: LoRAConfig, key: jax.Array) -> Adapters:
    """Float32 adapters whose product is zero: A uniform in +-1/sqrt(in), B zero.

    The adapted model therefore equals the base model before the first update.
    """
    adapters = {}
    for index, (name, shapes) in enumerate(adapter_shapes(config, lora).items()):
        bound = shapes["a"][1] ** -0.5
        key_a = jax.random.fold_in(key, index)
        a = jax.random.uniform(key_a, shapes["a"], jnp.float32, -bound, bound)
        adapters[name] = {"a": a, "b": jnp.zeros(shapes["b"], jnp.float32)}
    return adapters


def merge_adapters(
    params: dict[str, jax.Array], adapters: Adapters, lora: LoRAConfig
) -> dict[str, jax.Array]:
    """Parameters with W + (alpha / rank) A B, summed in float32 and rounded to W's dtype.

    Raises ValueError for an adapter whose projection is missing or has another shape.
    """
    merged = dict(params)
    for name, adapter in adapters.items():
        path = f"layers/{name}"
        if path not in params:
            raise ValueError(f"adapters of {name!r}, but there is no parameter {path!r}")
        a, b = (jnp.asarray(adapter[part], jnp.float32) for part in "ab")
        # The default precision of accelerators is less than float32.
        delta = jnp.einsum("lir,lro->lio", a, b, precision=jax.lax.Precision.HIGHEST)
        weight = jnp.asarray(params[path])
        if delta.shape != weight.shape:
            raise ValueError(f"{path} has shape {weight.shape}, its adapters make {delta.shape}")
        merged[path] = (weight.astype(jnp.float32) + lora.scale * delta).astype(weight.dtype)
    return merged


def fold_in(key_B: jax.Array | None, number: jax.Array | int) -> jax.Array | None:
    """jax.random.fold_in of every row's key."""
    return None if key_B is None else jax.vmap(jax.random.fold_in, (0, None))(key_B, number)


def dropout(x: jax.Array, rate: float, key_B: jax.Array | None) -> jax.Array:
    """Inverted dropout of x [B, ...]; x itself without keys (inference).

    Every row has a key of its own, so its mask does not depend on how rows are spread over devices.
    Adapters of projections that read the same input share its dropped copy (in PEFT each has its
    own), which saves masks, most of the time that dropout takes on CPU.
    """
    if key_B is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(key_B)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def lora_deltas(
    dropped_x: jax.Array, adapters: Sequence[dict[str, jax.Array]], lora: LoRAConfig
) -> list[jax.Array]:
    """(alpha / rank) B A x of adapters that read the same x [..., in] after dropout -> [..., out].

    One product applies all A: each of them alone is too narrow to be fast.
    """
    dtype = dropped_x.dtype
    a = jnp.concatenate([adapter["a"].astype(dtype) for adapter in adapters], axis=1)
    b = [adapter["b"].astype(dtype) * jnp.asarray(lora.scale, dtype) for adapter in adapters]
    return _low_rank(dropped_x, a, b)


@jax.custom_vjp
def _low_rank(x: jax.Array, a: jax.Array, b: list[jax.Array]) -> list[jax.Array]:
    """x A_i B_i for each i; a holds the A_i side by side.

    The gradients of A and B sum over tokens with the narrow factor on the left: that is the operand
    which XLA transposes on CPU; the transpose of a wide one takes longer than the product.
    """
    return _low_rank_forward(x, a, b)[0]


def _low_rank_forward(x, a, b):
    low = checkpoint_name(x @ a, "low_rank")
    parts = jnp.split(low, len(b), axis=-1)
    return [part @ b_i for part, b_i in zip(parts, b, strict=True)], (x, low, a, b)


def _low_rank_backward(saved, d_out):
    x, low, a, b = saved
    d_low = jnp.concatenate(
        [jnp.einsum("...o,ro->...r", d, b_i) for d, b_i in zip(d_out, b, strict=True)], axis=-1
    )
    d_x = jnp.einsum("...r,ir->...i", d_low, a)
    parts = jnp.split(low, len(b), axis=-1)
    d_b = [_sum_of_products(part, d) for part, d in zip(parts, d_out, strict=True)]
    return d_x, _sum_of_products(d_low, x).T, d_b


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _sum_of_products(left: jax.Array, right: jax.Array) -> jax.Array:
    """[..., n], [..., m] -> [n, m], summed over everything before."""
    leading = tuple(range(left.ndim - 1))
    return jax.lax.dot_general(left, right, ((leading, leading), ((), ())))
