"""Llama-, Qwen- and Gemma-style decoder: training forward pass, prompt prefill, and beam extension.

Axis letters: B batch rows, S sequence, M beams, E new tokens of a beam, D width, H head dim,
Kv kv heads, V vocabulary, U some of its tokens, L layers, A positions whose states are asked for,
Tp tokens of a packed call, Tu tokens that one user has in it.
Weights are [in, out] and stacked over layers on axis 0.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm import attention, kv_cache, layer_loops
from tca4rec_jax.llm.attention import rotary_tables
from tca4rec_jax.llm.blocks import Layer, Rope, decoder_layer, rms_norm
from tca4rec_jax.llm.config import DecoderConfig, DecoderOptions, check_shapes
from tca4rec_jax.llm.kv_cache import BeamCache, KVCache, NewTokens
from tca4rec_jax.llm.layer_loops import at_layer
from tca4rec_jax.llm.lora import Adapters, LoRAConfig, check_adapters, dropout, fold_in
from tca4rec_jax.llm.projector import Projector, SoftTokens
from tca4rec_jax.llm.vocabulary import NewRows

# blocks.Attend with two keywords: layer, its number, and window, its sliding window or None.
Attention = Callable[..., jax.Array]

_PREFIX_READ = "soft tokens of sequences whose frozen prefix has run without them"


class PrefixStates(NamedTuple):
    """Right-padded prompts after a decoder's frozen prefix, for decoders that share its layers."""

    x: jax.Array  # [B, S, D]
    kv: KVCache  # [B, layers, Kv, S, H]


@functools.partial(jax.jit, static_argnums=(0, 2))
def init_params(
    config: DecoderConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32
) -> dict[str, jax.Array]:
    """Random base parameters by '/'-joined path: matrices normal with variance 1/in.

    Norms change nothing and biases are zero.
    """
    params = {}
    for index, (path, shape) in enumerate(config.parameter_shapes.items()):
        if path.endswith(("_norm", "_bias")):
            value = 1 - config.norm_offset if path.endswith("_norm") else 0
            params[path] = jnp.full(shape, value, dtype)
            continue
        fan_in = config.hidden_size if path == "embedding" else shape[-2]
        values = jax.random.normal(jax.random.fold_in(key, index), shape) * fan_in**-0.5
        params[path] = values.astype(dtype)
    return params


class Decoder(nnx.Module):
    """A decoder LLM with optional LoRA adapters.

    `nnx.split(decoder, nnx.LoRAParam, ...)` gives (graph, adapters, base); differentiate with
    respect to the adapters only and no gradient of a base weight is ever computed. Activations
    have the dtype of the embedding table; norms, softmax and logits are float32.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: dict[str, jax.Array],
        *,
        lora: LoRAConfig | None = None,
        adapters: Adapters | None = None,
        projector: Projector | None = None,
        new_rows: NewRows | None = None,
        options: DecoderOptions = DecoderOptions(),  # noqa: B008 - frozen
    ):
        """params: by path as in `config.parameter_shapes`; adapters: as `lora.init_adapters`.

        With a projector the decoder reads soft tokens, with new rows it has more tokens than its
        tables.

        Raises UserError naming parameters or adapters that are missing, unknown or of another
        shape, or if options.attention cannot run the config; ValueError if only one of lora and
        adapters is given.
        """
        if (lora is None) != (adapters is None):
            raise ValueError("give both a LoRAConfig and its adapters, or neither")
        check_shapes("decoder parameters", params, config.parameter_shapes)
        if lora is not None:
            check_adapters(config, lora, adapters)
        if options.attention != "xla" and config.full_layers:
            raise UserError(
                f"llm.attention is {options.attention!r}, which needs the same sliding window in"
                f" all layers; those of this {config.family} differ: use 'xla'"
            )
        self.config, self.lora, self.options = config, lora, options
        self.frozen_layers = lora.first_layer if lora else 0  # the frozen prefix
        self.embedding = nnx.Param(params["embedding"])
        self.final_norm = nnx.Param(params["final_norm"])
        if not config.tie_embeddings:
            self.lm_head = nnx.Param(params["lm_head"])
        layers = {p.removeprefix("layers/"): nnx.Param(v) for p, v in params.items() if "/" in p}
        self.layers = nnx.Dict(layers)
        self.adapters: nnx.Dict = nnx.Dict()
        for name, adapter in (adapters or {}).items():
            self.adapters[name] = nnx.Dict({p: nnx.LoRAParam(v) for p, v in adapter.items()})
        self.projector, self.new_rows = nnx.data(projector), nnx.data(new_rows)

    def arrays(self) -> tuple[dict[str, jax.Array], Adapters]:
        """(base parameters by path, adapters), as the constructor takes them."""
        adapters, base, _ = nnx.state(self, nnx.LoRAParam, nnx.Param, ...)
        params = {"/".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(base)}
        return params, nnx.to_pure_dict(adapters).get("adapters", {})

    def hidden(
        self,
        tokens_BxS: jax.Array,
        lengths_B: jax.Array,
        *,
        soft: SoftTokens | None = None,
        frozen_BxSxD: jax.Array | None = None,
        dropout_key_B: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, S, D] after the final norm of right-padded sequences (int32).

        States at and after a row's length are zero. `soft`, projected, stands in the place of some
        tokens' embeddings. Of `frozen_BxSxD`, the `frozen_prefix` of these tokens, only the layers
        above it run. `dropout_key_B` switches dropout on; each key alone determines its row's.

        Raises UserError if S exceeds config.max_positions; ValueError for soft tokens without a
        projector, or with a frozen prefix, which has read other embeddings.
        """
        x, start = frozen_BxSxD, self.frozen_layers
        if x is None:
            x, start = self._embed_sequences(tokens_BxS, soft), 0
            x = dropout(x, self.options.dropout, fold_in(dropout_key_B, self.config.num_layers))
        elif soft is not None:
            raise ValueError(_PREFIX_READ)
        layers = range(start, self.config.num_layers)
        x, _ = self._run_causal(x, layers, keep_kv=False, dropout_key_B=dropout_key_B)
        real_BxS = jnp.arange(x.shape[1])[None, :] < lengths_B[:, None]
        return jnp.where(real_BxS[:, :, None], self._final_norm(x), 0)

    def frozen_prefix(self, tokens_BxS: jax.Array) -> jax.Array:
        """States [B, S, D] after the frozen prefix, undefined after a row's end.

        Raises UserError as `hidden`.
        """
        x = self._embed_sequences(tokens_BxS)
        return self._run_causal(x, range(self.frozen_layers), keep_kv=False)[0]

    def head(self, tokens_U: jax.Array | None = None) -> Callable[[jax.Array], jax.Array]:
        """Logits, of the vocabulary or some tokens: hidden [..., D] -> float32 [..., V or U].

        A function, for calls in a loop: the head's matrix (or its columns) is prepared once.
        """
        tied, new_rows = self.config.tie_embeddings, self.new_rows
        name = "embedding" if tied else "lm_head"
        pattern, axis = ("...d,vd->...v", 0) if tied else ("...d,dv->...v", 1)
        head = getattr(self, name)[...]
        if tokens_U is not None:
            # Of the device's part of a ShardedWeight, so that these columns alone are gathered.
            head = jax.tree.map(lambda part: jnp.take(part, tokens_U, axis=axis), head)
        head = jnp.asarray(head)
        if new_rows is not None and tokens_U is not None:
            head, new_rows = new_rows.columns(name, head, tokens_U), None

        def logits(hidden_D: jax.Array) -> jax.Array:
            old = jnp.einsum(pattern, hidden_D, head, preferred_element_type=jnp.float32)
            return old if new_rows is None else new_rows.logits(name, old, hidden_D)

        return logits

    def prefill(
        self,
        tokens_BxS: jax.Array,
        position_BxA: jax.Array,
        *,
        soft: SoftTokens | None = None,
        prefix: PrefixStates | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """The states [B, A, D] at some positions (int32) of right-padded prompts, as `hidden`, and
        the keys and values [B, L, Kv, S, H] of all.

        The last layer runs for these positions: of others it gives keys and values alone.
        prefix: what `prefill_prefix` gave for these prompts, by a decoder that shares the layers;
        only the layers above then run. Raises as `hidden`.
        """
        if prefix is None:
            x, parts, start = self._embed_sequences(tokens_BxS, soft), [], 0
        elif soft is None:
            x, parts, start = prefix.x, [prefix.kv], prefix.kv.k.shape[1]
        else:
            raise ValueError(_PREFIX_READ)
        last = self.config.num_layers - 1
        if start < last:
            x, kv = self._run_causal(x, range(start, last), keep_kv=True)
            parts.append(kv)
        x_BxAxD, kv = self._run_last_layer(x, position_BxA)
        kv = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *parts, kv)
        return self._final_norm(x_BxAxD), kv

    def prefill_prefix(self, tokens_BxS: jax.Array, layers: int) -> PrefixStates:
        """The first `layers` (static) of a prefill of right-padded prompts without soft tokens."""
        x = self._embed_sequences(tokens_BxS)
        return PrefixStates(*self._run_causal(x, range(layers), keep_kv=True))

    def init_beam_cache(self, batch: int, beams: int, capacity: int) -> BeamCache:
        """The cache of beams that have read nothing, with `capacity` slots for each user."""
        config = self.config
        shape = (batch, config.num_layers, config.num_kv_heads, capacity, config.head_dim)
        zeros = jnp.zeros(shape, self.embedding.dtype)
        return BeamCache(KVCache(zeros, zeros), kv_cache.init_paths(batch, beams, capacity))

    def extend(
        self,
        tokens_BxMxE: jax.Array,
        count_BxM: jax.Array,
        prompt: KVCache,
        prompt_lengths_B: jax.Array,
        beams: BeamCache,
        kept_Tp: jax.Array,
        per_user: int,
    ) -> tuple[jax.Array, NewTokens]:
        """Runs up to E more tokens of each of the M beams of each user.

        Token e of a beam stands at position prompt_length + (tokens the beam has read) + e. It
        attends to its user's prompt, to the tokens its beam has read and to the new ones up to
        itself. `scatter_cache` then puts the new tokens into the cache, and drops those that do not
        fit into their user's pool: see `grow_cache`.

        The first `count_BxM` tokens (int32) of each beam are real: those that kept_Tp and per_user
        name to `packing`. prompt, prompt_lengths_B: of `prefill`, one for all beams of a user.

        Returns (hidden states [Tp, D], undefined at padding; new tokens for `scatter_cache`).
        """
        most, paths = tokens_BxMxE.shape[2], beams.paths
        starts_BxM = prompt_lengths_B[:, None] + paths.length_BxM
        positions_BxMxE = starts_BxM[:, :, None] + jnp.arange(most)[None, None, :]
        packed = kv_cache.packing(tokens_BxMxE.shape, kept_Tp, per_user)

        def attend(q, k, v, layer, window):
            q, *new_kv = map(packed.by_user, (q, k, v))
            prompt_kv = [at_layer(values, layer, axis=1) for values in prompt]

            def attend_to(pool: BeamCache):
                pool_kv = [at_layer(values, layer, axis=1) for values in pool.kv]
                seen = new_kv, prompt_kv, pool_kv, prompt_lengths_B, pool.paths, packed
                how = {"window": window, "implementation": self.options.attention}
                return attention.cached_attention(q, *seen, **how)

            return packed.from_users(kv_cache.over_taken_slots(attend_to, beams))

        x, positions = self._embed(packed.pack(tokens_BxMxE)), packed.pack(positions_BxMxE)
        every = range(self.config.num_layers)
        x, new = self._run_layers(x, positions, attend, every, keep_kv=True)
        hidden = self._final_norm(x)
        new = jax.tree.map(jax.vmap(packed.by_user), new)
        slot_BxMxE, paths = kv_cache.append_tokens(paths, count_BxM, most)
        slot_BxTu = packed.by_user(packed.pack(slot_BxMxE))
        slot_BxTu = jnp.where(packed.beam_BxTu >= 0, slot_BxTu, beams.capacity)
        return hidden, NewTokens(new, slot_BxTu, paths)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        embedded = jnp.take(self.embedding[...], tokens, axis=0)
        if self.new_rows is not None:
            embedded = self.new_rows.embed(embedded, tokens)
        scale = self.config.embedding_scale
        return embedded if scale == 1 else embedded * jnp.asarray(scale, embedded.dtype)

    def _embed_sequences(self, tokens_BxS: jax.Array, soft: SoftTokens | None = None) -> jax.Array:
        length = tokens_BxS.shape[1]
        if length > self.config.max_positions:
            raise UserError(
                f"sequences of {length} tokens exceed max_positions={self.config.max_positions};"
                " shorten the history or the titles"
            )
        x_BxSxD = self._embed(tokens_BxS)
        if soft is None:
            return x_BxSxD
        if self.projector is None:
            raise ValueError("soft tokens need a decoder with a projector")
        return self.projector.put(x_BxSxD, soft)

    def _final_norm(self, x: jax.Array) -> jax.Array:
        config = self.config
        return rms_norm(x, self.final_norm[...], config.rms_norm_eps, config.norm_offset)

    def _run_causal(self, x_BxSxD: jax.Array, layers: range, *, keep_kv: bool, **dropout):
        implementation = self.options.attention
        if keep_kv and implementation == "splash":  # which is there for the backward pass
            implementation = "xla"

        def attend(q, k, v, layer, window):
            how = {"window": window, "implementation": implementation}
            return attention.causal_attention(q, k, v, **how)

        positions = _positions(x_BxSxD)
        x, kv = self._run_layers(x_BxSxD, positions, attend, layers, keep_kv=keep_kv, **dropout)
        return x, jax.tree.map(_by_user, kv)

    def _run_last_layer(
        self, x_BxSxD: jax.Array, position_BxA: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """(its output at some positions [B, A, D], its keys and values [B, 1, Kv, S, H] at all)."""

        def attend(q, k, v, layer, window):
            return attention.attention_at(q, k, v, position_BxA, window=window)

        x_BxAxD = jnp.take_along_axis(x_BxSxD, position_BxA[:, :, None], axis=1)
        last = range(self.config.num_layers)[-1:]
        seen = x_BxSxD, _positions(x_BxSxD)
        x_BxAxD, kv = self._run_layers(x_BxAxD, position_BxA, attend, last, keep_kv=True, seen=seen)
        return x_BxAxD, jax.tree.map(_by_user, kv)

    def _run_layers(
        self,
        x: jax.Array,
        positions: jax.Array,
        attend: Attention,
        layers: range,
        *,
        keep_kv: bool,
        dropout_key_B: jax.Array | None = None,
        seen: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, Any]:
        """Some layers, in a row; with keep_kv their keys and values [L, ..., Kv, H].

        `seen`: the tokens that keys and values of a single layer are of, and their positions.
        """
        seen_x, seen_positions = seen or (x, positions)
        config, ropes, seen_ropes = self.config, *map(self._ropes, (positions, seen_positions))
        stacks = {name: stack[...] for name, stack in self.layers.items()}

        def run_layer(x, params, index):
            weights, adapters = params
            key_B = fold_in(dropout_key_B, index)
            layer = Layer(config, weights, self.lora, adapters, key_B, self.options.dropout)
            window, layer_rope = self._window_and_rope(index, *ropes)
            layer_attend = functools.partial(attend, layer=index, window=window)
            of_seen = (seen_x, self._window_and_rope(index, *seen_ropes)[1]) if seen else None
            x, kv = decoder_layer(layer, x, layer_rope, layer_attend, of_seen)
            return x, (kv if keep_kv else None)

        adapters = {n: {p: v[...] for p, v in parts.items()} for n, parts in self.adapters.items()}
        # The frozen prefix runs without adapters, so that nothing in it is differentiated.
        first, kv_parts = min(max(self.frozen_layers, layers.start), layers.stop), []
        for lowest, end in itertools.pairwise(sorted({layers.start, first, layers.stop})):
            part, trained = range(lowest, end), adapters if lowest >= first else {}
            if keep_kv:
                x, kv = layer_loops.run(run_layer, x, (stacks, trained), part)
            else:
                x, kv = layer_loops.scan(run_layer, x, (stacks, trained), part, self.options.remat)
            kv_parts.append(kv)
        kv = jax.tree.map(lambda *parts: jnp.concatenate(parts), *kv_parts)
        return x, (KVCache(*kv) if keep_kv else None)

    def _ropes(self, positions: jax.Array) -> tuple[Rope, Rope]:
        """The rotary tables of layers that see all, and of those with a sliding window."""
        config = self.config
        rope = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        if config.local_rope_theta is None:
            return rope, rope
        return rope, rotary_tables(positions, config.head_dim, config.local_rope_theta)

    def _window_and_rope(
        self, layer: jax.Array, rope: Rope, local_rope: Rope
    ) -> tuple[int | jax.Array | None, Rope]:
        """A layer's sliding window (an int, known to the compiler, if all share it) and tables."""
        window, full_layers = self.config.sliding_window, self.config.full_layers
        if window is None:
            return None, rope
        if not full_layers:
            return window, local_rope
        is_full = jnp.any(layer == jnp.asarray(full_layers))
        seen = jnp.where(is_full, jnp.iinfo(jnp.int32).max, window)
        if local_rope is rope:
            return seen, rope
        cos, sin = (jnp.where(is_full, *both) for both in zip(rope, local_rope, strict=True))
        return seen, (cos, sin)


def _positions(x_BxSxD: jax.Array) -> jax.Array:
    return jnp.arange(x_BxSxD.shape[1])[None, :]


def _by_user(values_LxBxSxKvxH: jax.Array) -> jax.Array:
    """[B, L, Kv, S, H]: as attention reads them, once and not at every token that comes after."""
    return values_LxBxSxKvxH.transpose(1, 0, 3, 2, 4)
