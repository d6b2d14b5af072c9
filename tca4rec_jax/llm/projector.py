"""Vectors of a CF model in the place of some tokens' embeddings, through a trained projector.

LLaRA (arXiv 2312.02445): width D, GELU; CoLLM (arXiv 2310.19488): ten times the vectors' width,
ReLU; the published TCA4Rec "features": width 320, ReLU. Each has two layers.

Axis letters: B batch rows, S sequence, L soft tokens of a row, C width of a CF vector, D width of
the LLM.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.llm.config import check_shapes
from tca4rec_jax.ranges import Count, Natural, check_fields

# As torch.nn.GELU and ReLU compute them.
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


class ProjectorParam(nnx.Variable):
    """A projector's parameter: a type of its own, so that a filter picks it."""


class SoftTokens(NamedTuple):
    """Vectors that stand in the place of tokens' embeddings."""

    position_BxL: Any  # int32, in the row's tokens; S (or more) for padding, which is dropped
    vector_BxLxC: Any  # float32


@dataclass(frozen=True)
class ProjectorConfig:
    """Linear layers with an activation between them.

    Attributes:
      width: of the hidden layers; 0: that of the LLM.
      layers: how many matrices there are.
      activation: between them.
    """

    width: Natural = 0
    layers: Count = 2
    activation: Literal["gelu", "relu"] = "gelu"

    def __post_init__(self):
        check_fields(self, "projector.")


def projector_shapes(
    config: ProjectorConfig, inputs: int, outputs: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters, by name: weight_0 [inputs, width], bias_0 [width], weight_1, .."""
    hidden = [config.width or outputs] * (config.layers - 1)
    shapes: dict[str, tuple[int, ...]] = {}
    for index, sizes in enumerate(itertools.pairwise([inputs, *hidden, outputs])):
        shapes |= {f"weight_{index}": sizes, f"bias_{index}": sizes[1:]}
    return shapes


def init_projector(
    config: ProjectorConfig, inputs: int, outputs: int, key: jax.Array
) -> dict[str, jax.Array]:
    """Float32 parameters, uniform in +-1/sqrt(inputs of the layer), as PyTorch's linear layers."""
    params, bound = {}, 1.0
    for index, (name, shape) in enumerate(projector_shapes(config, inputs, outputs).items()):
        bound = shape[0] ** -0.5 if len(shape) == 2 else bound  # a bias has that of its weight
        key_of = jax.random.fold_in(key, index)
        params[name] = jax.random.uniform(key_of, shape, jnp.float32, -bound, bound)
    return params


class Projector(nnx.Module):
    """CF vectors [..., C] -> what the LLM's first layer reads, float32 [..., D]."""

    def __init__(
        self, config: ProjectorConfig, params: Mapping[str, jax.Array], inputs: int, outputs: int
    ):
        """params: by name as `projector_shapes`; inputs: C, outputs: D.

        Raises UserError naming parameters that are missing, unknown or of another shape.
        """
        check_shapes("projector's parameters", params, projector_shapes(config, inputs, outputs))
        self.config, self.inputs = config, inputs
        self.layers = nnx.Dict({name: ProjectorParam(value) for name, value in params.items()})

    def __call__(self, vectors_C: jax.Array) -> jax.Array:
        """The projected vectors [..., D] of vectors [..., C]."""
        x = vectors_C
        for index in range(self.config.layers):
            x = _ACTIVATIONS[self.config.activation](x) if index else x
            weight, bias = (self.layers[f"{part}_{index}"][...] for part in ("weight", "bias"))
            # asarray: of the device's part of a ShardedWeight.
            product = jnp.matmul(x, jnp.asarray(weight), preferred_element_type=jnp.float32)
            x = product + jnp.asarray(bias).reshape((1,) * (x.ndim - 1) + (-1,))
        return x

    def put(self, embedded_BxSxD: jax.Array, soft: SoftTokens) -> jax.Array:
        """The embeddings with the projected vectors in the place of those at `soft.position`."""
        projected_BxLxD = self(soft.vector_BxLxC).astype(embedded_BxSxD.dtype)
        return jax.vmap(lambda x_SxD, at_L, new_LxD: x_SxD.at[at_L].set(new_LxD, mode="drop"))(
            embedded_BxSxD, soft.position_BxL, projected_BxLxD
        )
