"""Tables, and results as JSON."""

import json

import numpy as np
import pytest

from tca4rec_jax.intervals import Interval
from tca4rec_jax.reporting import (
    markdown_table,
    picture_text,
    show,
    show_table,
    write_results,
)
from tca4rec_jax.terminal import plain_text

ROWS = {
    "SASRec": {"ndcg@10": Interval(0.058, 0.05, 0.0661), "users/s": 812.0},
    "LLM | alpha=0": {"ndcg@10": Interval(0.019, 0.01, 0.03), "steps": 60},
}


def test_markdown_table_has_every_column_and_dashes_for_gaps():
    assert markdown_table(ROWS, first_column="model", digits=3).splitlines() == [
        "| model | ndcg@10 | users/s | steps |",
        "| --- | ---: | ---: | ---: |",
        "| SASRec | 0.058 [0.050, 0.066] | 812.000 | - |",
        "| LLM \\| alpha=0 | 0.019 [0.010, 0.030] | - | 60 |",
    ]


def test_the_console_shows_the_same_cells(capsys):
    markdown = show_table(ROWS, title="Test rows", digits=3)
    assert markdown == "Test rows\n\n" + markdown_table(ROWS, digits=3)
    shown = capsys.readouterr().out
    for cell in ("Test rows", "SASRec", "0.058 [0.050, 0.066]", "812.000", "60"):
        assert cell in shown


def test_a_wide_table_is_cut_between_columns(capsys):
    rows = {"LLM, guided": {f"metric {number}": 0.123456 * number for number in range(12)}}
    show_table(rows, title="Wide")
    title, *lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    headers = [line.split("metric") for line in lines if "metric" in line]
    assert [int(number) for _, *numbers in headers for number in numbers] == list(range(12))
    assert len(headers) == 2
    assert sum(line.startswith("LLM, guided ") for line in lines) == 2


WRITTEN = ("Abbey Road [remastered]", "[/disc 1]", ":fire:", "Amélie 🔥", r"[b]\n $x_1$", "x" * 300)


@pytest.mark.parametrize("text", WRITTEN)
def test_what_a_user_wrote_is_shown_as_it_is(text, capsys):
    show(text)
    assert capsys.readouterr().out == text + "\n"
    show_table({text: {text: text}}, title=text)
    assert capsys.readouterr().out.count(text) == 4
    assert plain_text(text) == text


def test_control_characters_are_shown_and_not_obeyed(capsys):
    text = "\x1b[31mred\x1b\x07 \r\n\x9b2J\u202eabc\ud800"
    seen = r"\x1b[31mred\x1b\x07 \r\n\x9b2J\u202eabc\ud800"
    show(text)
    show_table({text: {text: text}}, title=text)
    shown = capsys.readouterr().out
    assert shown.count(seen) == 5
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert seen in markdown_table({text: {"a": 1}})


def test_labels_in_pictures_are_no_formulas():
    assert picture_text(r"$5 and $\frac$") == r"\$5 and \$\frac\$"
    assert picture_text("_hidden").strip() == "_hidden"


def test_results_survive_the_way_through_json(tmp_path):
    path = tmp_path / "run" / "results.json"
    results = {"test": ROWS, "count": np.int64(3), "hr": np.float32(0.5), "ranks": np.arange(3)}
    write_results(path, results)
    read = json.loads(path.read_text())
    assert read["test"]["SASRec"]["ndcg@10"] == {"mean": 0.058, "low": 0.05, "high": 0.0661}
    assert (read["count"], read["hr"], read["ranks"]) == (3, 0.5, [0, 1, 2])
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_bad_results_are_named_and_leave_the_old_file_alone(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, {"a": 1})
    with pytest.raises(ValueError, match=r"result test\.nll is nan"):
        write_results(path, {"test": {"nll": float("nan")}})
    with pytest.raises(TypeError, match=r"result model\.0 is a object"):
        write_results(path, {"model": [object()]})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_table_without_rows_is_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        markdown_table({})
    with pytest.raises(ValueError, match="at least one row"):
        show_table({}, title="none")
