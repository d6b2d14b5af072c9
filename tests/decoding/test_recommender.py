"""The user's API and its filters, on a tiny random model and catalogue."""

import copy
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from tiny_catalogue import BOUGHT, IDS, SEQUENCES, TITLES, changed

from tca4rec_jax.config import default_config
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.decoding.beam_search import ScoreWeights
from tca4rec_jax.decoding.engine import BatchSizes
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.decoding.search_programs import search_batch
from tca4rec_jax.provenance import StaleError

LLM_ALONE = ScoreWeights()


def expected_scores(history, weights=LLM_ALONE, mask="before_softmax"):
    """{title: score} by exhaustive scoring."""
    prompt = [5] + [token for item in history for token in SEQUENCES[item]]
    counts = np.bincount(BOUGHT, minlength=len(SEQUENCES)) + 1.0
    cf_logits_I = np.log(counts / counts.sum()) if weights.guidance else None
    return oracle.exhaustive_scores(
        oracle.tiny_decoder(), prompt, SEQUENCES, mask, weights, cf_logits_I
    )


def test_lists_of_one_and_of_several_histories(run):
    recommender = Recommender(run, "any")
    single = recommender.recommend(["i4", TITLES[6], "i2"], k=14)
    both = recommender.recommend([["i0"], ["i11", "i4", "i6", "i2"]], k=14)
    assert both[1] == single  # by title or id; only the last three count
    assert sorted(one.item_id for one in single) == sorted(IDS)
    expected = expected_scores([4, 6, 2])
    for one in single:
        assert one.title == TITLES[IDS.index(one.item_id)]
        title = tuple(SEQUENCES[IDS.index(one.item_id)])
        assert one.score == pytest.approx(expected[title], abs=1e-4)
    scores = [one.score for one in single]
    assert scores == sorted(scores, reverse=True)
    assert len(recommender.recommend(["i0"], k=1)) == 1


@pytest.mark.parametrize("mask", ["before_softmax", "after_softmax"])
def test_candidates_score_as_in_the_whole_catalogue(run, mask):
    config = run.config.copy_and_resolve_references()
    weights = ScoreWeights(0.7, 1.5, 1.3, 0.5)
    config.decoding.update(beta=1.5, temperature=1.3, length_penalty=0.5, mask=mask)
    config.decoding.exclude_history = True  # filters do not apply
    recommender = Recommender(changed(run, config=config), "any", guidance=weights.guidance)
    lists = [
        [1, 3, 13, 0],  # three items of one title, and a prefix of it
        *np.random.default_rng(0).permutation(len(SEQUENCES))[:12].reshape(3, 4).tolist(),
    ]
    for history, items in zip(([4, 2], [0], [9, 9, 6], [3, 1]), lists, strict=True):
        names = [TITLES[12] if item == 12 else IDS[item] for item in items]
        scores = recommender.score([IDS[item] for item in history], names)
        expected = expected_scores(history, weights, mask)
        wanted = [expected[tuple(SEQUENCES[item])] for item in items]
        np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], r"candidates is \[\]: expected a list of item ids or titles"),
        (["i1", "i14"], "candidates: 'i14' is no item id and no title"),
    ],
)
def test_unusable_candidates_are_errors(run, candidates, message):
    with pytest.raises(ValueError, match=message):
        Recommender(run, "any").score(["i0"], candidates)


def test_candidates_are_grounded_as_the_whole_catalogue_is(run):
    config = run.config.copy_and_resolve_references()
    config.decoding.update(find="grounding", grounding_tokens=4)
    recommender = Recommender(changed(run, config=config), "any", guidance=2.0)
    listed = recommender.recommend(["i4", "i2"], k=14)
    scores = recommender.score(["i4", "i2"], IDS[:5])
    score_of = {one.item_id: one.score for one in listed}
    np.testing.assert_allclose(scores, [score_of[name] for name in IDS[:5]], atol=1e-5)
    assert len({*scores.tolist()}) > 2


def test_guidance_without_a_cf_model_is_an_error(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no CF model at .*checkpoint\.npz"):
        Recommender(changed(run, workdir=tmp_path), "any", guidance=1.0)


def test_guidance_by_a_cf_model_of_another_catalogue_or_other_settings_is_refused(run):
    reversed_ = Catalogue(tuple(IDS[::-1]), tuple(TITLES[::-1]))
    other = changed(run, data=SimpleNamespace(catalogue=reversed_))
    with pytest.raises(StaleError, match=r"checkpoint\.npz.* catalogue was .*launch/train_cf\.py"):
        Recommender(other, "any", guidance=1.0)
    config = copy.deepcopy(run.config)
    config.cf.model = "ease"
    with pytest.raises(StaleError, match=r"cf\.model was 'popularity', is 'ease'"):
        Recommender(changed(run, config=config), "any", guidance=1.0)
    Recommender(other, "any")  # without guidance it does not matter


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([], "give a history"),
        ([[]], "history 0 is"),
        (["i0", "1 2 9 9"], "history 0: '1 2 9 9' is no item id and no title; did you mean"),
    ],
)
def test_unusable_histories_are_errors(run, histories, message):
    with pytest.raises(ValueError, match=message):
        Recommender(run, "any").recommend(histories)


def test_filters_leave_out_history_and_lists(run, tmp_path):
    (tmp_path / "allow.txt").write_text("\ufeffi2\ni4\n\ni6\ni7\n")
    (tmp_path / "deny.txt").write_text("i7\n")
    config = run.config.copy_and_resolve_references()
    config.decoding.allow, config.decoding.deny = (
        str(tmp_path / name) for name in ("allow.txt", "deny.txt")
    )
    config.decoding.exclude_history = True
    filtered = changed(run, config=config)
    lists = Recommender(filtered, "any").recommend([["i0"], ["i4"], ["i2", "i6", "i4"]], k=4)
    assert [{one.item_id for one in found} for found in lists] == [
        {"i2", "i4", "i6"}, {"i2", "i6"}, set(),
    ]  # fmt: skip


def test_histories_are_left_out_where_nobody_has_an_item_twice(run):
    decoding = default_config().decoding
    for items, expected in (([0, 1, 2, 1], True), ([0, 1, 1, 1], False)):
        rows = ItemSequences(np.arange(2), np.array(items), np.array([0, 2, 4]), np.zeros(4, int))
        splits = {"train_sequences": rows}
        data = SimpleNamespace(catalogue=run.data.catalogue, splits=splits)
        for said in (None, True, False):
            decoding.exclude_history = said
            found = ItemFilter.from_config(decoding, data).exclude_history
            assert found is (expected if said is None else said)


def test_the_whole_history_is_left_out_not_only_what_the_prompt_holds(run):
    config = run.config.copy_and_resolve_references()
    config.decoding.exclude_history = True
    filtered = changed(run, config=config)
    history = [f"i{item}" for item in (0, 11, 7, 4, 6, 2)]
    assert len(history) > config.data.history_length
    (found,) = Recommender(filtered, "any").recommend([history], k=14)
    assert {one.item_id for one in found} == set(IDS) - set(history)
    # The prompt still holds the latest items alone.
    kept = [SEQUENCES[IDS.index(one.item_id)] for one in found]
    prompt = [5] + [token for item in (4, 6, 2) for token in SEQUENCES[item]]
    expected = oracle.exhaustive_scores(
        oracle.tiny_decoder(), prompt, kept, "before_softmax", ScoreWeights()
    )
    for one, title in zip(found, kept, strict=True):
        assert one.score == pytest.approx(expected[tuple(title)], abs=1e-4)


def test_item_lists_that_do_not_fit_are_errors(run, tmp_path):
    data = run.data
    path = tmp_path / "items.txt"
    fields = SimpleNamespace(exclude_history=False, allow=str(path), deny="")
    with pytest.raises(FileNotFoundError, match=r"items\.txt does not exist"):
        ItemFilter.from_config(fields, data)
    path.write_text("i1\n\nnone\n")
    with pytest.raises(ValueError, match=r"items\.txt, line 3: the catalogue has no item 'none'"):
        ItemFilter.from_config(fields, data)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"items\.txt lists no item"):
        ItemFilter.from_config(fields, data)
    path.write_text("\n".join(IDS))
    fields.deny = fields.allow
    with pytest.raises(ValueError, match="leave no item"):
        ItemFilter.from_config(fields, data)
    histories = Ragged.from_lengths(np.zeros(1, np.int32), [1])
    fields.allow = fields.deny = ""
    assert ItemFilter.from_config(fields, data).masks(histories) is None


def test_one_request_costs_one_request(run, monkeypatch):
    config = run.config.copy_and_resolve_references()
    config.inference.batch_size = 64
    recommender, shapes = Recommender(changed(run, config=config), "any"), []
    pad = Ragged.pad
    monkeypatch.setattr(
        Ragged,
        "pad",
        lambda self, rows_B, width, fill: (
            shapes.append((len(rows_B), width)) or pad(self, rows_B, width, fill)
        ),
    )
    for rows, expected in ((1, 2), (2, 2), (3, 4), (9, 16)):  # the mesh has two devices
        shapes.clear()
        recommender.recommend([["i0"]] * rows, k=3)
        assert shapes[0] == (expected, 16)


def test_sizes_of_calls_are_few():
    sizes = {BatchSizes(1, (length,)).rounded(250).buckets for length in range(8, 257, 8)}
    assert sizes == {(n,) for n in (16, 24, 32, 48, 64, 96, 128, 192, 256)}
    assert BatchSizes(4, (8, 16, 40, 300)).rounded(250) == (4, (16, 48, 300))


def test_calls_of_any_guidance_and_filter_have_one_program(run):
    recommender = Recommender(run, "any")
    histories, sizes = [["i4", "i6"], ["i2"]], BatchSizes(2, (16,))
    everything = recommender.filter()
    found = recommender.recommend(histories, 4, guidance=0.0, filters=[everything] * 2, sizes=sizes)
    alone = Recommender(run, "any").recommend(histories, 4)
    for mine, wanted in zip(found, alone, strict=True):
        assert [one.item_id for one in mine] == [one.item_id for one in wanted]
        assert [one.score for one in mine] == pytest.approx([one.score for one in wanted], abs=1e-5)
    before = search_batch._cache_size()
    few = recommender.filter(allow=["i0", "i4", "i6", "i7"], deny=["i7"], exclude_history=True)
    lists = recommender.recommend(
        histories, 4, guidance=0.7, filters=[few, everything], sizes=sizes
    )
    assert search_batch._cache_size() == before
    assert {one.item_id for one in lists[0]} == {"i0"}
    guided = Recommender(run, "any", guidance=0.7)
    (wanted,) = guided.recommend([histories[1]], 4)
    assert [one.item_id for one in lists[1]] == [one.item_id for one in wanted]
    with pytest.raises(ValueError, match=r"guidance is -1.0: expected at least 0"):
        recommender.recommend(histories, guidance=-1.0)
    with pytest.raises(ValueError, match="leaves no item"):
        recommender.filter(allow=["i0"], deny=["i0"])


def test_candidates_of_several_histories_have_one_program(run):
    recommender = Recommender(run, "any")
    sizes = BatchSizes(2, (16,))
    call = {"guidance": 0.5, "most": 4, "sizes": sizes}
    candidates = [["i1", "i9", "i5", "i6"], ["i0", "i9", "i2", "i3"]]
    scores = recommender.scores([["i4"], ["i2", "i6"]], candidates, **call)
    before = search_batch._cache_size()
    few = recommender.scores([["i4"]], [["i9", "i1"]], **call)
    recommender.scores([["i4"]], [["i9"]], **(call | {"guidance": 0.0}))
    assert search_batch._cache_size() == before
    np.testing.assert_allclose(few, scores[:1, 1::-1], atol=1e-5)
    guided = Recommender(run, "any", guidance=0.5)
    np.testing.assert_allclose(scores[1], guided.score(["i2", "i6"], candidates[1]), atol=1e-5)
