"""Tokens that a pretrained LLM lacks: added to its tokenizer, with rows of their own.

The rows are parameters beside the pretrained tables (embedding, and the head if it is not tied),
which stay whole and frozen: neither copied nor put together with the new rows until an export.

Axis letters: D width, V tokens of the tables, W new tokens, U some tokens.
"""

import copy
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from tca4rec_jax.llm.config import DecoderConfig, check_shapes

# The axis of the tokens in each table.
_TOKEN_AXIS = {"embedding": 0, "lm_head": 1}


class NewRow(nnx.Variable):
    """Rows of new tokens: a type of its own, so that a filter picks it."""


def with_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer to which each of these texts is one token.

    Those that it lacks get the ids from len(tokenizer) on, in their order.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return tokenizer


def new_row_shapes(config: DecoderConfig, count: int) -> dict[str, tuple[int, int]]:
    """Shapes of the rows of `count` tokens, by table."""
    shapes = {"embedding": (count, config.hidden_size)}
    return shapes if config.tie_embeddings else shapes | {"lm_head": (config.hidden_size, count)}


def init_new_rows(
    config: DecoderConfig, count: int, tables: Mapping[str, jax.Array], key: jax.Array
) -> dict[str, jax.Array]:
    """Float32 rows, by table, drawn like the old ones: normal, with their mean and deviation in
    every direction."""
    rows = {}
    for index, (name, shape) in enumerate(new_row_shapes(config, count).items()):
        axis = _TOKEN_AXIS[name]
        mean = jnp.mean(tables[name], axis, jnp.float32, keepdims=True)
        deviation = jnp.std(tables[name], axis, jnp.float32, keepdims=True)
        noise = jax.random.normal(jax.random.fold_in(key, index), shape)
        rows[name] = mean + deviation * noise
    return rows


class NewRows(nnx.Module):
    """The rows of tokens first .. first + W - 1, whatever the old tables have there."""

    def __init__(self, config: DecoderConfig, first: int, params: Mapping[str, jax.Array]):
        """params: float, by table, as `init_new_rows`. Raises UserError as `check_shapes`."""
        count = params["embedding"].shape[0] if "embedding" in params else 0
        check_shapes("new rows", params, new_row_shapes(config, count))
        self.first, self.count = first, count
        self.tables = nnx.Dict({name: NewRow(value) for name, value in params.items()})

    def embed(self, old_D: jax.Array, tokens: jax.Array) -> jax.Array:
        """The embeddings [..., D] of tokens [...]: new rows in the place of what the old table has
        (`old_D`), in its dtype."""
        rows_WxD = self._table("embedding", old_D.dtype)
        at, is_new = self._where(tokens)
        return jnp.where(is_new[..., None], jnp.take(rows_WxD, at, axis=0), old_D)

    def columns(self, name: str, old: jax.Array, tokens_U: jax.Array) -> jax.Array:
        """The same of some tokens' part of the head's table ([U, D], of 'lm_head' [D, U])."""
        axis = _TOKEN_AXIS[name]
        at_U, is_new_U = self._where(tokens_U)
        new = jnp.take(self._table(name, old.dtype), at_U, axis=axis)
        return jnp.where(jnp.expand_dims(is_new_U, 1 - axis), new, old)

    def logits(self, name: str, old_V: jax.Array, states_D: jax.Array) -> jax.Array:
        """Those of the whole vocabulary, [..., at least first + W], from the old ones [..., V]."""
        pattern = ("...d,wd->...w", "...d,dw->...w")[_TOKEN_AXIS[name]]
        table = self._table(name, states_D.dtype)
        new_W = jnp.einsum(pattern, states_D, table, preferred_element_type=jnp.float32)
        last = self.first + self.count
        return jnp.concatenate([old_V[..., : self.first], new_W, old_V[..., last:]], axis=-1)

    def merge(self, tables: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Parameters by path, the tables with the new rows, in their dtype: what is exported."""
        merged, last = dict(tables), self.first + self.count
        for name in self.tables:
            axis, old = _TOKEN_AXIS[name], jnp.asarray(tables[name])
            below, rest = (
                jax.lax.slice_in_dim(old, *ends, axis=axis)
                for ends in ((0, self.first), (min(last, old.shape[axis]), old.shape[axis]))
            )
            parts = [below, self._table(name, old.dtype), rest]
            merged[name] = jnp.concatenate(parts, axis=axis)
        return merged

    def _where(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(The row of each token, whether it is new)."""
        at = tokens - self.first
        return jnp.clip(at, 0, self.count - 1), (at >= 0) & (at < self.count)

    def _table(self, name: str, dtype: jnp.dtype) -> jax.Array:
        # asarray: of the device's part of a ShardedWeight.
        return jnp.asarray(self.tables[name][...]).astype(dtype)
