"""Tables, and results as JSON."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from tca4rec_jax.metrics import Interval
from tca4rec_jax.reporting import console_table, markdown_table, write_results

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


def test_console_table_shows_the_same_cells():
    out = io.StringIO()
    Console(file=out, width=120).print(console_table(ROWS, title="Test rows", digits=3))
    for cell in ("Test rows", "SASRec", "0.058 [0.050, 0.066]", "812.000", "60"):
        assert cell in out.getvalue()


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
        console_table({}, title="none")
