"""Llama-, Qwen- and Gemma-style decoder: training forward pass, prompt prefill, and beam extension.

Axis letters: B batch, S sequence, P placeholders, M beams, E new tokens of an edge, W suffix
tokens, D model, N query heads, K kv heads, H head dim, V vocabulary, L layers, R adapter rank,
T tokens that run.
Weights are [in, out] and stacked over layers on axis 0, whichever way the layers are looped over.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.attention import (
    cached_attention,
    causal_attention,
    rotary_tables,
    rotate,
)
from tca4rec_jax.llm.config import SCALES, DecoderConfig
from tca4rec_jax.llm.kv_cache import (
    BeamCache,
    KVCache,
    NewTokens,
    append_tokens,
    init_paths,
    packing,
)
from tca4rec_jax.llm.layers import gated, on_last_axis, rms_norm
from tca4rec_jax.llm.lora import LoRAConfig, adapter_shapes, dropout, fold_in, lora_deltas
from tca4rec_jax.llm.options import DecoderOptions
from tca4rec_jax.llm.parameters import check_shapes
from tca4rec_jax.llm.quantisation import quantised_product
from tca4rec_jax.llm.soft_embeddings import SoftEmbeddings, put_soft_embeddings

# What remat 'products' keeps: from these, the rest of a layer is elementwise.
_PRODUCTS = jax.checkpoint_policies.save_only_these_names("product", "low_rank", "normaliser")
_keep = functools.partial(checkpoint_name, name="product")

# (q, k, v, number of the layer, its sliding window or None) -> attended values
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, int | jax.Array | None], jax.Array]


class PrefixStates(NamedTuple):
    """Right-padded prompts after a decoder's first layers; decoders that share these go on."""

    x: jax.Array  # [B, S, D]
    kv: KVCache  # [layers, B, S, K, H]


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
        adapters: dict[str, dict[str, jax.Array]] | None = None,
        options: DecoderOptions = DecoderOptions(),  # noqa: B008 - frozen
    ):
        """params: by path as in `config.parameter_shapes`; adapters as `lora.init_adapters` gives.

        Raises ValueError naming parameters or adapters that are missing, unknown or of another
        shape, if only one of lora and adapters is given, or if options.attention cannot run the
        config.
        """
        if (lora is None) != (adapters is None):
            raise ValueError("give both a LoRAConfig and its adapters, or neither")
        check_shapes("decoder parameters", params, config.parameter_shapes)
        if lora is not None:
            trees = {"adapters": adapters}, {"adapters": adapter_shapes(config, lora)}
            check_shapes("adapters", *(flatten_dict(tree, sep="/") for tree in trees))
        if options.attention != "xla" and config.full_layers:
            raise UserError(
                f"llm.attention is {options.attention!r}, which needs the same sliding window in"
                f" all layers; those of this {config.family} differ: use 'xla'"
            )
        self.config, self.lora, self.options = config, lora, options
        layers = {p.removeprefix("layers/"): v for p, v in params.items() if "/" in p}
        self.embedding = nnx.Param(params["embedding"])
        self.final_norm = nnx.Param(params["final_norm"])
        if not config.tie_embeddings:
            self.lm_head = nnx.Param(params["lm_head"])
        self.layers = nnx.Dict({name: nnx.Param(value) for name, value in layers.items()})
        self.adapters = nnx.Dict(
            {
                name: nnx.Dict({part: nnx.LoRAParam(value) for part, value in adapter.items()})
                for name, adapter in (adapters or {}).items()
            }
        )

    def hidden(
        self,
        tokens_BxS: jax.Array,
        lengths_B: jax.Array,
        *,
        soft: SoftEmbeddings | None = None,
        frozen_BxSxD: jax.Array | None = None,
        dropout_key_B: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, S, D] after the final norm of right-padded sequences.

        tokens int32, positions 0..S-1, lengths int32. States at and after a row's length are zero.
        What stands at the places of `soft` is read instead of their tokens.
        With what `frozen_states` gave for these tokens, only the layers above run.
        Keys switch the adapters' dropout on; each determines that of its row completely.
        Raises ValueError if S exceeds config.max_positions.
        """
        x, start = frozen_BxSxD, self.lora and self.lora.first_layer
        if frozen_BxSxD is None:
            x, start = self._read(tokens_BxS, soft), 0
        x, _ = self._run_causal(x, keep_kv=False, dropout_key_B=dropout_key_B, start=start)
        return self._real_states(x, lengths_B)

    def frozen_states(self, tokens_BxS: jax.Array) -> jax.Array:
        """States [B, S, D] after the layers below lora.first_layer, in which there are no adapters.

        Of what is behind a row's end they have no meaning. Raises ValueError as `hidden`.
        """
        x, _ = self._run_causal(
            self._read(tokens_BxS, None), keep_kv=False, stop=self.lora.first_layer
        )
        return x

    def logits(self, hidden_D: jax.Array, tokens_U: jax.Array | None = None) -> jax.Array:
        """Logits of the vocabulary, or of some tokens: hidden [..., D] -> float32 [..., V or U]."""
        return self.head(tokens_U)(hidden_D)

    def head(self, tokens_U: jax.Array | None = None) -> Callable[[jax.Array], jax.Array]:
        """`logits` as a function of the hidden states, with what they are multiplied by made once.

        For calls in a loop.
        """
        tied = self.config.tie_embeddings
        pattern, axis = ("...d,vd->...v", 0) if tied else ("...d,dv->...v", 1)
        path, head = ("embedding", self.embedding[...]) if tied else ("lm_head", self.lm_head[...])
        if tokens_U is not None:
            head = jnp.take(head, tokens_U, axis=axis)
        head = self.options.whole(path, head)
        return lambda hidden_D: jnp.einsum(
            pattern, hidden_D, head, preferred_element_type=jnp.float32
        )

    def prefill(
        self,
        tokens_BxS: jax.Array,
        lengths_B: jax.Array,
        *,
        soft: SoftEmbeddings | None = None,
        prefix: PrefixStates | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """`hidden` together with the keys and values [L, B, S, K, H] of right-padded prompts.

        With `prefix`, what `prefill_prefix` of an equal decoder gave for these prompts, only the
        layers above run.
        """
        if prefix is None:
            x, kv = self._run_causal(self._read(tokens_BxS, soft), keep_kv=True)
        else:
            x, kv = self._run_causal(prefix.x, keep_kv=True, start=prefix.kv.k.shape[0])
            kv = jax.tree.map(lambda *parts: jnp.concatenate(parts), prefix.kv, kv)
        return self._real_states(x, lengths_B), kv

    def prefill_prefix(
        self, tokens_BxS: jax.Array, layers: int, *, soft: SoftEmbeddings | None = None
    ) -> PrefixStates:
        """The first `layers` (static) of a prefill."""
        x = self._read(tokens_BxS, soft)
        return PrefixStates(*self._run_causal(x, keep_kv=True, stop=layers))

    def init_beam_cache(self, batch: int, beams: int, capacity: int) -> BeamCache:
        """The cache of beams that have read nothing, with `capacity` slots for each user."""
        config = self.config
        shape = (batch, config.num_layers, capacity, config.num_kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, self.embedding.dtype)
        return BeamCache(KVCache(zeros, zeros), init_paths(batch, beams, capacity))

    def extend(
        self,
        tokens_BxMxE: jax.Array,
        count_BxM: jax.Array,
        prompt: KVCache,
        prompt_lengths_B: jax.Array,
        beams: BeamCache,
        kept_T: jax.Array | None = None,
        per_user: int = 0,
    ) -> tuple[jax.Array, NewTokens]:
        """Up to E more tokens for each of M beams per user -> (hidden [B, M, E, D], what was read).

        The first `count` of a beam's tokens are real; the states of the others are without meaning.
        Token e stands at position prompt_length + (tokens the beam has read) + e and attends to the
        prompt, which the beams of a user share, to what its beam has read and to the new tokens up
        to itself. `scatter_cache` then puts the new tokens into the cache, and drops those that do
        not fit into their user's pool: see `grow_cache`.

        kept_T (int32, ascending indices into B * M * E; those past the end are padding) names the
        tokens that are worth running, at least the real ones and at most `per_user` of each user:
        the layers see only these, and the states are theirs [T, D].
        """
        shape, paths = tokens_BxMxE.shape, beams.paths
        starts_BxM = prompt_lengths_B[:, None] + paths.length_BxM
        positions_BxMxE = starts_BxM[:, :, None] + jnp.arange(shape[2])[None, None, :]
        packed = packing(shape, kept_T, per_user)

        def attend(q, k, v, layer, window):
            of_layer = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
            attended = cached_attention(
                packed.by_user(q),
                (packed.by_user(k), packed.by_user(v)),
                [of_layer(values, axis=0) for values in prompt],
                [of_layer(values, axis=1) for values in beams.kv],
                prompt_lengths_B,
                paths,
                packed.beam_BxTu,
                packed.position_BxTu,
                window=window,
            )
            return packed.from_users(attended)

        x, new = self._run_layers(
            self._embed(packed.pack(tokens_BxMxE)),
            packed.pack(positions_BxMxE),
            attend,
            keep_kv=True,
        )
        hidden = self._final(x)
        new = KVCache(*(jax.vmap(packed.by_user)(values) for values in new))
        slot_BxMxE, paths = append_tokens(paths, count_BxM, shape[2])
        nowhere = beams.kv.k.shape[2]
        slot_BxQ = packed.by_user(packed.pack(slot_BxMxE))
        slot_BxQ = jnp.where(packed.beam_BxTu >= 0, slot_BxQ, nowhere)
        if kept_T is None:
            hidden = hidden.reshape(*shape, -1)
        return hidden, NewTokens(new, slot_BxQ, paths)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        embedding = self.options.whole("embedding", self.embedding[...])
        embedded, scale = jnp.take(embedding, tokens, axis=0), self.config.embedding_scale
        return embedded if scale == 1 else embedded * jnp.asarray(scale, embedded.dtype)

    def _read(self, tokens_BxS: jax.Array, soft: SoftEmbeddings | None) -> jax.Array:
        length = tokens_BxS.shape[1]
        if length > self.config.max_positions:
            raise UserError(
                f"sequences of {length} tokens exceed max_positions={self.config.max_positions};"
                " shorten the history or the titles"
            )
        embedded = self._embed(tokens_BxS)
        return embedded if soft is None else put_soft_embeddings(embedded, soft)

    def _final(self, x: jax.Array) -> jax.Array:
        config = self.config
        return rms_norm(x, self.final_norm[...], config.rms_norm_eps, config.norm_offset)

    def _real_states(self, x_BxSxD: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """After the final norm, zero behind each row's end."""
        real_BxS = jnp.arange(x_BxSxD.shape[1])[None, :] < lengths_B[:, None]
        return jnp.where(real_BxS[:, :, None], self._final(x_BxSxD), 0)

    def _run_causal(self, x_BxSxD: jax.Array, *, keep_kv: bool, **layers):
        # Prompts are short and need no backward pass.
        implementation = "xla" if keep_kv else self.options.attention
        return self._run_layers(
            x_BxSxD,
            jnp.arange(x_BxSxD.shape[1])[None, :],
            lambda q, k, v, layer, window: causal_attention(
                q, k, v, window=window, implementation=implementation
            ),
            keep_kv=keep_kv,
            **layers,
        )

    def _run_layers(
        self,
        x: jax.Array,
        positions: jax.Array,
        attend: Attend,
        *,
        keep_kv: bool,
        dropout_key_B: jax.Array | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The layers from `start` to `stop` (all), and their keys and values [L, ..., K, H]."""
        config = self.config
        rope = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        local_rope = rope
        if config.local_rope_theta is not None:
            local_rope = rotary_tables(positions, config.head_dim, config.local_rope_theta)

        def layer(x, inputs):
            weights, adapters, index = inputs
            weights = {
                name: self.options.whole(f"layers/{name}", weight)
                for name, weight in weights.items()
            }
            key_B = fold_in(dropout_key_B, index)
            window, rope_here = self._window_and_rope(index, rope, local_rope)
            attend_here = functools.partial(attend, layer=index, window=window)
            x, kv = self._layer(x, weights, adapters, key_B, rope_here, attend_here)
            return x, (kv if keep_kv else None)

        in_scan = self.options.layer_loop == "scan"
        if self.options.remat != "none":
            policy = _PRODUCTS if self.options.remat == "products" else None
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=not in_scan)
        adapters = {
            name: {part: value[...] for part, value in adapter.items()}
            for name, adapter in self.adapters.items()
        }
        inputs = (
            {name: weight[...] for name, weight in self.layers.items()},
            adapters,
            jnp.arange(config.num_layers),
        )

        def run(x, inputs):
            return jax.lax.scan(layer, x, inputs) if in_scan else _unrolled(layer, x, inputs)

        # Below the first adapter there are none, so that nothing there is differentiated.
        first = self.lora.first_layer if adapters else 0
        stop = config.num_layers if stop is None else stop
        bounds, of_parts = sorted({start, stop, min(max(first, start), stop)}), []
        for lowest, end in itertools.pairwise(bounds):
            part = slice(lowest, end)
            weights, adapters, index = jax.tree.map(lambda leaf, part=part: leaf[part], inputs)
            x, kv = run(x, (weights, adapters if lowest >= first else {}, index))
            of_parts.append(kv)
        kv = jax.tree.map(lambda *parts: jnp.concatenate(parts), *of_parts)
        return x, (KVCache(*kv) if keep_kv else None)

    def _window_and_rope(self, layer: jax.Array, rope, local_rope):
        """The sliding window and the rotary tables of a layer.

        The window is an int, and so known to the compiler, if all layers have it.
        """
        window, full_layers = self.config.sliding_window, self.config.full_layers
        if window is None:
            return None, rope
        if not full_layers:
            return window, local_rope
        is_full = jnp.any(layer == jnp.asarray(full_layers))
        window = jnp.where(is_full, jnp.iinfo(jnp.int32).max, window)
        if local_rope is rope:
            return window, rope
        return window, [jnp.where(is_full, *both) for both in zip(rope, local_rope, strict=True)]

    def _layer(self, x, weights, adapters, key_B, rope, attend):
        """One decoder block on x [..., D]; returns it and the rotated (k, v) [..., K, H]."""
        config = self.config

        def linear(x: jax.Array, name: str) -> jax.Array:
            if config.quantised:
                scale = weights[name + SCALES[config.quantised]]
                y = quantised_product(config.quantised, x, weights[name], scale)
            else:
                y = jnp.einsum("...i,io->...o", x, weights[name])
            bias = weights.get(f"{name}_bias")
            return y if bias is None else y + on_last_axis(bias, y.ndim)

        def project(inputs: int, x: jax.Array, *names: str) -> list[jax.Array]:
            """x times each named matrix; `inputs` numbers the layer's four inputs for dropout."""
            outputs = {name: linear(x, name) for name in names}
            adapted = [name for name in names if name in adapters]
            if adapted:
                dropped_x = dropout(x, self.lora.dropout, fold_in(key_B, inputs))
                deltas = lora_deltas(dropped_x, [adapters[name] for name in adapted], self.lora)
                outputs |= {
                    name: outputs[name] + delta for name, delta in zip(adapted, deltas, strict=True)
                }
            return list(outputs.values())

        def norm(x: jax.Array, name: str) -> jax.Array:
            return rms_norm(x, weights[name], config.rms_norm_eps, config.norm_offset)

        def post_norm(y: jax.Array, name: str) -> jax.Array:
            return norm(_keep(y), name) if config.post_norms else y

        normed = norm(x, "attn_norm")
        q, k, v = (
            y.reshape(*y.shape[:-1], -1, config.head_dim)
            for y in project(0, normed, "q_proj", "k_proj", "v_proj")
        )
        if config.qk_norm:
            q, k = norm(_keep(q), "q_norm"), norm(_keep(k), "k_norm")
        if config.query_pre_attn_scalar is not None:
            q *= (config.head_dim / config.query_pre_attn_scalar) ** 0.5
        q, k, v = (_keep(y) for y in (rotate(q, *rope), rotate(k, *rope), v))
        attended = _keep(attend(q, k, v))
        y = project(1, attended.reshape(*x.shape[:-1], -1), "o_proj")[0]
        x = _keep(x + post_norm(y, "attn_post_norm"))
        gate, up = project(2, norm(x, "mlp_norm"), "gate_proj", "up_proj")
        y = project(3, gated(config.activation, _keep(gate), _keep(up)), "down_proj")[0]
        return x + post_norm(y, "mlp_post_norm"), (k, v)


def _unrolled(layer, x, inputs):
    """What lax.scan(layer, x, inputs) computes, as one program without a loop."""
    outputs = []
    for index in range(len(inputs[-1])):
        x, output = layer(x, jax.tree.map(lambda leaf, i=index: leaf[i], inputs))
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
