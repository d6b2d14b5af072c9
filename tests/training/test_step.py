"""The training step against a dense loop, its shapes, its compilations and its resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.core.decisions import title_decisions
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.item_tokens import TextEncoder, tokenise_items
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.distributed.sharding import make_mesh, put, replicated, shard_batch
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder, init_params
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters
from tca4rec_jax.recommenders import GENERATIVE
from tca4rec_jax.training.batches import Batches, mean_of_means
from tca4rec_jax.training.examples import build_examples
from tca4rec_jax.training.optimizer import OptimizerConfig, make_optimizer
from tca4rec_jax.training.state import TRAINED, TrainState
from tca4rec_jax.training.step import StepOptions, make_train_step

VOCABULARY = 128
TITLES = ("ab", "abc", "b", "ad", "ab", "bd", "c")


class ArrayStore:
    """A CF store in memory."""

    def __init__(self, vectors, item_table):
        self.vectors, self.item_table, self.item_bias = vectors, item_table, None

    def read(self, positions):
        return self.vectors[positions]


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    letters = TextEncoder(*2 * [lambda text: [ord(c) for c in text]])
    tokens = tokenise_items({"title": TITLES}, letters, PromptTemplate(("P{history}\n{target}",)))
    trie = ItemTrie.build(tokens.written)
    rows = [rng.integers(0, len(TITLES), n) for n in (9, 4, 2, 7, 5)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    flat = np.concatenate(rows)
    split = ItemSequences(np.arange(len(rows)), flat, offsets, np.full(flat.size, -1))
    vectors = rng.normal(size=(flat.size, 4)).astype(np.float32)
    table = rng.normal(size=(len(TITLES), 4)).astype(np.float32)
    store = ArrayStore(vectors, table)
    config = DecoderConfig(VOCABULARY, 32, 64, 2, 4, 2, 8, max_positions=64)
    lora = LoRAConfig(rank=4, dropout=0.0)
    adapters = init_adapters(config, lora, jax.random.key(1))
    adapters = jax.tree.map(lambda a: a + 0.05, adapters)
    decoder = Decoder(config, init_params(config, jax.random.key(0)), lora=lora, adapters=adapters)
    examples = build_examples(
        split, tokens, title_decisions(trie.compress()), targets="all", max_tokens=24
    )
    batches = Batches(examples, store, batch_size=4, seed=0, buckets=(16, 24))
    return decoder, trie, split, examples, batches


loss_of = nnx.jit(GENERATIVE.loss)


@nnx.jit
def full_logits(decoder, tokens_BxS, length_B):
    return decoder.head()(decoder.hidden(tokens_BxS, length_B))


def dense_loss(decoder, trie, examples, store, rows, alpha, beta, tau, form, softmax):
    """The objective by a loop over positions, with p_cf from the definition."""
    sequences = [
        row[:length].tolist() for row, length in zip(trie.tokens_QxL, trie.lengths_Q, strict=True)
    ]
    total, positions, nll = 0.0, 0, 0.0
    for r in rows:
        ids = examples.tokens[r]
        padded = jnp.zeros((1, 24), jnp.int32).at[0, : ids.size].set(ids)
        logits = np.asarray(full_logits(decoder, padded, jnp.array([ids.size])), np.float64)[0]
        title, prefix = -1, ()
        for position, label in zip(examples.position[r], examples.label[r], strict=True):
            if not prefix:
                title += 1
                vector = store.vectors[examples.cf_position[r][title]]
                scores_Q = np.full(len(sequences), -np.inf)
                for item, leaf in enumerate(trie.leaf_of_item):
                    score = float(vector @ store.item_table[item]) / beta
                    scores_Q[leaf] = np.logaddexp(scores_Q[leaf], score)
            inside = [q for q, s in enumerate(sequences) if tuple(s[: len(prefix)]) == prefix]
            q = np.exp(scores_Q[inside] - scores_Q[inside].max())
            p = np.zeros(VOCABULARY)
            for leaf, weight in zip(inside, q / q.sum(), strict=True):
                p[sequences[leaf][len(prefix)]] += weight
            allowed = p > 0 if softmax == "children" else np.ones(VOCABULARY, bool)
            z = np.where(allowed, logits[position] / tau, -np.inf)
            log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
            y = alpha * p
            y[label] += 1 - alpha
            if form == "cross_entropy":
                total -= np.sum(y[allowed] * log_p[allowed])
            else:
                total -= np.log(np.sum(y[allowed] * np.exp(log_p[allowed])))
            nll -= log_p[label]
            positions += 1
            prefix = () if label == ord("\n") else (*prefix, int(label))
    return total, positions, nll, title


@pytest.mark.parametrize("form", ["log_expectation", "cross_entropy"])
@pytest.mark.parametrize("softmax", ["vocabulary", "children"])
def test_batch_loss_equals_the_definition(inputs, form, softmax):
    decoder, trie, _, examples, batches = inputs
    arrays = DeviceTrie.of(trie.compress())
    items = CFItems(jnp.asarray(batches.store.item_table))
    objective = Objective(0.3, 0.8, 1.7, form, softmax)
    for index in range(batches.per_epoch):
        batch = jax.tree.map(jnp.asarray, batches(index))
        loss = loss_of(decoder, batch, items, arrays, objective)
        rows = batches.rows(index)
        args = (rows, 0.3, 0.8, 1.7, form, softmax)
        total, positions, nll, _ = dense_loss(decoder, trie, examples, batches.store, *args)
        np.testing.assert_allclose(loss.total, total, rtol=2e-5)
        np.testing.assert_allclose(loss.nll, nll, rtol=2e-5)
        assert loss.positions == positions
        assert loss.titles == sum(examples.cf_position.lengths[r] for r in rows)


@pytest.mark.parametrize("form", ["log_expectation", "cross_entropy"])
@pytest.mark.parametrize("softmax", ["vocabulary", "children"])
def test_without_cf_items_the_loss_is_that_of_alpha_zero(inputs, form, softmax):
    decoder, trie, _, _, batches = inputs
    arrays = DeviceTrie.of(trie.compress())
    batch = jax.tree.map(jnp.asarray, batches(0))
    plain, zero = (
        loss_of(decoder, batch, items, arrays, Objective(alpha, 0.8, 1.7, form, softmax))
        for items, alpha in ((None, 0.3), (CFItems(jnp.asarray(batches.store.item_table)), 0.0))
    )
    np.testing.assert_allclose(jax.tree.leaves(plain), jax.tree.leaves(zero), rtol=1e-6)


@pytest.mark.parametrize("mean_over", ["positions", "decisions"])
def test_a_mean_of_means_weighs_every_two_rows_alike(inputs, mean_over):
    decoder, trie, _, examples, given = inputs
    batches = Batches(examples, given.store, batch_size=4, seed=0, buckets=(24,))
    counted = {"positions": examples.position, "decisions": examples.decisions.node}[mean_over]
    objective = Objective(0.3, 0.8, 1.7, softmax="children", mean_over=mean_over)
    fixed = CFItems(jnp.asarray(given.store.item_table)), DeviceTrie.of(trie.compress()), objective

    def mean_loss(batch):
        loss = loss_of(decoder, jax.tree.map(jnp.asarray, batch), *fixed)
        return loss.total / loss.positions

    rows = np.argsort(counted.lengths)[[0, 1, -2, -1]]
    expected = np.mean([mean_loss(batches.gather(part)) for part in (rows[:2], rows[2:])])
    plain = mean_loss(batches.gather(rows))
    batches.row_weights = mean_of_means(counted.lengths, 2)
    np.testing.assert_allclose(mean_loss(batches.gather(rows)), expected, rtol=1e-5)
    assert plain != pytest.approx(expected, rel=1e-4)


def objective_of(alpha, **fields):
    objective = Objective(alpha, 1.0, 1.0, "cross_entropy", "children", **fields)
    return jax.tree.map(jnp.float32, objective)


def trained(
    inputs,
    mesh,
    steps,
    *,
    alpha=0.3,
    kind="lora",
    dtype=None,
    learning_rate=1e-2,
    micro_batches=1,
    **objective_fields,
):
    decoder, trie, _, _, batches = inputs
    arrays = DeviceTrie.of(trie.compress())
    graph, params, base = nnx.split(decoder, TRAINED[kind], ...)
    optimizer = make_optimizer(OptimizerConfig(learning_rate, warmup_steps=2), steps)
    objectives = [objective_of(one, **objective_fields) for one in np.broadcast_to(alpha, steps)]
    objective = objectives[0]
    tau = jnp.copy(objective.tau) if objective.adapts else None
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params), tau)
    items = CFItems(jnp.asarray(batches.store.item_table), None)
    state, base, items, arrays, objectives = put(
        (state, base, items, arrays, objectives), replicated(mesh)
    )
    step = make_train_step(
        graph,
        state,
        base,
        optimizer,
        GENERATIVE.loss,
        mesh,
        StepOptions(dtype=dtype, micro_batches=micro_batches, steps=steps),
    )
    losses = []
    for index, objective in enumerate(objectives):
        batch = shard_batch(mesh, batches(index))
        state, metrics = step(state, base, batch, items, arrays, objective)
        losses.append(float(metrics.loss))
    return step, state, losses


def test_training_lowers_the_loss_and_compiles_once_per_bucket(inputs):
    step, _, losses = trained(inputs, make_mesh(), steps=40, alpha=0.0)
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    assert len(inputs[-1].shapes) == 2
    assert step._cache_size() == 2


def test_a_run_that_goes_on_compiles_nothing(inputs):
    first, again, other = (
        trained(inputs, make_mesh(), steps=1, learning_rate=rate)[0] for rate in (1e-2, 1e-2, 1e-3)
    )
    assert first is again
    assert first is not other
    assert first._cache_size() == 1


def test_buckets_are_chosen_from_the_data(inputs):
    *_, examples, given = inputs
    chosen = Batches(examples, batch_size=1, seed=0, buckets=())
    best = Batches(examples, batch_size=1, seed=0, buckets=(8, 16, 24))
    assert [shape.tokens for shape in chosen.shapes] == [shape.tokens for shape in best.shapes]
    assert chosen.padding_share == best.padding_share


def test_a_budget_of_tokens_gives_short_buckets_more_rows(inputs):
    *_, few, given = inputs
    examples = few.take(np.tile(np.arange(len(few)), 12))
    how = {"batch_size": 2, "seed": 3, "buckets": (8, 16, 24)}
    batches, *parts = (
        Batches(examples, given.store, **how, tokens_per_batch=100, local_rows=local_rows)
        for local_rows in (np.arange, *(lambda n, p=p: np.arange(n)[p::2] for p in range(2)))
    )
    assert [(shape.tokens, shape.rows) for shape in batches.shapes] == [(8, 12), (16, 6), (24, 4)]
    epochs = np.arange(2 * batches.per_epoch).reshape(2, -1)
    for epoch in epochs:
        rows = [batches.rows(index) for index in epoch]
        np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(len(examples)))
    for index in epochs.ravel():
        rows, batch = batches.rows(index), batches(index)
        assert batch.tokens_BxS.shape[::-1] in {(8, 12), (16, 6), (24, 4)}
        np.testing.assert_array_equal(batch.length_B[: rows.size], examples.tokens.lengths[rows])
        for process, part in enumerate(parts):
            np.testing.assert_array_equal(part(index).tokens_BxS, batch.tokens_BxS[process::2])
    with pytest.raises(ValueError, match=r"is 47: expected 0 or at least 48, .*size=2 rows of 24"):
        Batches(examples, **how, tokens_per_batch=47)
    small = Batches(few, **how, tokens_per_batch=100)  # none has more rows than there are examples
    assert [(shape.tokens, shape.rows) for shape in small.shapes] == [(8, 2), (16, 2), (24, 4)]


def test_two_devices_train_like_one(inputs):
    _, one, losses_one = trained(inputs, make_mesh(1), steps=4)
    _, two, losses_two = trained(inputs, make_mesh(2), steps=4)
    np.testing.assert_allclose(losses_one, losses_two, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_micro_batches_train_like_the_whole_batch(inputs):
    """Rows of several lengths, with dropout, and a tau that follows all of them."""
    decoder, trie, split, examples, given = inputs
    params, adapters = decoder.arrays()
    lora = dataclasses.replace(decoder.lora, dropout=0.1)
    decoder = Decoder(decoder.config, params, lora=lora, adapters=adapters)
    batches = Batches(examples, given.store, batch_size=4, seed=0, buckets=(24,))
    (_, whole, expected), (_, split, found) = (
        trained(
            (decoder, trie, split, examples, batches),
            make_mesh(devices),
            steps=20,
            learning_rate=1e-3,
            micro_batches=micro_batches,
            temperature="adaptive",
            eta=0.6,
            tau_bounds=(0.01, 9.0),
        )
        for devices, micro_batches in ((1, 1), (2, 2))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(split.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert whole.tau != 1.0
    np.testing.assert_allclose(split.tau, whole.tau, rtol=1e-6)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_full_fine_tuning_trains_every_weight(inputs, dtype):
    decoder, *others = inputs
    bare = Decoder(decoder.config, init_params(decoder.config, jax.random.key(0)))
    _, before, nothing = nnx.split(bare, TRAINED["full"], ...)
    assert not jax.tree.leaves(nothing)
    how = {"kind": "full", "dtype": dtype}
    _, state, losses = trained((bare, *others), make_mesh(), steps=30, alpha=0.0, **how)
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        assert new.dtype == jnp.float32
        assert not np.array_equal(old, new)


def test_alpha_changes_without_recompilation(inputs):
    step, _, _ = trained(inputs, make_mesh(1), steps=6, alpha=0.0)
    before = step._cache_size()
    decoder, trie, _, _, batches = inputs
    arrays = DeviceTrie.of(trie.compress())
    _, adapters, base = nnx.split(decoder, nnx.LoRAParam, ...)
    optimizer = make_optimizer(OptimizerConfig(1e-2, warmup_steps=2), 6)
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, adapters), optimizer.init(adapters))
    items = CFItems(jnp.asarray(batches.store.item_table), None)
    mesh = make_mesh(1)
    for alpha in (0.1, 0.9):
        args = put((state, base, items, arrays, objective_of(alpha)), replicated(mesh))
        args = (args[0], args[1], shard_batch(mesh, batches(0)), *args[2:])
        state, _ = step(*args)
    assert step._cache_size() == before


def test_alpha_goes_on_a_line_to_that_of_the_last_step(inputs):
    _, _, losses = trained(inputs, make_mesh(1), steps=4, alpha=0.9, alpha_last=0.0)
    *_, expected = trained(inputs, make_mesh(1), steps=4, alpha=(0.9, 0.6, 0.3, 0.0))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    *_, constant = trained(inputs, make_mesh(1), steps=4, alpha=0.9)
    assert not np.allclose(losses, constant, rtol=1e-3)


def test_an_adaptive_tau_is_the_running_mean_of_what_the_batches_ask_for(inputs):
    """Of a decoder that hardly learns, whose logits are the same in every step."""
    decoder, trie, _, examples, batches = inputs
    how = {"eta": 0.6, "tau_bounds": (0.01, 9.0), "tau_weight": 0.3, "learning_rate": 1e-12}
    _, state, _ = trained(inputs, make_mesh(2), steps=3, temperature="adaptive", **how)
    compressed = trie.compress()
    first = compressed.token[compressed.parent == 1]  # every title begins with the same space
    tau, c = 1.0, np.log(0.6 * first.size)
    for index in range(3):
        logits, targets = [], []
        for r in batches.rows(index):
            ids = examples.tokens[r]
            z_SxV = np.asarray(full_logits(decoder, ids[None], jnp.array([ids.size])))[0]
            label = examples.label[r]
            begins = 1 + np.flatnonzero(np.concatenate([[True], label[:-1] == ord("\n")]))
            logits.append(z_SxV[examples.position[r][begins]][:, first].ravel())
            targets.append(z_SxV[examples.position[r][begins], label[begins]])
        z, z_target = np.concatenate(logits, dtype=float), np.concatenate(targets, dtype=float)
        d = z_target.mean() - z.mean()
        asked = (d + np.sqrt(max(d**2 - 2 * c * z.var(), 0))) / (2 * c)
        tau += 0.3 * (np.clip(asked, 0.01, 9.0) - tau)
    np.testing.assert_allclose(state.tau, tau, rtol=1e-4)
    assert state.tau != pytest.approx(1.0, abs=0.01)
