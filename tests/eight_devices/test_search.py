"""Beam search and the likelihood of titles on meshes of eight devices against one device."""

import dataclasses
import functools
import re
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.core.collaborative_tokenizer import DENSE, CFItems
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.engine import BatchedSearch, SearchRows
from tca4rec_jax.decoding.likelihood import scored_titles
from tca4rec_jax.decoding.search_programs import (
    SearchProgram,
    TextBatch,
    Users,
    read_prompts,
    search_batch,
)
from tca4rec_jax.distributed import sharded_search
from tca4rec_jax.distributed.sharded_search import put_trie, search_shards
from tca4rec_jax.distributed.sharding import make_mesh, shard_batch, tree_shardings
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder, init_params

ROWS, TOKENS, VOCABULARY, ITEMS = 8, 24, 32, 30
CONFIG = SearchConfig(beams=4, edge_chunk=1)
RNG = np.random.default_rng(0)
# Few branches of the compiled search are enough here.
WORDS = [RNG.integers(1, 6, RNG.integers(1, 4)).tolist() for _ in range(ITEMS)]
TRIE = ItemTrie.build([[*word, 0] for word in WORDS])
CF = RNG.normal(size=(ROWS, ITEMS)).astype(np.float32)
PROMPT_BxS = RNG.integers(1, VOCABULARY, (ROWS, TOKENS)).astype(np.int32)
LENGTH_B = RNG.integers(5, TOKENS + 1, ROWS).astype(np.int32)
PROMPTS = Ragged.from_lengths(PROMPT_BxS[np.arange(TOKENS) < LENGTH_B[:, None]], LENGTH_B)
CAPACITY = TOKENS + 4  # and what is read of a target


@functools.cache
def make_decoder(heads, kv_heads):
    config = DecoderConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=4, max_positions=64, tie_embeddings=True,
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    # Larger embeddings than at initialisation: the distributions are far from uniform.
    return Decoder(config, params | {"embedding": 4 * params["embedding"]})


@functools.cache
def found(sizes, mask="before_softmax", heads=(8, 8), split_from=sharded_search.SPLIT_FROM):
    """(leaves, scores, the targets' NLL, the compiled program) on a mesh."""
    mesh, config = make_mesh(*sizes), dataclasses.replace(CONFIG, mask=mask)
    decoder = make_decoder(*heads)
    graph, state = nnx.split(decoder)
    titles, scored = scored_titles(TRIE, np.arange(ROWS), config)
    tokens_BxS = PROMPTS.followed_by(titles).pad(np.arange(ROWS), CAPACITY, 0)
    texts, users = TextBatch(tokens_BxS, LENGTH_B, scored), Users(CF)
    texts, users = shard_batch(mesh, (texts, users), "prompts")
    state = jax.device_put(state, tree_shardings(mesh, decoder.config, state))
    with mock.patch.object(sharded_search, "SPLIT_FROM", split_from):
        trie = put_trie(mesh, config.device_trie(TRIE, search_shards(mesh)))
    search = SearchProgram(mesh, graph, config)
    prompts, nll = read_prompts(
        state, texts, None, trie, np.ones(1, np.float32), program=search, capacity=CAPACITY
    )
    weights = ScoreWeights(*np.array([0.5, 1.0, 1.0, 0.0], np.float32))
    args = (state, prompts, users, DENSE, trie, weights)
    program = search_batch.lower(*args, program=search).compile()
    return *jax.device_get((*program(*args), nll)), program.as_text()


CASES = [
    ((8, 1, 1),),
    ((1, 8, 1),),
    ((1, 1, 8),),
    ((2, 2, 2),),
    ((2, 2, 2), "after_softmax", (6, 3)),  # heads that do not divide
    ((1, 1, 8), "before_softmax", (8, 8), 0),  # a trie that is split
    ((2, 2, 2), "after_softmax", (8, 8), 0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_mesh_finds_what_one_device_finds(case):
    leaves, scores, nll, _ = found(*case)
    expected_leaves, expected_scores, expected_nll, _ = found((1, 1, 1), *case[1:3])
    np.testing.assert_array_equal(leaves, expected_leaves)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5, atol=1e-5)
    assert (expected_leaves >= 0).all()
    assert len(np.unique(expected_leaves[:, 0])) > 1


def test_groups_of_devices_do_not_wait_for_one_another():
    """On (2, 2, 2) nothing is communicated between the halves along 'data', and the keys and values
    of a device are those of its heads."""
    *_, program = found((2, 2, 2))
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    lines = re.findall(rf"= .* (?:{names})(?:-start)?\(.*", program)
    assert lines
    for line in lines:
        for group in groups_of(line):
            assert len({device // 4 for device in group}) == 1, line
    arrays = {tuple(map(int, d.split(","))) for d in re.findall(r"f32\[([\d,]+)\]", program)}
    assert (ROWS // 2, 2, 4, CAPACITY, 4) in arrays
    assert (ROWS // 2, 2, 8, CAPACITY, 4) not in arrays


def test_a_batched_search_puts_everything_in_place():
    """Also what two decoders share, the first of the layers."""
    mesh, decoder = make_mesh(2, 2, 2), make_decoder(8, 8)
    graph, state = nnx.split(decoder)
    layers = jax.tree.map(lambda leaf: leaf.at[1:].multiply(1.5), state["layers"])
    other = nnx.merge(graph, nnx.State(dict(state) | {"layers": layers}))
    search = BatchedSearch(TRIE, CONFIG, mesh=mesh, batch_size=ROWS, buckets=(TOKENS,))
    both = [(one, [ScoreWeights(0.5)]) for one in (decoder, other)]
    rows = SearchRows(PROMPTS, CF.__getitem__)
    (result,), (of_other,) = search.sweep(both, rows, frozen_prefix=1, progress=None)
    expected_leaves, expected_scores, *_ = found((1, 1, 1))
    np.testing.assert_array_equal(result.leaves_RxM, expected_leaves)
    np.testing.assert_allclose(result.scores_RxM, expected_scores, rtol=1e-5, atol=1e-5)
    assert np.abs(of_other.scores_RxM - result.scores_RxM).max() > 0.1


def test_items_and_a_split_trie_are_held_in_parts_and_found_as_on_one_device(monkeypatch):
    """With factorised CF logits, items that are left out, and a number of items that does not
    divide."""
    monkeypatch.setattr(sharded_search, "SPLIT_FROM", 0)
    rng = np.random.default_rng(1)
    vectors_RxD, table_IxD = rng.normal(size=(ROWS, 3)), rng.normal(size=(ITEMS, 3))
    items = CFItems(np.float32(table_IxD), np.float32(rng.normal(size=ITEMS)))
    allowed_RxI = rng.random((ROWS, ITEMS)) < 0.7
    rows = SearchRows(PROMPTS, np.float32(vectors_RxD).__getitem__, items, allowed_RxI.__getitem__)

    def search(*sizes):
        return BatchedSearch(TRIE, CONFIG, mesh=make_mesh(*sizes), batch_size=ROWS, buckets=(24,))

    def lists(search):
        return search.recommend(make_decoder(8, 8), rows, ScoreWeights(0.7, 0.5), progress=None)

    one, split = search(1, 1, 1), search(2, 1, 4)
    nodes = TRIE.compress().num_nodes
    assert split.trie.parent.addressable_shards[0].data.shape == (-(-nodes // 4),)
    assert split.trie.ordered_leaf.addressable_shards[0].data.shape == (8,)  # of 30 items
    assert one.trie.parent.addressable_shards[0].data.shape == (nodes,)
    expected, found = lists(one), lists(split)
    np.testing.assert_array_equal(found.leaves_RxM, expected.leaves_RxM)
    np.testing.assert_allclose(found.scores_RxM, expected.scores_RxM, rtol=1e-5, atol=1e-5)
    assert len(np.unique(expected.leaves_RxM, axis=0)) == ROWS


def grounded(sizes):
    """The lists of a search for the nearest titles on a mesh, and its trie."""
    config = dataclasses.replace(CONFIG, find="grounding", grounding_beams=2, grounding_tokens=3)
    rows, shape = SearchRows(PROMPTS, CF.__getitem__), {"batch_size": ROWS, "buckets": (TOKENS,)}
    search = BatchedSearch(TRIE, config, mesh=make_mesh(*sizes), **shape)
    lists = search.recommend(make_decoder(8, 8), rows, ScoreWeights(1.0), progress=None)
    return lists, search.trie


def assert_same_lists(found, expected):
    """Titles that are as near as rounding can tell may change places."""
    np.testing.assert_allclose(found.scores_RxM, expected.scores_RxM, atol=1e-5)
    gaps = -np.diff(expected.scores_RxM, axis=1) > 1e-4
    groups = np.cumsum(np.pad(gaps, ((0, 0), (1, 0))), axis=1) * ITEMS
    in_groups = [np.sort(groups + lists.leaves_RxM, axis=1) for lists in (found, expected)]
    np.testing.assert_array_equal(*in_groups)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_grounding_on_a_mesh_is_that_on_one_device(sizes):
    (one, _), (many, _) = grounded((1, 1, 1)), grounded(sizes)
    assert_same_lists(many, one)
    assert len(np.unique(one.leaves_RxM, axis=0)) > 1


def test_grounding_among_items_that_do_not_divide_is_that_on_one_device():
    """30 items on four devices."""
    (one, trie), (many, split) = grounded((1, 1, 1)), grounded((2, 1, 4))
    np.testing.assert_array_equal(split.item_order, trie.item_order)
    np.testing.assert_array_equal(split.ordered_leaf, trie.ordered_leaf)
    assert_same_lists(many, one)


def groups_of(line):
    """The groups of devices of a collective, written as lists or as a reshaped range."""
    if "replica_groups={" in line:
        text = re.search(r"replica_groups=\{(.*?\})\}", line)[1]
        return [list(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", text)]
    found = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    assert found, line
    groups, size, shape, order = found.groups()
    devices = np.arange(8).reshape(tuple(map(int, shape.split(","))))
    if order:
        devices = devices.transpose(tuple(map(int, order.split(","))))
    return devices.reshape(int(groups), int(size)).tolist()
