"""The user's API, its filters and its files, on a tiny random model and catalogue."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from flax import nnx

from tca4rec_jax.cf.checkpoint import save_model
from tca4rec_jax.cf.models.popularity import Popularity, PopularityConfig
from tca4rec_jax.cf.settings import model_inputs
from tca4rec_jax.config import default_config
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.item_tokens import ItemTokens
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.decoding.beam_search import ScoreWeights
from tca4rec_jax.decoding.engine import BatchSizes
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.decoding.recommend_file import read_histories, recommend_file
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.decoding.search_programs import read_prompts, search_batch
from tca4rec_jax.distributed.sharding import make_mesh
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.lease import LeaseError, only_writer
from tca4rec_jax.provenance import Provenance, StaleError

SEQUENCES = oracle.with_end(oracle.WORDS)
TITLES = [" ".join(map(str, word)) for word in oracle.WORDS]
IDS = [f"i{item}" for item in range(len(TITLES))]
LLM_ALONE = ScoreWeights()
BOUGHT = [0, 1, 2, 3, 3, 3, 9, 9]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An experiment whose parts are tiny and already made."""
    config = default_config()
    config.decoding.beams = 4
    config.inference.batch_size = 2
    config.inference.buckets = 1
    config.data.history_length = 3
    config.decoding.exclude_history = False
    workdir = tmp_path_factory.mktemp("run")
    cf_model = Popularity(PopularityConfig(len(IDS)), rngs=nnx.Rngs(0))
    times = np.zeros(len(BOUGHT), np.int64)
    offsets = np.array([0, len(BOUGHT)])
    cf_model.fit_statistics(ItemSequences(np.array([0]), np.array(BOUGHT), offsets, times))
    config.cf.model = "popularity"
    catalogue = Catalogue(tuple(IDS), tuple(TITLES))
    inputs = {"cf": model_inputs(config.cf, workdir), "catalogue": catalogue.content_hash()}
    made_from = Provenance("CF model", "launch/train_cf.py", inputs)
    save_model(workdir / "cf" / "checkpoint.npz", "popularity", cf_model, made_from)
    flat = np.concatenate(SEQUENCES).astype(np.int32)
    titles = Ragged.from_lengths(flat, [len(title) for title in SEQUENCES])
    first, none = (Ragged.from_lengths(np.full(n, 5, np.int32), np.array([n])) for n in (1, 0))
    experiment = Experiment(config, workdir)
    vars(experiment).update(
        data=SimpleNamespace(catalogue=catalogue),
        items=ItemTokens(titles, titles, first, none, none.values),
        trie=ItemTrie.build(SEQUENCES),
        mesh=make_mesh(2),
        inference_decoder=lambda name: oracle.tiny_decoder(),
        check_run=lambda name, guided: None,
        inference_inputs={"weights": "digest"},
        run_step=lambda name: 5,
    )
    for name in ("any", "other"):
        Provenance("LLM run", "", {"name": name}).save(workdir / "llm" / name)
    return experiment


def changed(experiment, **parts):
    """The experiment with other parts."""
    other = copy.copy(experiment)
    vars(other).pop("item_filter", None)  # is made of other parts
    vars(other).update(parts)
    return other


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


def test_a_file_is_recommended_for_and_resumed(run, tmp_path):
    recommender = Recommender(run, "any")
    source, output = tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl"
    name = "Zo\u00eb \ud83d"  # half of a UTF-16 pair, which UTF-8 does not have
    rows = [{"user": user, "name": name, "history": [f"i{user}", "i4"]} for user in range(5)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recommend_file(recommender, source, output, k=3, chunk=2)
    whole = output.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["user"] for line in lines] == list(range(5))
    assert (lines[0]["name"], "Zoë" in whole) == (name, True)
    alone = recommender.recommend(["i3", "i4"], k=3)
    assert lines[3]["items"] == [one.item_id for one in alone]
    assert lines[3]["scores"] == pytest.approx([one.score for one in alone], abs=1e-4)
    cut = whole.splitlines(keepends=True)
    output.write_text("".join(cut[:2]) + cut[2][:7])  # killed while it wrote the third line
    recommend_file(recommender, source, output, k=3, chunk=2)
    assert output.read_text() == whole
    with pytest.raises(StaleError, match=r"out\.jsonl: .* k was 3, is 2\. .* another --output"):
        recommend_file(recommender, source, output, k=2)
    with pytest.raises(StaleError, match=r"run.made_from was \w{12}, is \w{12}"):
        recommend_file(Recommender(run, "other"), source, output, k=3)
    with only_writer(output), pytest.raises(LeaseError, match=r"out\.jsonl is being written by"):
        recommend_file(recommender, source, output, k=3)
    table = tmp_path / "in.csv"
    table.write_text("user,history\n7,i1 | 9\n")
    assert read_histories(table) == [{"user": "7", "history": ["i1", "9"]}]


def test_a_part_of_a_file_whose_scores_are_not_finite_is_named(run, tmp_path, monkeypatch):
    recommender = Recommender(run, "any")
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"history": ["i1"]}\n' * 4)
    recommend_file(recommender, source, output, k=3, chunk=2)
    output.write_text("".join(output.read_text().splitlines(keepends=True)[:2]))

    def broken(*_, **__):
        raise FloatingPointError("row 0: nan")

    monkeypatch.setattr(recommender, "recommend", broken)
    with pytest.raises(FloatingPointError, match=r"out.jsonl, of the rows from 3 on: row 0: nan"):
        recommend_file(recommender, source, output, k=3, chunk=2)


def test_all_histories_of_a_file_are_known_before_anything_is_loaded(run, tmp_path):
    def load(name):
        raise AssertionError("loaded")

    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"history": ["i1"]}\n' * 5 + '{"history": ["i4", "nope"]}\n')
    recommender = Recommender(changed(run, inference_decoder=load), "any")
    with pytest.raises(ValueError, match=r"in\.jsonl, row 6: 'nope' is no item id and no title"):
        recommend_file(recommender, source, output, k=3, chunk=2)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_parts_of_a_file_are_searched_with_one_program(run, tmp_path):
    source = tmp_path / "in.jsonl"
    histories = [["i0"], ["i1"], ["i4", "i6"], ["i11", "i4"], ["i4", "i6", "i11"]]
    source.write_text("".join(json.dumps({"history": row}) + "\n" for row in histories))
    config = run.config.copy_and_resolve_references()
    config.decoding.beams = 5  # not compiled yet
    recommender = Recommender(changed(run, config=config), "any")
    before = read_prompts._cache_size(), search_batch._cache_size()
    recommend_file(recommender, source, tmp_path / "out.jsonl", k=3, chunk=1)
    after = read_prompts._cache_size(), search_batch._cache_size()
    assert after == (before[0] + 1, before[1] + 1)


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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("in.txt", "x", r"must end in \.jsonl or \.csv"),
        ("in.jsonl", '{"history": [1]}\n', r"row 1: history is \[1\]"),
        ("in.jsonl", "{\n", "line 1 is not JSON"),
        ("in.csv", "user\n7\n", "row 1: history is None"),
        ("in.csv", "user,history\n", "no rows"),
        ("in.csv", "user,history\n7,Matrix, The\n", "row 1 has 3 fields, the header 2"),
        ("in.csv", 'user,history\n7,"Heat\n8,Up\n', "line 2: the quotes"),
    ],
)
def test_unusable_files_are_errors(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_histories(tmp_path / name)


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
