"""The decoder: cached extension against the full pass, options, padding, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_decoder import CONFIG, MIXED, WINDOW, make_decoder, random_tokens

from tca4rec_jax.llm.config import DecoderOptions, logical_axes
from tca4rec_jax.llm.decoder import Decoder, init_params
from tca4rec_jax.llm.kv_cache import gather_beams, grow_cache, scatter_cache
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters

hidden_of = jax.jit(Decoder.hidden)


@jax.jit
def prefill(decoder, tokens, lengths, prefix=None):
    """The states of all tokens, zero after a row's end, and their keys and values."""
    every = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
    hidden, kv = decoder.prefill(tokens, every, prefix=prefix)
    return jnp.where((every < lengths[:, None])[:, :, None], hidden, 0), kv


@functools.partial(jax.jit, static_argnames="per_user")
def extend(decoder, tokens, count, prompt, lengths, cache, kept=None, per_user=0):
    """(hidden, the cache with what was read); without kept, all tokens run: [B, M, E, D]."""
    packed = kept is not None
    if not packed:
        kept, per_user = jnp.arange(tokens.size), tokens[0].size
    hidden, new = decoder.extend(tokens, count, prompt, lengths, cache, kept, per_user)
    return hidden if packed else hidden.reshape(*tokens.shape, -1), scatter_cache(cache, new)


@pytest.mark.parametrize(
    ("config", "lora"),
    [(CONFIG, None), (CONFIG, LoRAConfig(rank=4)), (WINDOW, LoRAConfig(rank=4)), (MIXED, None)],
)
def test_extend_equals_the_full_forward_pass(config, lora):
    check_extend(make_decoder(lora, config=config))


@pytest.mark.parametrize("config", [CONFIG, WINDOW])
def test_what_a_kernel_is_given_is_what_extend_attends_to(config, monkeypatch):
    """Prompts and beams with cuDNN's kernel, which needs a GPU: jax.nn's own stands in for it."""
    attend, calls = jax.nn.dot_product_attention, []

    def kernel(*qkv, implementation, **masks):
        calls.append(implementation)
        return attend(*qkv, implementation="xla", **masks)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    check_extend(make_decoder(config=config, options=DecoderOptions(attention="cudnn")))
    assert set(calls) == {"cudnn"}


def check_extend(decoder):
    """Ragged prompts, three chunks of edges of ragged length, padded with garbage."""
    batch, beams, edge, suffix_size = 3, 2, 4, 12
    prompt_lengths = np.array([9, 4, 6], np.int32)
    prompts = random_tokens((batch, 9), seed=1)
    edge_lengths = np.array(  # [chunk, B, M]; a finished beam's edge is empty
        [[[3, 1], [2, 3], [1, 2]], [[1, 4], [2, 0], [4, 3]], [[2, 1], [0, 1], [2, 2]]], np.int32
    )
    _, prompt_cache = prefill(decoder, prompts, prompt_lengths)
    cache = decoder.init_beam_cache(batch, beams, beams * suffix_size)
    suffix_lengths = np.zeros((batch, beams), np.int32)
    texts = {(b, m): list(prompts[b, : prompt_lengths[b]]) for b in range(3) for m in range(2)}
    states = {key: [] for key in texts}
    for chunk, lengths in enumerate(edge_lengths):
        tokens = random_tokens((batch, beams, edge), seed=10 + chunk)
        hidden, cache = extend(decoder, tokens, lengths, prompt_cache, prompt_lengths, cache)
        for b, m in texts:
            texts[b, m].extend(tokens[b, m, : lengths[b, m]])
            states[b, m].extend(np.asarray(hidden)[b, m, : lengths[b, m]])
        suffix_lengths = suffix_lengths + lengths
    full_tokens = np.zeros((batch * beams, 9 + suffix_size), np.int32)
    for row, text in zip(full_tokens, texts.values(), strict=True):
        row[: len(text)] = text
    full = np.asarray(hidden_of(decoder, full_tokens, np.array([len(t) for t in texts.values()])))
    for (b, m), row in zip(texts, full, strict=True):
        expected = row[prompt_lengths[b] : len(texts[b, m])]
        assert len(states[b, m]) == suffix_lengths[b, m]
        np.testing.assert_allclose(np.stack(states[b, m]), expected, atol=1e-5)


def test_beams_chosen_anew_keep_what_they_have_read():
    """A beam that two others go on from, and one that nobody does, against whole sequences."""
    decoder, lengths = make_decoder(config=WINDOW), np.array([4, 3])
    prompts, first = random_tokens((2, 4)), random_tokens((2, 3, 2), seed=3)
    _, prompt = prefill(decoder, prompts, lengths)
    cache = decoder.init_beam_cache(2, 3, 7)
    count = np.array([[2, 1, 2], [1, 2, 0]])
    _, cache = extend(decoder, first, count, prompt, lengths, cache)
    chosen = np.array([[2, 0, 2], [1, 1, 0]])
    second = random_tokens((2, 3, 1), seed=4)
    cache = grow_cache(gather_beams(cache, jnp.asarray(chosen)), 11)
    hidden, cache = extend(decoder, second, np.ones((2, 3), int), prompt, lengths, cache)
    np.testing.assert_array_equal(cache.paths.used_B, [8, 6])
    for b in range(2):
        for m, parent in enumerate(chosen[b]):
            text = [*prompts[b, : lengths[b]], *first[b, parent, : count[b, parent]], *second[b, m]]
            expected = hidden_of(decoder, np.array([text]), np.array([len(text)]))
            np.testing.assert_allclose(hidden[b, m, 0], expected[0, -1], atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, WINDOW])
def test_kept_tokens_alone_run_like_all(config):
    """Tokens of three users, none of one of them, packed with filler behind them."""
    decoder, lengths = make_decoder(config=config), np.array([4, 3, 2])
    _, prompt = prefill(decoder, random_tokens((3, 4)), lengths)
    cache = decoder.init_beam_cache(3, 2, 12)
    first, count = random_tokens((3, 2, 2), seed=3), np.array([[2, 1], [1, 2], [0, 1]])
    _, cache = extend(decoder, first, count, prompt, lengths, cache)
    second, count = random_tokens((3, 2, 3), seed=4), np.array([[1, 3], [0, 0], [0, 2]])
    all_hidden, all_after = extend(decoder, second, count, prompt, lengths, cache)
    real = np.arange(3) < count[:, :, None]
    kept = np.append(np.flatnonzero(real), [18, 18])
    hidden, after = extend(decoder, second, count, prompt, lengths, cache, kept, per_user=4)
    np.testing.assert_allclose(hidden[:6], np.asarray(all_hidden)[real], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after, all_after)


def test_extend_drops_what_does_not_fit_and_what_is_not_real():
    decoder = make_decoder()
    prompts, lengths = random_tokens((1, 4)), np.array([4])
    _, prompt = prefill(decoder, prompts, lengths)
    cache = decoder.init_beam_cache(1, 1, 3)
    edge = random_tokens((1, 1, 4), seed=3)
    _, before = extend(decoder, edge, np.array([[2]]), prompt, lengths, cache)
    assert np.abs(before.kv.k[:, :, :, 2]).sum() == 0
    _, after = extend(decoder, edge, np.array([[4]]), prompt, lengths, before)
    np.testing.assert_array_equal(after.kv.k[:, :, :, :2], before.kv.k[:, :, :, :2])
    assert np.abs(after.kv.k[:, :, :, 2]).sum() > 0


def test_extend_keeps_a_sharded_batch_where_it_is():
    """Two devices with a user each give what one device gives, without moving keys or values."""
    decoder, prompts, lengths = make_decoder(), random_tokens((2, 5)), np.array([5, 3])
    edge, count = random_tokens((2, 3, 2), seed=4), np.array([[0, 1, 2], [2, 0, 0]])
    _, prompt = prefill(decoder, prompts, lengths)
    cache = decoder.init_beam_cache(2, 3, 18)
    expected = extend(decoder, edge, count, prompt, lengths, cache)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = P("data")
    specs = P(), rows, rows, rows, rows, rows
    arguments = tuple(
        jax.device_put(value, NamedSharding(mesh, spec))
        for value, spec in zip((decoder, edge, count, prompt, lengths, cache), specs, strict=True)
    )
    # As a search does: each device runs the call of its own users.
    split = jax.shard_map(extend, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    program = jax.jit(split).lower(*arguments).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f" {collective}(" not in program.as_text()
    result = program(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), result, expected)


def test_prefill_equals_hidden_and_padding_changes_nothing():
    decoder = make_decoder()
    tokens, lengths = random_tokens((2, 7)), np.array([7, 3])
    hidden = hidden_of(decoder, tokens, lengths)
    prefilled, cache = prefill(decoder, tokens, lengths)
    np.testing.assert_allclose(hidden, prefilled, atol=1e-5)
    assert cache.k.shape == (2, 2, 2, 7, 8)
    assert np.all(np.asarray(hidden)[1, 3:] == 0)
    alone = hidden_of(decoder, tokens[1:, :3], lengths[1:])
    np.testing.assert_allclose(hidden[1, :3], alone[0], atol=1e-5)


def test_a_prefill_goes_on_from_the_frozen_prefix():
    decoder = make_decoder()
    tokens, lengths = random_tokens((2, 7)), np.array([7, 3])
    expected = prefill(decoder, tokens, lengths)
    prefix = nnx.jit(lambda decoder: decoder.prefill_prefix(tokens, 1))(decoder)
    assert prefix.kv.k.shape[1] == 1
    found = prefill(decoder, tokens, lengths, prefix=prefix)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


@pytest.mark.parametrize("config", [CONFIG, WINDOW, MIXED])
def test_a_prefill_gives_the_states_that_are_asked_for(config):
    """Of some positions, one twice, from layers with windows and without."""
    decoder, tokens = make_decoder(config=config), random_tokens((2, 7))
    all_states, expected = prefill(decoder, tokens, np.array([7, 7]))
    asked = np.array([[6, 0, 3], [2, 2, 5]])
    states, kv = jax.jit(Decoder.prefill)(decoder, tokens, asked)
    np.testing.assert_allclose(states, np.asarray(all_states)[[[0], [1]], asked], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kv, expected)
    hidden = hidden_of(decoder, tokens, np.array([7, 7]))
    np.testing.assert_allclose(all_states, hidden, atol=1e-5)


def test_blocks_of_queries_do_not_change_attention():
    """A sequence longer than one attention block: early states don't see later tokens."""
    decoder = make_decoder()
    tokens = random_tokens((1, 300))
    long = hidden_of(decoder, tokens, np.array([300]))
    for cut in (100, 128, 200):
        short = hidden_of(decoder, tokens[:, :cut], np.array([cut]))
        np.testing.assert_allclose(long[:, :cut], short, atol=1e-5)


def test_caches_go_past_the_first_adapted_layer():
    """Prefill and extension with adapters in the upper layer only, against the full pass."""
    decoder = make_decoder(LoRAConfig(rank=4, first_layer=1))
    tokens = random_tokens((2, 9))
    expected = hidden_of(decoder, tokens, np.array([9, 9]))
    hidden, prompt = prefill(decoder, tokens[:, :8], np.array([8, 8]))
    np.testing.assert_allclose(hidden, expected[:, :8], atol=1e-5)
    cache, one = decoder.init_beam_cache(2, 1, 2), np.ones((2, 1), np.int32)
    last, _ = extend(decoder, tokens[:, 8:, None], one, prompt, np.array([8, 8]), cache)
    np.testing.assert_allclose(last[:, 0, 0], expected[:, 8], atol=1e-5)


def test_every_parameter_has_logical_axes_of_its_rank():
    config = dataclasses.replace(
        CONFIG,
        tie_embeddings=False,
        qk_norm=True,
        post_norms=True,
        biases=tuple(CONFIG.projection_shapes),
    )
    decoder = make_decoder(LoRAConfig(targets=".*"), config=config)
    leaves = nnx.to_flat_state(nnx.state(decoder))
    assert len(leaves) == 4 + 1 + 7 + 14 + 2 + 2 + 7
    for path, variable in leaves:
        assert len(logical_axes("/".join(path))) == variable.ndim, path
    with pytest.raises(ValueError, match="layers/z_proj"):
        logical_axes("layers/z_proj")


def test_bad_input_is_named():
    params = init_params(CONFIG, jax.random.key(0))
    wrong = dict(params, extra=params["final_norm"], embedding=params["embedding"][:5])
    del wrong["layers/q_proj"]
    with pytest.raises(ValueError, match=r"missing layers/q_proj; unknown extra; embedding.*5"):
        Decoder(CONFIG, wrong)
    with pytest.raises(ValueError, match="neither"):
        Decoder(CONFIG, params, lora=LoRAConfig())
    with pytest.raises(ValueError, match="600 tokens exceed max_positions=512"):
        Decoder(CONFIG, params).hidden(random_tokens((1, 600)), np.array([600]))
    shorter = jax.tree.map(lambda a: a[:1], init_adapters(CONFIG, LoRAConfig(), jax.random.key(0)))
    with pytest.raises(
        ValueError, match=r"adapters/q_proj/a has shape \(1, 32, 8\), expected \(2,"
    ):
        Decoder(CONFIG, params, lora=LoRAConfig(), adapters=shorter)
    with pytest.raises(ValueError, match="llm.attention is 'cudnn', which needs the same sliding"):
        Decoder(MIXED, params, options=DecoderOptions(attention="cudnn"))
    with pytest.raises(ValueError, match="remat"):
        DecoderOptions(remat="some")


def test_bfloat16_weights_stay_close():
    half = Decoder(CONFIG, init_params(CONFIG, jax.random.key(0), jnp.bfloat16))
    tokens, lengths = random_tokens((2, 9)), np.array([9, 9])
    hidden = half.hidden(tokens, lengths)
    assert hidden.dtype == jnp.bfloat16
    assert half.head()(hidden).dtype == jnp.float32
    reference = make_decoder().hidden(tokens, lengths)
    np.testing.assert_allclose(hidden.astype(jnp.float32), reference, atol=0.15)
