"""Tables of the same rows are compared, others refused with what differs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from forked import Script

from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.compare import compare_results
from tca4rec_jax.evaluation.kept_rankings import KeptRankings
from tca4rec_jax.evaluation.rankings import EvaluationRows, ModelRanking
from tca4rec_jax.intervals import bootstrap_intervals, randomisation_test
from tca4rec_jax.metrics import hit_rate, ndcg
from tca4rec_jax.provenance import Provenance

ROOT = Path(__file__).parents[2]
ROWS, TEMPERATURES = 60, (1.0, 2.0)
INPUTS = {
    "rows": "r",
    "titles": "t",
    "compared": {"allowed items": "a"},
    "evaluation.cutoffs": (1, 10),
}


def ranking(seed, *, guided=False):
    rng = np.random.default_rng(seed)
    nll_RxT = np.full((ROWS, 2), np.nan) if guided else rng.random((ROWS, 2))
    ranks = rng.integers(-1, 14, (2, ROWS)).astype(np.int32)
    return ModelRanking(np.zeros((ROWS, 1), np.int32), *ranks, nll_RxT.astype(np.float32))


def rows(target=0, history=1):
    """Of 20 users with three rows each."""
    items = np.tile([history, 2], ROWS)
    items[1] = target
    split = ItemSequences(
        np.arange(ROWS) // 3, items, np.arange(0, 2 * ROWS + 1, 2), np.arange(2 * ROWS)
    )
    return EvaluationRows("test", split, split.last_positions, *split.histories_and_targets(1))


def write_table(folder, rankings, *, of=None, **inputs):
    folder.mkdir(exist_ok=True)
    made_from = Provenance("evaluation", "", INPUTS | inputs)
    of = rows() if of is None else of
    KeptRankings.of(folder, made_from, of, rankings, TEMPERATURES).write()
    return folder


def test_models_of_one_table_are_compared_to_a_baseline(tmp_path, capsys):
    models = {"CF model": ranking(0), "LLM": ranking(1), "guided": ranking(2, guided=True)}
    folder = write_table(tmp_path / "a", models)
    found = compare_results([folder], cutoffs=(1, 10), seed=3, output=tmp_path / "out")
    assert found["baseline"] == "CF model"
    assert list(found["models"]) == ["LLM", "guided"]
    names = ["hr@1", "ndcg@1", "hr@10", "ndcg@10", "nll per title"]
    assert [list(one) for one in found["models"].values()] == [names, names[:-1]]
    cf, llm, user_R = models["CF model"], models["LLM"], np.arange(ROWS) // 3
    gains = {"hr@10": hit_rate(llm.rank_R, 10) - hit_rate(cf.rank_R, 10)}
    gains["ndcg@10"] = ndcg(llm.rank_R, 10) - ndcg(cf.rank_R, 10)
    gains["nll per title"] = llm.best_nll(TEMPERATURES)[1] - cf.best_nll(TEMPERATURES)[1]
    intervals = bootstrap_intervals(gains, user_R, seed=3)
    p_values = randomisation_test(gains, user_R, seed=3)
    for name in gains:
        one = found["models"]["LLM"][name]
        assert one["difference"] == pytest.approx(intervals[name])
        assert one["p"] == p_values[name]
        assert one["p"] <= one["p_holm"] <= 1
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert saved["models"]["LLM"]["hr@10"]["p"] == p_values["hr@10"]
    assert saved["provenance"]["inputs"]["baseline"] == "CF model"
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "Differences from CF model: 60 rows of 20 users" in text
    assert (
        f"| guided: NDCG@10 | {found['models']['guided']['ndcg@10']['difference'].mean:.4f}" in text
    )
    assert "guided: NLL" not in text


def test_hits_by_title_have_differences_of_their_own(tmp_path):
    models = {"a": ranking(0), "b": ranking(1)}
    folder = write_table(tmp_path / "a", models)
    found = compare_results([folder], hits="title")["models"]["b"]["hr@10"]["difference"].mean
    expected = hit_rate(models["b"].title_rank_R, 10) - hit_rate(models["a"].title_rank_R, 10)
    assert found == pytest.approx(expected.mean())


def test_titles_that_were_compared_in_two_ways_are_refused_for_hits_by_title(tmp_path):
    a = write_table(tmp_path / "a", {"LLM": ranking(0)})
    b = write_table(tmp_path / "b", {"LLM": ranking(1)}, **{"evaluation.text_match": True})
    c = write_table(tmp_path / "c", {"LLM": ranking(2)}, **{"evaluation.text_match": None})
    assert compare_results([a, b])["models"]  # by item they are the same
    assert compare_results([a, c], hits="title")["models"]
    with pytest.raises(UserError, match=r"the same way to compare titles \(evaluation.text_match"):
        compare_results([a, b], hits="title")


def test_models_of_several_work_directories_are_compared(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    write_table(a, {"Most popular": ranking(0), "LLM": ranking(1)})
    write_table(b, {"Most popular": ranking(0), "LLM": ranking(2)}, **{"CF logits": "others"})
    found = compare_results([a, b], labels=["LLM"])
    assert (found["baseline"], list(found["models"])) == (f"{a}: LLM", [f"{b}: LLM"])
    # "Most popular" is the same in both: there is nothing to test.
    found = compare_results([a, b], baseline=f"{b}: LLM")
    assert list(found["models"]) == [f"{a}: Most popular", f"{a}: LLM"]
    with pytest.raises(UserError, match=r"no table has a model 'LMM': there are .*'LLM'"):
        compare_results([a, b], labels=["LMM"])
    assert compare_results([a, b], baseline="Most popular")["baseline"] == f"{a}: Most popular"
    found = compare_results([a, b], labels=[f"{b}: Most popular", "LLM"])
    assert found["baseline"] == f"{a}: LLM"
    assert list(found["models"]) == [f"{b}: Most popular", f"{b}: LLM"]
    found = compare_results([a, b], labels=["LLM"], baseline="Most popular")  # besides the labels
    assert (found["baseline"], len(found["models"])) == (f"{a}: Most popular", 2)
    for baseline in ("LLM", "LMM"):
        with pytest.raises(UserError, match=rf"needs one baseline \('{baseline}'\) and another"):
            compare_results([a, b], baseline=baseline)
    with pytest.raises(UserError, match=r"baseline \('the first'\) and another model: there are"):
        compare_results([a], labels=["LLM"])
    with pytest.raises(UserError, match="--cutoff is 20, but the lists were evaluated up to 10"):
        compare_results([a, b], cutoffs=[20])


@pytest.mark.parametrize(
    ("inputs", "of", "said"),
    [
        ({"rows": "s"}, rows(target=4), r"rows \(row 0 is user 0, item 0 here and user 0, item 4"),
        ({"rows": "s"}, rows(history=5), r"rows \(of the same users and targets, with other hist"),
        ({"candidates": "c"}, None, "the same candidates: evaluate both alike"),
        ({"titles": "u"}, None, "the same items or their titles"),
        (
            {"compared": {"allowed items": "b"}, "titles": "u"},
            None,
            r"their titles, nor the same items that may be recommended \(allow, deny, history, ti",
        ),
    ],
)
def test_other_rows_filters_and_candidates_are_refused(tmp_path, inputs, of, said):
    a = write_table(tmp_path / "a", {"LLM": ranking(0)})
    b = write_table(tmp_path / "b", {"LLM": ranking(1)}, of=of, **inputs)
    with pytest.raises(UserError, match=f"a and .*b cannot be compared, .*{said}"):
        compare_results([a, b])


def test_fewer_rows_are_counted(tmp_path):
    a = write_table(tmp_path / "a", {"LLM": ranking(0)})
    some = KeptRankings.read(a)
    made_from = dataclasses.replace(some.made_from, inputs=some.made_from.inputs | {"rows": "s"})
    few = dataclasses.replace(
        some, made_from=made_from, user_R=some.user_R[:9], target_R=some.target_R[:9]
    )
    with pytest.raises(UserError, match="60 and 9 of them"):
        some.check_same_rows(few)


def test_a_folder_without_rankings_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="has no rankings.npz: give a work directory"):
        compare_results([tmp_path])
    folder = write_table(tmp_path / "a", {"LLM": ranking(0)})
    np.savez(folder / "rankings.npz", labels=np.array(["LLM"]))
    with pytest.raises(UserError, match=r"rankings.npz lacks .*'provenance'.* make it anew"):
        compare_results([folder])
    (folder / "rankings.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="rankings.npz"):
        compare_results([folder])


def test_the_script(tmp_path):
    models = {"CF model": ranking(0), "LLM, a": ranking(1), "LLM, b": ranking(2)}
    folder = write_table(tmp_path / "a", models)
    command = [f"{ROOT}/launch/compare.py", f"--results={folder}", "--model=LLM, a"]
    done = Script([*command, "--model=CF model", "--cutoff=1", "--cutoff=3"], {}).completed()
    assert done.returncode == 0, done.stderr
    assert "Differences from CF model: 60 rows of 20 users, hits by item" in done.stdout
    assert "LLM, a: NDCG@3" in done.stdout
    assert "LLM, b" not in done.stdout
    alone = Script(command, {}).completed()
    assert (alone.returncode, alone.stderr.count("\n")) == (1, 1)
    assert "compare: a difference needs one baseline" in alone.stderr
