"""Full rankings in blocks against the whole matrix in NumPy; rankings kept on disk."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.nn import logsumexp

from tca4rec_jax.cf import item_blocks
from tca4rec_jax.cf.item_blocks import LOGITS_AT_ONCE, SharedTitles, block_width
from tca4rec_jax.config import default_config, score_weights
from tca4rec_jax.core.collaborative_tokenizer import DENSE, CFItems
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.decoding import results
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.evaluation.llm_rankings import _Cache, kept_results, ranking_inputs
from tca4rec_jax.evaluation.rankings import (
    EvaluationRows,
    ModelRanking,
    _rank_block,
    full_ranking,
    sample_rows,
)
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.provenance import Provenance

LEAF_OF_ITEM = np.array([3, 0, 1, 1, 2, 0, 4, 5, 5, 5, 6, 7, 8])
TEMPERATURES = (1.0, 1.5, 3.0)


def whole_ranking(logits_RxI, target_R, leaf_of_item=LEAF_OF_ITEM) -> ModelRanking:
    def ranks(scores_RxN, target_R):
        order_RxN = np.argsort(-scores_RxN, axis=1, kind="stable")
        return np.argmax(order_RxN == target_R[:, None], axis=1)

    title_RxQ = np.full((len(target_R), leaf_of_item.max() + 1), -np.inf, logits_RxI.dtype)
    np.maximum.at(title_RxQ, (slice(None), leaf_of_item), logits_RxI)
    same_title_RxI = leaf_of_item[None, :] == leaf_of_item[target_R][:, None]
    nll_TxR = [
        logsumexp(logits_RxI / t, axis=1) - logsumexp(logits_RxI / t, axis=1, where=same_title_RxI)
        for t in TEMPERATURES
    ]
    return ModelRanking(
        np.argsort(-logits_RxI, axis=1, kind="stable")[:, :10],
        ranks(logits_RxI, target_R),
        ranks(title_RxQ, leaf_of_item[target_R]),
        np.stack(nll_TxR, axis=1),
    )


def random_items(rng, bias):
    # Small whole numbers: many ties, and sums that are exact in any order.
    table_IxD = rng.integers(-2, 3, (LEAF_OF_ITEM.size, 4)).astype(np.float32)
    return CFItems(table_IxD, rng.integers(-2, 3, LEAF_OF_ITEM.size).astype(np.float32) * bias)


@pytest.mark.parametrize("kind", ["factorised", "biased", "dense"])
@pytest.mark.parametrize("logits_at_once", [LOGITS_AT_ONCE, 21])
def test_blocks_of_rows_rank_as_the_whole_matrix(kind, logits_at_once, monkeypatch):
    monkeypatch.setattr(item_blocks, "LOGITS_AT_ONCE", logits_at_once)
    jax.clear_caches()  # 23 rows: blocks of all items, or of 1 and of 4
    rng = np.random.default_rng(0)
    cf_RxD = rng.integers(-2, 3, (23, 4)).astype(np.float32)
    target_R = rng.integers(0, LEAF_OF_ITEM.size, 23)
    items = random_items(rng, bias=kind == "biased")
    logits_RxI = cf_RxD @ items.table_IxD.T + items.bias_I[None, :]
    if kind == "dense":
        cf_RxD, items = logits_RxI, DENSE
    expected = whole_ranking(logits_RxI, target_R)
    for size in (0, 5):  # 23 rows in blocks of 5: the last block is padded
        args = cf_RxD, items, LEAF_OF_ITEM, target_R, TEMPERATURES
        ranking = full_ranking(*args, batch_size=size)
        for field, values in expected._asdict().items():
            if field == "nll_RxT":
                np.testing.assert_allclose(ranking.nll_RxT, values, rtol=1e-6, atol=1e-6)
            else:
                np.testing.assert_array_equal(getattr(ranking, field), values, err_msg=field)


@pytest.mark.parametrize("logits_at_once", [LOGITS_AT_ONCE, 1 << 17])
def test_titles_whose_items_have_the_same_vector_are_ties(logits_at_once, monkeypatch):
    monkeypatch.setattr(item_blocks, "LOGITS_AT_ONCE", logits_at_once)
    jax.clear_caches()  # 128 rows: all items, or blocks of 1,024
    rng = np.random.default_rng(0)
    title_of_item = np.arange(4000)
    title_of_item[1::10] -= 1  # every fifth item shares its title
    title_of_item = np.unique(title_of_item, return_inverse=True)[1]
    table_IxD = rng.normal(size=(4000, 64)).astype(np.float32)
    table_IxD[1000:2000] = table_IxD[:1000]
    user_RxD = rng.normal(size=(128, 64)).astype(np.float32)
    target_R = rng.integers(0, 2000, 128)
    args = CFItems(table_IxD), title_of_item, target_R, TEMPERATURES
    found = full_ranking(user_RxD, *args)
    logits_RxI = user_RxD.astype(np.float64) @ table_IxD.T.astype(np.float64)
    logits_RxI[:, 1000:2000] = logits_RxI[:, :1000]
    expected = whole_ranking(logits_RxI, target_R, title_of_item)
    np.testing.assert_array_equal(found.title_rank_R, expected.title_rank_R)
    np.testing.assert_array_equal(found.rank_R, expected.rank_R)


@pytest.mark.parametrize("logits_at_once", [LOGITS_AT_ONCE, 35])
def test_a_filter_holds_for_full_rankings(logits_at_once, monkeypatch):
    monkeypatch.setattr(item_blocks, "LOGITS_AT_ONCE", logits_at_once)
    jax.clear_caches()  # 7 rows: blocks of 5 items
    rng = np.random.default_rng(1)
    logits_RxI = rng.integers(-9, 9, (40, LEAF_OF_ITEM.size)).astype(np.float32)
    target_R = rng.integers(0, LEAF_OF_ITEM.size, 40)
    allowed_RxI = rng.random(logits_RxI.shape) < 0.5
    args = logits_RxI, DENSE, LEAF_OF_ITEM, target_R, TEMPERATURES
    whole = full_ranking(*args, batch_size=7)
    found = full_ranking(*args, allowed=allowed_RxI, batch_size=7)
    np.testing.assert_array_equal(found.nll_RxT, whole.nll_RxT)  # of the whole catalogue
    for row, (logits_I, target) in enumerate(zip(logits_RxI, target_R, strict=True)):
        listed = np.argsort(-logits_I, kind="stable")
        listed = listed[allowed_RxI[row, listed]]
        np.testing.assert_array_equal(found.items_RxM[row], [*listed, *[-1] * 10][:10])
        assert found.rank_R[row] == ([*listed].index(target) if target in listed else -1)
        titles = list(dict.fromkeys(LEAF_OF_ITEM[listed]))
        best = {q: logits_I[allowed_RxI[row] & (q == LEAF_OF_ITEM)].max() for q in titles}
        titles.sort(key=lambda q: (-best[q], q))
        title = LEAF_OF_ITEM[target]
        assert found.title_rank_R[row] == (titles.index(title) if title in titles else -1)


def test_the_memory_of_a_ranking_does_not_grow_with_the_items():
    shape, rows = jax.ShapeDtypeStruct, 512
    block = shape((rows, 4), np.float32), shape((rows,), np.int32)
    sizes = []
    for items in (1 << 16, 1 << 18):
        width = block_width(rows, items)
        shared = SharedTitles(*[shape((items // width // 4, width), np.int32)] * 2)
        titles = shape((items,), np.int32), shared
        args = CFItems(shape((items, 4), np.float32)), *titles, shape((2,), np.float32), *block
        analysis = _rank_block.lower(10, *args).compile().memory_analysis()
        sizes.append(analysis.temp_size_in_bytes)
    assert sizes[0] < 8 * 4 * LOGITS_AT_ONCE
    assert sizes[1] - sizes[0] < 8 * items  # arrays of items, not of rows x items


def test_logits_that_contain_nan_are_refused():
    logits_RxI = np.zeros((3, LEAF_OF_ITEM.size), np.float32)
    logits_RxI[1, 4] = np.nan
    with pytest.raises(ValueError, match="row 1: .* NaN"):
        full_ranking(logits_RxI, DENSE, LEAF_OF_ITEM, np.zeros(3, int), TEMPERATURES)


def test_rows_are_sampled_in_order_and_without_replacement():
    rows = sample_rows(50, 20, seed=1)
    assert np.unique(rows).size == 20
    np.testing.assert_array_equal(rows, np.sort(rows))
    np.testing.assert_array_equal(rows, sample_rows(50, 20, seed=1))
    for count in (0, 50, 80):
        np.testing.assert_array_equal(sample_rows(50, count, seed=1), np.arange(50))


def test_rows_do_not_depend_on_the_seed_of_training(experiment):
    rows = rows_of(*([1, 2, 0] for _ in range(50)))
    experiment.data.splits = {"test": rows.sequences}
    experiment.config.evaluation.update(rows=20, candidates=3)

    def drawn():
        rows = EvaluationRows.of(experiment)
        return rows.position_R.tolist(), rows.candidates_RxN.tolist()

    first = drawn()
    experiment.config.seed = 1
    assert drawn() == first
    experiment.config.evaluation.seed = 1
    assert all(one != other for one, other in zip(drawn(), first, strict=True))


def test_nll_is_told_at_the_temperature_that_suits_a_model_best():
    nll_RxT = np.array([[3.0, 1.0, 2.0], [4.0, 2.0, 1.5]], np.float32)
    lists = np.zeros((2, 1), int), np.zeros(2, int), np.zeros(2, int)
    temperature, nll_R = ModelRanking(*lists, nll_RxT).best_nll(TEMPERATURES)
    assert temperature == 1.5
    np.testing.assert_array_equal(nll_R, [1.0, 2.0])
    assert ModelRanking(*lists, np.full((2, 3), np.nan)).best_nll(TEMPERATURES) is None


@pytest.fixture
def experiment(tmp_path):
    """What a ranking depends on, in memory; the CF logits store holds vectors of one item each."""
    config = default_config()
    config.decoding.exclude_history = False
    Provenance("LLM run", "", {"seed": 0}).save(tmp_path / "llm" / "run")
    store = SimpleNamespace(
        vectors=np.eye(8, 4, dtype=np.float32),
        item_table=np.ones((6, 4), np.float32),
        item_bias=None,
    )
    store.read = lambda positions: store.vectors[positions]
    catalogue = Catalogue(tuple("abcdef"), tuple("ABCDEF"))
    made = Experiment(config, tmp_path)
    vars(made).update(
        inference_inputs={"weights": "their digest", "lora": {"rank": 8}},
        data=SimpleNamespace(catalogue=catalogue),
        store=store,
        cf_store=lambda split, positions: store,
        run_step=lambda name: 5,
    )
    return made


def rows_of(*items, history_length=2):
    lengths = [len(row) for row in items]
    sequences = ItemSequences(
        np.arange(len(items), dtype=np.int32),
        np.concatenate(items).astype(np.int32),
        np.cumsum([0, *lengths]),
        np.zeros(sum(lengths), np.int64),
    )
    arguments = sequences.last_positions, *sequences.histories_and_targets(history_length)
    return EvaluationRows("test", sequences, *arguments)


def test_histories_hold_what_no_longer_fits_the_prompt():
    rows = rows_of([5, 1, 2, 3], [4], [3, 0])
    assert [row.tolist() for row in (rows.histories[r] for r in range(3))] == [[5, 1, 2], [], [3]]
    np.testing.assert_array_equal(rows.history_RxH, [[1, 2], [-1, -1], [-1, 3]])
    np.testing.assert_array_equal(rows.target_R, [3, 4, 0])


def test_candidates_are_ranked_alone_and_as_the_filter_allows():
    candidates_RxN = np.array([[0, 3], [4, 5], [1, 0]], np.int32)
    rows = rows_of([5, 1, 2, 3], [4], [3, 0])
    among = dataclasses.replace(rows, candidates_RxN=candidates_RxN)
    all_I = np.ones(6, bool)
    assert rows.allowed(ItemFilter(all_I)) is None
    found_BxI = among.allowed(ItemFilter(all_I))(np.array([2, 0]))
    assert [np.flatnonzero(row).tolist() for row in found_BxI] == [[0, 1], [0, 3]]
    without_1 = ItemFilter(np.arange(6) != 1, exclude_history=True)
    assert np.flatnonzero(among.allowed(without_1)(np.array([2]))).tolist() == [0]
    assert among.inputs().keys() - rows.inputs().keys() == {"candidates"}


def test_kept_rankings_are_those_of_the_same_inputs(experiment):
    rows = rows_of([1, 2, 0], [3, 4, 1])

    def cache(rows=rows, guidances=(0.0, 1.0), name="run"):
        weights = [score_weights(experiment.config, guidance) for guidance in guidances]
        return _Cache.of(experiment, name, ranking_inputs(experiment, rows, name, weights))

    kept = cache()
    assert kept.read(ModelRanking) == ([], 0.0)
    rng = np.random.default_rng(0)
    rankings = [
        ModelRanking(rng.integers(0, 6, (2, 3)), *rng.integers(0, 9, (2, 2)), rng.random((2, 5)))
        for _ in range(2)
    ]
    kept.write(rankings, 60.0)
    assert cache() == kept
    found, seconds = cache().read(ModelRanking)
    assert seconds == 60
    for one, read in zip(rankings, found, strict=True):
        for values, saved in zip(one, read, strict=True):
            np.testing.assert_array_equal(values, saved)

    def assert_changed(**arguments):
        assert not cache(**arguments).read(ModelRanking)[0], arguments

    assert_changed(guidances=(0.0, 0.5))
    assert_changed(name="")
    assert_changed(rows=rows_of([5, 1, 2, 0], [3, 4, 1]))
    assert_changed(rows=rows_of([1, 2, 0], [3, 4, 2]))
    experiment.config.objective.beta *= 2
    assert_changed()
    experiment.config.objective.beta /= 2
    assert cache().read(ModelRanking)[0]
    vars(experiment)["run_step"] = lambda name: 4
    assert_changed()
    vars(experiment)["run_step"] = lambda name: 5
    made_from = Provenance.load(experiment.workdir / "llm" / "run")
    Provenance("LLM run", "", {"seed": 1}).save(experiment.workdir / "llm" / "run")
    assert_changed()
    made_from.save(experiment.workdir / "llm" / "run")
    (experiment.workdir / "deny.txt").write_text("a\n")
    experiment.config.decoding.deny = str(experiment.workdir / "deny.txt")
    for item in "ab":  # the contents of the list count
        (experiment.workdir / "deny.txt").write_text(item)
        vars(experiment).pop("item_filter")
        assert_changed()
    experiment.config.decoding.deny = None
    vars(experiment).pop("item_filter")
    assert cache().read(ModelRanking)
    with np.load(kept.path) as saved:
        assert Provenance.from_json(str(saved["provenance"]), kept.path) == kept.made_from

    experiment.store.vectors[0] += 1  # of another row
    assert cache().read(ModelRanking)
    experiment.store.vectors[5, 0] += 1
    assert_changed()
    experiment.store.vectors[5, 0] -= 1
    experiment.store.item_table = 2 * experiment.store.item_table
    assert_changed()
    alone = cache(guidances=(0.0,))  # without guidance the store does not matter
    experiment.store.item_table = 2 * experiment.store.item_table
    assert cache(guidances=(0.0,)) == alone

    experiment.config.objective.beta *= 2  # matters to guidance alone
    assert cache(guidances=(0.0,)) == alone
    vars(experiment)["inference_inputs"] = {"weights": "another digest"}
    assert cache(guidances=(0.0,)) != alone


def test_blocks_of_shared_titles_part_none():
    title_of_item = np.array([4, 0, 4, 1, 2, 2, 4, 3, 3])
    item_NxW, title_NxW = SharedTitles.of(title_of_item, width=4)
    np.testing.assert_array_equal(item_NxW, [[4, 5, 7, 8], [0, 2, 6, -1]])
    np.testing.assert_array_equal(title_NxW, [[2, 2, 3, 3], [4, 4, 4, -1]])
    assert SharedTitles.of(title_of_item, width=1).item_NxW.shape == (3, 3)  # as one title has
    assert len(SharedTitles.of(np.arange(3), width=2).item_NxW) == 0


def test_the_seconds_of_a_search_are_those_of_every_process_that_did_a_part(
    experiment, monkeypatch
):
    """One is killed after 30 seconds, the next goes on for 10, the last reads what there is."""
    now, rows = [0.0], rows_of([1, 2, 0], [3, 4, 1])
    monkeypatch.setattr(results, "time", SimpleNamespace(monotonic=lambda: now[0]))
    found = ModelRanking(np.zeros((2, 3), int), *np.zeros((2, 2), int), np.zeros((2, 5)))

    def spent(after, *, killed=False):
        def search(weights, file):
            file._every = 0.0
            file.read(found)
            now[0] += after
            if killed:
                file.write(found, np.array([True, False]))
                raise KeyboardInterrupt
            return [[found]]

        seconds = {}
        kept_results(experiment, rows, {"run": {"": 0.0}}, ModelRanking, search, spent=seconds)
        return seconds

    with pytest.raises(KeyboardInterrupt):
        spent(30.0, killed=True)
    now[0] += 1000.0
    assert spent(10.0) == {"run": 30.0}
    assert spent(0.0) == {"run": 40.0}
