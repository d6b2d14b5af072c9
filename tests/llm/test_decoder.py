"""The decoder: cached extension against the full pass, options, padding, adapters' gradients."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tca4rec_jax.llm.blocks import Layer
from tca4rec_jax.llm.config import DecoderConfig, DecoderOptions, logical_axes
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


CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
    max_positions=512,
)
# A window shorter than the prompts, in all layers and in one.
WINDOW = dataclasses.replace(CONFIG, sliding_window=3, qk_norm=True)
MIXED = dataclasses.replace(CONFIG, sliding_window=4, full_layers=(1,))


def make_decoder(lora=None, options=DecoderOptions(), config=CONFIG):  # noqa: B008 - frozen
    adapters = None
    if lora is not None:
        adapters = init_adapters(config, lora, jax.random.key(1))
        # A zero B would hide every mistake in the adapters.
        adapters = jax.tree.map(
            lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapters
        )
    params = init_params(config, jax.random.key(0))
    return Decoder(config, params, lora=lora, adapters=adapters, options=options)


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape, dtype=np.int32)


@pytest.mark.parametrize(
    ("config", "lora"),
    [(CONFIG, None), (CONFIG, LoRAConfig(rank=4)), (WINDOW, LoRAConfig(rank=4)), (MIXED, None)],
)
def test_extend_equals_the_full_forward_pass(config, lora):
    """Ragged prompts, three chunks of edges of ragged length, padded with garbage."""
    decoder = make_decoder(lora, config=config)
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


@functools.cache
def gradient_program(options, first_layer=0):
    """(adapters, base, function) of the loss and its gradient in the adapters."""
    lora = LoRAConfig(rank=4, dropout=0.25, first_layer=first_layer)
    decoder = make_decoder(lora, options)
    graph, adapters, base = nnx.split(decoder, nnx.LoRAParam, ...)
    tokens, lengths = random_tokens((2, 11)), np.array([11, 6])

    @jax.jit
    def gradient(adapters, base, dropout_key):
        def loss(adapters):
            decoder = nnx.merge(graph, adapters, base)
            keys = None if dropout_key is None else jax.random.split(dropout_key, len(tokens))
            hidden = decoder.hidden(tokens, lengths, dropout_key_B=keys)
            return jax.nn.logsumexp(decoder.head()(hidden), axis=-1).mean()

        return jax.value_and_grad(loss)(adapters)

    return adapters, base, gradient


def adapter_gradient(options, dropout_key):
    adapters, base, gradient = gradient_program(options)
    value, gradients = gradient(adapters, base, dropout_key)
    return value, nnx.to_pure_dict(gradients)["adapters"]


@pytest.mark.parametrize("remat", ["full", "none"])
def test_remat_changes_neither_loss_nor_gradient(remat):
    key = jax.random.key(5)
    value, gradients = adapter_gradient(DecoderOptions(remat=remat), key)
    expected_value, expected = adapter_gradient(DecoderOptions(), key)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, expected)


def weights_shaped_products(jaxpr, shapes):
    """Matrix products, at any depth, whose result has one of the shapes (or its transpose)."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shape = equation.outvars[0].aval.shape
            count += shape in shapes or shape[::-1] in shapes
        for inner in jax.core.jaxprs_in_params(equation.params):
            count += weights_shaped_products(inner, shapes)
    return count


def test_no_gradient_of_a_base_weight_is_computed():
    """The guard of the cost model: 4 FLOPs per weight and token, not 6."""
    adapters, base, gradient = gradient_program(DecoderOptions())
    jaxpr = jax.make_jaxpr(gradient)(adapters, base, None).jaxpr
    shapes = {*CONFIG.projection_shapes.values(), (CONFIG.vocab_size, CONFIG.hidden_size)}
    assert weights_shaped_products(jaxpr, {(32, 4)}) > 0, "the adapters' gradients are found"
    assert weights_shaped_products(jaxpr, shapes) == 0


def test_layers_below_the_first_adapted_one_have_no_gradient():
    key = jax.random.key(5)
    adapters, base, gradient = gradient_program(DecoderOptions())
    # As initialised: adapters of the lower layer that change nothing.
    untrained = jax.tree.map_with_path(
        lambda path, x: x.at[0].set(0) if path[-2].key == "b" else x, adapters
    )
    expected_value, expected = gradient(untrained, base, key)
    _, _, gradient = gradient_program(DecoderOptions(), first_layer=1)
    value, found = gradient(adapters, base, key)  # whatever the lower layer's adapters are
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)

    def check(found, expected):
        np.testing.assert_allclose(found[1:], expected[1:], atol=1e-6)
        assert np.any(found[1:])
        assert not np.any(found[0])

    jax.tree.map(check, found, expected)


def product_flops(jaxpr):
    """FLOPs of all matrix products, at any depth; a scan's body counts as often as it runs."""
    flops = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            summed = math.prod(shape[axis] for axis in contracted)
            flops += 2 * summed * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1)
        for inner in jax.core.jaxprs_in_params(equation.params):
            flops += times * product_flops(inner)
    return flops


def test_layers_below_the_first_adapted_one_cost_a_forward_pass():
    def flops(first_layer):
        adapters, base, gradient = gradient_program(DecoderOptions(), first_layer)
        return product_flops(jax.make_jaxpr(gradient)(adapters, base, None).jaxpr)

    saved = 1 - flops(1) / flops(0)
    assert 0.2 < saved < 0.5, "of a layer of two: its backward pass, and its adapters"


def test_the_weights_of_some_layers_are_not_copied():
    """A slice of the stacks would be a second copy of the model, made in every step."""
    adapters, base, gradient = gradient_program(DecoderOptions(), first_layer=1)
    program = jax.make_jaxpr(gradient)(adapters, base, None).jaxpr

    def sliced_shapes(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "slice":
                yield equation.outvars[0].aval.shape[1:]
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from sliced_shapes(inner)

    found = set(sliced_shapes(program))
    assert (32, 4) in found, "those of the adapters are found"
    assert not found & set(CONFIG.projection_shapes.values())


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


@pytest.mark.parametrize("kind", ["forward", "lora", "full"])
def test_flops_per_token_counts_the_products_of_a_step(kind):
    tokens, lora = random_tokens((2, 12)), LoRAConfig(rank=4)
    decoder = make_decoder(lora if kind == "lora" else None, DecoderOptions(remat="none"))
    trained = nnx.LoRAParam if kind == "lora" else nnx.Param
    graph, params, base = nnx.split(decoder, trained, ...)

    def loss(params, base):
        decoder = nnx.merge(graph, params, base)
        return decoder.head()(decoder.hidden(tokens, np.array([12, 12]))).sum()

    step = loss if kind == "forward" else jax.grad(loss)
    # So few queries all attend to every key, masked or not.
    counted = product_flops(jax.make_jaxpr(step)(params, base).jaxpr) / tokens.size
    expected = CONFIG.flops_per_token(kind, context=12)
    if kind != "forward":  # attention scores are made again in the backward pass
        expected += CONFIG.flops_per_token("forward", context=12) / 2
        expected -= CONFIG.flops_per_token("forward") / 2
    if kind == "lora":
        sizes = [sum(CONFIG.projection_shapes[f"{name}_proj"]) for name in "qkvo"]
        expected += CONFIG.num_layers * 6 * lora.rank * sum(sizes)
    assert counted == pytest.approx(expected, rel=1e-3)


def test_dropout_is_a_function_of_its_key():
    without, _ = adapter_gradient(DecoderOptions(), None)
    first, _ = adapter_gradient(DecoderOptions(), jax.random.key(3))
    again, _ = adapter_gradient(DecoderOptions(), jax.random.key(3))
    other, _ = adapter_gradient(DecoderOptions(), jax.random.key(4))
    assert first == again
    assert len({float(without), float(first), float(other)}) == 3


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


def test_dropout_leaves_out_a_share_of_the_embeddings_and_of_what_blocks_add():
    config = DecoderConfig(61, 512, 48, 2, 6, 2, 8)
    params = init_params(config, jax.random.key(0))
    options = DecoderOptions(remat="none", dropout=0.25)
    decoder = Decoder(config, params, options=options)
    tokens, lengths = np.arange(40).reshape(2, 20), np.array([20, 20])
    keys = jax.random.split(jax.random.key(1))
    dropped = decoder.hidden(tokens, lengths, dropout_key_B=keys)
    plain = Decoder(config, params).hidden(tokens, lengths)
    np.testing.assert_array_equal(decoder.hidden(tokens, lengths), plain)
    assert not np.allclose(dropped, plain, atol=0.1)
    other_row = decoder.hidden(tokens[::-1], lengths, dropout_key_B=keys[::-1])
    np.testing.assert_array_equal(dropped, other_row[::-1])  # a row's mask is its own key's

    # With nothing added by the layers the embeddings are left, some of them zero.
    outputs = {name: params[name] for name in ("layers/o_proj", "layers/down_proj")}
    idle = params | jax.tree.map(jnp.zeros_like, outputs)
    states = Decoder(config, idle, options=options).hidden(tokens, lengths, dropout_key_B=keys)
    assert np.mean(np.asarray(states) == 0) == pytest.approx(0.25, abs=0.01)

    layer = Layer(config, {}, None, {}, keys, 0.25)
    x, y = jnp.ones((2, 20, 512)), jnp.full((2, 20, 512), 3.0)
    sites = [np.asarray(layer.add(x, y, site=site)) for site in (4, 5)]
    for added in sites:
        assert set(np.unique(added)) == {1.0, 5.0}
        assert np.mean(added == 1) == pytest.approx(0.25, abs=0.01)
    assert (sites[0] != sites[1]).any()


def test_products_beside_adapters_keep_the_axes_of_tokens():
    """Merged, sharded ones cost a TPU a tenth more cycles (Llama-3.1-8B on fsdp x tensor)."""
    layer = Layer(CONFIG, {"q_proj": jnp.ones((4, 5))}, LoRAConfig(), {}, None)
    product = jax.jit(lambda x: layer.project(x, "q_proj", site=0))
    lowered = product.lower(jnp.ones((2, 3, 4))).as_text()
    assert "dot_general" in lowered
    assert "reshape" not in lowered
