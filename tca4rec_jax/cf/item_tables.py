"""Item tables made of vectors of the items, such as an LLM's embeddings; the same for every model.

`start_tables` gives a table its first values, which are trained: LLMInit (arXiv 2503.01814), whose
selections are 'random', 'uniform' and 'variance', and 'pca'. `freeze_tables` keeps the vectors as
they are behind a trained adapter to the model's width, as LLM2Rec (arXiv 2506.21579) does.

Both take the vectors without their mean, which all of an LLM's embeddings share, and give a table
the spread that it has in a fresh model.

Axis letters: I items, E width of the vectors, D width of the model.
"""

from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tca4rec_jax.cf.models.base import CFModel, Statistic
from tca4rec_jax.errors import UserError

_GELU_POWER = 0.425  # mean square of the GELU of a standard normal


class FrozenItems(nnx.Module):
    """Frozen vectors behind a trained adapter, in the place of the nnx.Param of an item table."""

    def __init__(
        self, vectors_IxE: jax.Array, units: int, adapter: str, std: Any, *, rngs: nnx.Rngs
    ):
        """`adapter` is 'linear' or 'mlp'; `std` is the spread of a fresh table."""
        self.adapter, self.vectors = adapter, Statistic(vectors_IxE)
        scales = [std] if adapter == "linear" else [1.0, std * (_GELU_POWER * units) ** -0.5]
        widths = [vectors_IxE.shape[1], *[units] * len(scales)]
        self.layers = nnx.List(
            [
                nnx.Linear(*widths[n : n + 2], kernel_init=_normal(scale), rngs=rngs)
                for n, scale in enumerate(scales)
            ]
        )

    def __getitem__(self, index: EllipsisType) -> jax.Array:
        """The table, float32 [I, D], as an nnx.Param gives it."""
        x = self.layers[0](self.vectors[...])
        for layer in self.layers[1:]:
            x = layer(jax.nn.gelu(x))
        return x


def start_tables(model: CFModel, vectors_IxE: np.ndarray, how: str, seed: int) -> None:
    """Gives the item tables of a fresh model their first values; `how` is as in `of_width`.

    Raises UserError as `of_width`.
    """
    for name in model.item_tables:
        table = getattr(model, name)
        first_IxD = of_width(vectors_IxE, table.shape[1], how, seed)
        table[...] = jnp.asarray(first_IxD * (np.std(table[...]) / np.std(first_IxD)))


def freeze_tables(model: CFModel, vectors_IxE: np.ndarray, adapter: str, seed: int) -> None:
    """Puts FrozenItems in the place of the item tables of a fresh model.

    A vector's norm is 1 on average, so that a step of Adam moves a row about as far as without.
    """
    centred_IxE = vectors_IxE - vectors_IxE.mean(axis=0)
    norm = np.sqrt(np.mean(np.sum(centred_IxE**2, axis=1)))
    _put_frozen(model, jnp.asarray(centred_IxE / norm), adapter, seed)


def of_width(vectors_IxE: np.ndarray, units: int, how: str, seed: int) -> np.ndarray:
    """The centred vectors in `units` dimensions, float32 [I, D].

    `how` is 'pca': the principal components; or dimensions as they are: 'random' ones, 'uniform':
    evenly spaced, 'variance': those of the highest variance. Raises UserError if there are fewer.
    """
    width = vectors_IxE.shape[1]
    if width < units:
        raise UserError(
            f"the item vectors have {width} dimensions, fewer than the {units} units of the CF "
            "model: lower its units, or give cf.item_table=frozen"
        )
    centred_IxE = vectors_IxE - vectors_IxE.mean(axis=0)
    if how == "pca":
        _, axes_ExE = np.linalg.eigh(centred_IxE.T @ centred_IxE)  # ascending
        return centred_IxE @ axes_ExE[:, ::-1][:, :units]
    chosen_D = {
        "random": lambda: np.random.default_rng(seed).choice(width, units, replace=False),
        "uniform": lambda: np.linspace(0, width - 1, units).round().astype(int),
        "variance": lambda: np.argsort(-centred_IxE.var(axis=0), kind="stable")[:units],
    }[how]()
    return centred_IxE[:, np.sort(chosen_D)]


def frozen_fields(model: CFModel) -> dict[str, Any]:
    """What `with_frozen_tables` needs to make the model's frozen tables; {} if it has none."""
    table = getattr(model, model.item_tables[0])
    if not isinstance(table, FrozenItems):
        return {}
    return {"adapter": table.adapter, "width": table.vectors.shape[1]}


def with_frozen_tables(model: CFModel, adapter: str, width: int) -> CFModel:
    """A model of this structure, to be filled from a checkpoint."""
    _put_frozen(model, jnp.zeros((model.config.num_items, width)), adapter, 0)
    return model


def _put_frozen(model: CFModel, vectors_IxE: jax.Array, adapter: str, seed: int) -> None:
    rngs = nnx.Rngs(seed)
    for name in model.item_tables:
        table_IxD = getattr(model, name)[...]
        std, units = jnp.std(table_IxD), table_IxD.shape[1]
        setattr(model, name, FrozenItems(vectors_IxE, units, adapter, std, rngs=rngs))


def _normal(std: Any):
    return lambda key, shape, dtype=jnp.float32, **_: std * jax.random.normal(key, shape, dtype)
