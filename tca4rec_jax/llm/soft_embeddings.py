"""Vectors in the place of tokens: what a projector makes of a CF model's item embeddings, say.

Axis letters: B batch, S sequence, P placeholders, D model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SoftEmbeddings(NamedTuple):
    """Vectors that enter in the place of some tokens' embeddings (LLaRA, arXiv 2312.02445).

    Attributes:
      values_BxPxD: any float dtype; the gradient of the loss reaches them.
      positions_BxP: int32, the place of each in its row's sequence, each at most once; one outside
        the sequence (as -1) is padding.
    """

    values_BxPxD: jax.Array
    positions_BxP: jax.Array


def put_soft_embeddings(embedded_BxSxD: jax.Array, soft: SoftEmbeddings) -> jax.Array:
    """The token embeddings with the soft ones in their places."""
    length = embedded_BxSxD.shape[1]
    # Negative indices would count from the end.
    places_BxP = jnp.where(soft.positions_BxP < 0, length, soft.positions_BxP)

    def put(embedded_SxD, values_PxD, places_P):
        return embedded_SxD.at[places_P].set(values_PxD.astype(embedded_SxD.dtype), mode="drop")

    return jax.vmap(put)(embedded_BxSxD, soft.values_BxPxD, places_BxP)
