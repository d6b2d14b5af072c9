"""The training step on meshes of eight devices against one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.core.decisions import Decisions, Targets
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.distributed.sharded_projection import cf_arrays, cf_shardings
from tca4rec_jax.distributed.sharding import make_mesh, put, replicated, shard_batch, tree_shardings
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder, init_params
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters
from tca4rec_jax.recommenders import GENERATIVE
from tca4rec_jax.training.batches import Batch
from tca4rec_jax.training.optimizer import OptimizerConfig, make_optimizer
from tca4rec_jax.training.state import TRAINED, TrainState
from tca4rec_jax.training.step import StepOptions, make_train_step

MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
ROWS, TOKENS, POSITIONS, TITLES, DECISIONS = 8, 24, 12, 3, 6
ITEMS, WIDTH, VOCABULARY = 37, 5, 128
# 8 heads divide over every mesh, 6 and 3 over none.
CONFIG = DecoderConfig(VOCABULARY, 32, 64, 2, 8, 8, 8, max_positions=64)
UNEVEN = dataclasses.replace(CONFIG, num_heads=6, num_kv_heads=3, tie_embeddings=True)


@functools.cache
def catalogue():
    rng = np.random.default_rng(0)
    words = [rng.integers(1, 60, rng.integers(1, 5)).tolist() for _ in range(ITEMS)]
    return ItemTrie.build([[*word, 0] for word in words]).compress()


def make_batch(dense=False):
    """Rows of several lengths, the last one of padding; decisions at positions of their own."""
    rng, trie = np.random.default_rng(1), catalogue()
    real_B = np.arange(ROWS) < ROWS - 1
    inner = np.flatnonzero(trie.child_count > 1)
    node_BxK = rng.choice(inner, (ROWS, DECISIONS)).astype(np.int32)
    count_BxK = trie.child_count[node_BxK]
    position_BxK = np.stack([rng.permutation(POSITIONS)[:DECISIONS] for _ in range(ROWS)])
    weight_B = real_B[:, None].astype(np.float32)
    return Batch(
        tokens_BxS=rng.integers(0, VOCABULARY, (ROWS, TOKENS)).astype(np.int32),
        length_B=np.where(real_B, rng.integers(14, TOKENS, ROWS), 1).astype(np.int32),
        targets=Targets(
            position=np.tile(np.arange(1, POSITIONS + 1, dtype=np.int32), (ROWS, 1)),
            label=rng.integers(0, VOCABULARY, (ROWS, POSITIONS)).astype(np.int32),
            weight=weight_B * np.ones((1, POSITIONS), np.float32),
            title_weight=weight_B * np.ones((1, TITLES), np.float32),
            decisions=Decisions(
                position=position_BxK.astype(np.int32),
                title=rng.integers(0, TITLES, (ROWS, DECISIONS)).astype(np.int32),
                node=node_BxK,
                child=(rng.integers(0, 1 << 20, node_BxK.shape) % count_BxK).astype(np.int32),
                weight=weight_B * np.ones((1, DECISIONS), np.float32),
            ),
        ),
        cf_BxPxD=rng.normal(size=(ROWS, TITLES, ITEMS if dense else WIDTH)).astype(np.float32),
    )


@functools.cache
def one_step(
    sizes,
    softmax,
    kind="lora",
    config=CONFIG,
    dense=False,
    first_layer=0,
    micro_batches=1,
    **adapts,
):
    """(metrics, a tenth of the gradient, the compiled program, the new state) of one step."""
    mesh = make_mesh(*sizes)
    params = init_params(config, jax.random.key(0))
    lora = LoRAConfig(4, dropout=0.2, targets="(q|o|gate|down)_proj", first_layer=first_layer)
    lora = lora if kind == "lora" else None
    adapters = lora and init_adapters(config, lora, jax.random.key(1))
    adapters = adapters and jax.tree.map(lambda a: a + 0.05, adapters)
    decoder = Decoder(config, params, lora=lora, adapters=adapters)
    graph, trained, base = nnx.split(decoder, TRAINED[kind], ...)
    plain = {"warmup_steps": 0, "weight_decay": 0.0, "clip": 0.0}
    optimizer = make_optimizer(OptimizerConfig(1.0, **plain), 9)
    tau = jnp.float32(1.3) if adapts else None
    before = TrainState(jnp.int32(0), trained, optimizer.init(trained), tau)
    state, base = jax.device_put((before, base), tree_shardings(mesh, config, (before, base)))
    table = np.random.default_rng(2).normal(size=(ITEMS, WIDTH)).astype(np.float32)
    items = CFItems() if dense else CFItems(table, table[:, 0])
    items, trie = cf_arrays(mesh, items, catalogue())
    items, trie = jax.device_put((items, trie), cf_shardings(mesh, items, trie))
    options = StepOptions(micro_batches=micro_batches)
    step = make_train_step(graph, state, base, optimizer, GENERATIVE.loss, mesh, options)
    objective = Objective(0.3, 0.7, 1.3, "cross_entropy", softmax, **adapts)
    objective = put(jax.tree.map(jnp.float32, objective), replicated(mesh))
    args = state, base, shard_batch(mesh, make_batch(dense)), items, trie, objective
    program = step.lower(*args).compile()
    state, metrics = program(*args)
    return jax.tree.map(float, metrics), adam_state(state).mu, program.as_text(), state


def adam_state(state):
    """Adam's moments: after one step, mu is a tenth of the gradient."""
    parts = jax.tree.leaves(state.optimizer, is_leaf=lambda part: hasattr(part, "mu"))
    return next(part for part in parts if hasattr(part, "mu"))


def check_against_one_device(sizes, *case, **kwargs):
    metrics, gradients, _, state = one_step(sizes, *case, **kwargs)
    expected_metrics, expected, *_ = one_step((1, 1, 1), *case, **kwargs | {"micro_batches": 1})
    assert expected_metrics.grad_norm > 0.01
    both = map(jax.tree.leaves, (metrics, expected_metrics))
    np.testing.assert_allclose(*both, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * largest)
    return state


@pytest.mark.parametrize("softmax", ["children", "vocabulary"])
@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_has_the_loss_and_gradient_of_one_device(sizes, softmax):
    """With the dropout of the adapters, which belongs to rows and not to devices."""
    check_against_one_device(sizes, softmax)


def test_an_adaptive_tau_is_that_of_one_device():
    how = {"temperature": "adaptive", "tau_weight": 1.0, "tau_bounds": (-99.0, 99.0)}
    state, one = (
        check_against_one_device(sizes, "children", scale_by_tau=True, **how)
        for sizes in ((2, 2, 2), (1, 1, 1))
    )
    assert 0.01 < abs(one.tau) < 99.0
    np.testing.assert_allclose(state.tau, one.tau, rtol=1e-5)


def test_layers_below_the_first_adapted_one():
    """The weights of some layers are picked from stacks of which each device has a part."""
    check_against_one_device((2, 2, 2), "vocabulary", first_layer=1)


def test_heads_that_do_not_divide_and_dense_cf_logits():
    check_against_one_device((2, 2, 2), "vocabulary", config=UNEVEN, dense=True)


def test_full_fine_tuning_splits_weights_gradients_and_moments_alike():
    """In micro-batches, too: their gradients are added up where they lie."""
    state = check_against_one_device((2, 2, 2), "vocabulary", kind="full", micro_batches=2)
    parts = {"q_proj": (2, 16, 32), "down_proj": (2, 32, 16), "attn_norm": (2, 32)}
    adam = adam_state(state)
    for tree in (state.params, adam.mu, adam.nu):
        for name, shape in parts.items():
            shards = tree["layers"][name][...].addressable_shards
            assert {shard.data.shape for shard in shards} == {shape}
        assert tree["embedding"][...].addressable_shards[0].data.shape == (64, 16)


def collectives(text):
    """(operation, dimensions of each result) of every collective of a program."""
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for result, name in re.findall(rf"= (\([^)]*\)|\S+) ({names})(?:-start)?\(", text):
        shapes = [tuple(map(int, d.split(","))) for d in re.findall(r"\[([\d,]+)\]", result)]
        yield name, shapes


@pytest.mark.parametrize("case", [{}, {"config": UNEVEN, "dense": True}], ids=["factors", "dense"])
def test_neither_vocabulary_logits_nor_cf_logits_are_gathered(case):
    """Read from the program of (2, 2, 2), where rows are split in four and vocabulary and items in
    two: those of a device exist, of their whole width none does, and the host is not asked."""
    *_, text, _ = one_step((2, 2, 2), "vocabulary", **case)
    arrays = {tuple(map(int, d.split(","))) for d in re.findall(r"f32\[([\d,]+)\]", text)}
    rows, padded = ROWS // 4, ITEMS + ITEMS % 2
    assert (rows * POSITIONS, VOCABULARY // 2) in arrays
    assert (rows * POSITIONS, VOCABULARY) not in arrays
    assert {(rows * TITLES, padded // 2), (padded // 2, rows * TITLES)} & arrays
    if not case:  # dense ones come in whole
        assert not {(rows * TITLES, padded), (padded, rows * TITLES)} & arrays
    found = list(collectives(text))
    assert found
    for name, shapes in found:
        for shape in shapes:
            if name == "all-reduce":  # activations, states of softmaxes, masses, the gradient
                assert not {VOCABULARY, VOCABULARY // 2, padded, padded // 2} & set(shape), shape
            else:  # weights, and the adapters' gradients
                assert name == "all-gather"
                assert shape in weight_shapes(case.get("config", CONFIG)), shape
    for word in ("infeed", "outfeed", "send(", "recv(", "custom-call"):
        assert word not in text, word


def weight_shapes(config):
    """Of what may be gathered: a layer's matrices, with or without the heads and the feed-forward
    in two, the head and the embedding in two, and the adapters' gradients."""
    rows, columns = zip(*config.projection_shapes.values(), strict=True)
    sizes = {size // parts for size in (*rows, *columns, VOCABULARY) for parts in (1, 2)}
    matrices = {(i, o) for i in sizes for o in sizes if config.hidden_size in (i, o)}
    return matrices | {(2, 4, o) for o in columns} | {(2, i, 4) for i in rows}
