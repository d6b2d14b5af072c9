"""Recommendations for files of histories, on a tiny random model and catalogue."""

import json
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from forked import Script
from tiny_catalogue import changed
from tiny_workdir import make_workdir

from tca4rec_jax.decoding.histories import Histories
from tca4rec_jax.decoding.recommend_file import recommend_file
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.decoding.search_programs import read_prompts, search_batch
from tca4rec_jax.errors import UserError
from tca4rec_jax.lease import LeaseError, only_writer
from tca4rec_jax.provenance import StaleError

LAUNCH = Path(__file__).parents[2] / "launch"


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
    assert [*Histories(table).rows()] == [{"user": "7", "history": ["i1", "9"]}]


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
    with pytest.raises(ValueError, match=r"in\.jsonl, row 6, history: 'nope' is no item id"):
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
        list(Histories(tmp_path / name).rows())


def write_parquet(path, rows, **how):
    pa.parquet.write_table(pa.table(rows), path, **how)
    return path


def test_parquet_is_read_in_parts_from_any_row(tmp_path):
    rows = {"history": [[f"i{n}", "x"] for n in range(10)], "user": list(range(10))}
    source = Histories(write_parquet(tmp_path / "in.parquet", rows, row_group_size=3))
    assert len(source) == 10
    for start in range(11):
        users = [(row["user"], row["history"][0]) for row in source.rows(start)]
        assert users == [(n, f"i{n}") for n in range(start, 10)]
    assert [*source.rows(8, ["history"])] == [{"history": [f"i{n}", "x"]} for n in (8, 9)]


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ([["4", "2"]], ["4", "2"]),
        ([[4, 2]], ["4", "2"]),
        (["4 | 2"], ["4", "2"]),
        (pa.array(["4"]).dictionary_encode(), ["4"]),
        ([[]], None),
        ([None], None),
        ([["4", None]], None),
        ([[True]], None),
        ([7], None),
    ],
)
def test_a_history_in_parquet_is_a_list_or_a_text(tmp_path, column, found):
    source = Histories(write_parquet(tmp_path / "in.parquet", {"history": column}))
    if found is None:
        with pytest.raises(ValueError, match=r"in\.parquet, row 1: history is"):
            list(source.rows())
    else:
        assert [*source.rows()] == [{"history": found}]


def test_parquet_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no column 'history'; its columns are \['user'\]"):
        Histories(write_parquet(tmp_path / "a.parquet", {"user": [1]}))
    whole = write_parquet(tmp_path / "b.parquet", {"history": [["i1"]] * 5}).read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"c\.parquet cannot be read as a Parquet file"):
        Histories(tmp_path / "c.parquet")


def test_parquet_goes_on_and_keeps_all_columns(run, tmp_path, monkeypatch):
    recommender, output = Recommender(run, "any"), tmp_path / "out.parquet"
    days = pa.array(range(5), pa.date32())
    rows = {"day": days, "items": [1.5] * 5, "history": [[f"i{user}", "i4"] for user in range(5)]}
    source = write_parquet(tmp_path / "in.parquet", rows, row_group_size=2)
    recommend, calls = recommender.recommend, []

    def killed_in_the_second_part(histories, *args, **how):
        calls.append(histories)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return recommend(histories, *args, **how)

    monkeypatch.setattr(recommender, "recommend", killed_in_the_second_part)
    with pytest.raises(KeyboardInterrupt):
        recommend_file(recommender, source, output, k=3, chunk=2)
    assert not output.exists()
    recommend_file(recommender, source, output, k=3, chunk=2)
    assert [len(histories) for histories in calls] == [2, 2, 2, 1]  # none twice but the killed
    table = pa.parquet.read_table(output)
    assert table.column_names == ["day", "history", "items", "titles", "scores"]
    assert table["day"].combine_chunks() == days
    as_lines = tmp_path / "out.jsonl"
    recommend_file(recommender, source, as_lines, k=3, chunk=2)
    lines = [json.loads(line) for line in as_lines.read_text().splitlines()]
    assert lines[1]["day"] == "1970-01-02"  # JSON has no dates
    for line, row in zip(lines, table.to_pylist(), strict=True):
        assert (line["history"], line["items"], line["titles"]) == (
            row["history"], row["items"], row["titles"],
        )  # fmt: skip
        assert line["scores"] == pytest.approx(row["scores"], abs=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.parquet", "out.parquet", "out.parquet.provenance.json",
        "out.jsonl", "out.jsonl.provenance.json",
    }  # fmt: skip
    made = output.stat().st_mtime_ns
    recommend_file(recommender, source, output, k=3)
    assert output.stat().st_mtime_ns == made
    with pytest.raises(StaleError, match=r"out\.parquet: .* k was 3, is 2\."):
        recommend_file(recommender, source, output, k=2)


def test_json_that_no_column_holds_is_refused_before_the_search(run, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"history": ["i1"], "user": 1}\n{"history": ["i1"], "user": "a"}\n')
    recommender = Recommender(changed(run, inference_decoder=None), "any")
    with pytest.raises(ValueError, match=r"in\.jsonl, row 2: user is 'a', expected"):
        recommend_file(recommender, source, tmp_path / "out.parquet", k=3)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("name", ["out.parquet.gz", "out.jsonl.gz", "out.csv", "out"])
def test_an_output_that_would_not_be_what_its_name_says_is_refused(run, tmp_path, name):
    source = tmp_path / "in.jsonl"
    source.write_text('{"history": ["i1"]}\n')
    recommender = Recommender(changed(run, inference_decoder=None), "any")
    with pytest.raises(UserError, match=rf"{name}: expected .* with .jsonl, .parquet or .pq, as"):
        recommend_file(recommender, source, tmp_path / name, k=3)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


CONFIG_FILE = """
from pathlib import Path

from tiny_workdir import make_config


def get_config(path):
    return make_config(Path(path), "any")
"""


def test_two_processes_recommend_to_the_same_file_as_one(tmp_path):
    make_workdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG_FILE)
    histories = [[n % 12, (7 * n) % 11, (n // 12) % 5][: 1 + n % 3] for n in range(602)]
    source = write_parquet(tmp_path / "in.parquet", {"history": histories}, row_group_size=100)
    command = [str(LAUNCH / "recommend.py"), f"--config={tmp_path / 'config.py'}:{tmp_path}"]
    command += [f"--workdir={tmp_path}", f"--input={source}", "--untrained", "--guidance=0.5"]
    command += ["--k=2"]

    def start(name, devices, *flags):
        return Script([*command, f"--output={tmp_path / name}", *flags], {}, devices=devices)

    done = start("one.parquet", 2).completed(120)
    assert done.returncode == 0, done.stderr
    whole, about = tmp_path / "one.parquet", (tmp_path / "one.parquet.provenance.json").read_text()
    (tmp_path / "two.parquet.provenance.json").write_text(about)
    with (tmp_path / "two.parquet.unfinished").open("w") as file:  # killed in its second chunk
        for row in pa.parquet.read_table(whole).slice(0, 300).to_pylist():
            lists = {"items": row["items"], "titles": row["titles"]}
            file.write(json.dumps(lists | {"scores": [round(x, 5) for x in row["scores"]]}) + "\n")
        file.write('{"items": ["3')
    with socket.socket() as one:
        one.bind(("localhost", 0))
        job = [f"--coordinator=localhost:{one.getsockname()[1]}", "--process_count=2"]
    both = [start("two.parquet", 1, *job, f"--process_index={index}") for index in "01"]
    done = [script.completed(120) for script in both]
    errors = "\n".join(script.stderr for script in done)  # one's end is the other's error
    assert [script.returncode for script in done] == [0, 0], errors
    assert (tmp_path / "two.parquet").read_bytes() == whole.read_bytes()
    assert not (tmp_path / "two.parquet.unfinished").exists()
