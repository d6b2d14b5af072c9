"""results.jsonl: torn lines, two writers, what is read back."""

import multiprocessing

import numpy as np
import pytest

from tca4rec_jax.errors import UserError
from tca4rec_jax.experiments.results import (
    FILE,
    Cell,
    Line,
    RowRanks,
    append,
    read_lines,
    workdirs,
)


def line(number, **metrics):
    cell = Cell("d", "r", "cf", 0, alpha=0.1, seed=number, guidance=0.0)
    seconds = {"train": 1.0, "evaluate": 2.0}
    return Line(f"key{number}", cell, "test", 3, 2, metrics, "ranks/x.npz", seconds, 3.0, "m", {})


def test_a_line_is_read_as_it_was_written(tmp_path):
    assert read_lines(tmp_path) == {}
    append(tmp_path, line(0, **{"ndcg@10": 0.1}))
    assert list(read_lines(tmp_path).values()) == [line(0, **{"ndcg@10": 0.1})]
    append(tmp_path, line(0, **{"ndcg@10": 0.2}))
    assert list(read_lines(tmp_path).values()) == [line(0, **{"ndcg@10": 0.2})]


def test_lines_of_one_job_are_written_together(tmp_path):
    append(tmp_path, line(0))
    append(tmp_path, line(1), line(2))
    assert list(read_lines(tmp_path).values()) == [line(0), line(1), line(2)]


def test_the_torn_end_of_a_killed_writer_is_cut_off(tmp_path):
    append(tmp_path, line(0))
    whole = (tmp_path / FILE).read_bytes()
    for cut in (1, 20, len(whole) - 1):
        (tmp_path / FILE).write_bytes(whole + whole[:cut])
        assert list(read_lines(tmp_path).values()) == [line(0)]
        append(tmp_path, line(1))
        assert list(read_lines(tmp_path).values()) == [line(0), line(1)]


@pytest.mark.parametrize("damaged", [b'{"key": "k', b"3", b"", b"{}"])
def test_a_damaged_line_before_the_end_is_named(tmp_path, damaged):
    append(tmp_path, line(0))
    with (tmp_path / FILE).open("ab") as file:
        file.write(damaged + b"\n")
    append(tmp_path, line(1))
    with pytest.raises(UserError, match=r"results.jsonl, line 2 is damaged .*: delete it"):
        read_lines(tmp_path)


def _append(folder, first):
    for number in range(first, first + 20):
        append(folder, line(number))


def test_two_writers_lose_no_line(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(tmp_path, 20 * n)) for n in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert {key for key, _ in read_lines(tmp_path)} == {line(n).cell for n in range(40)}


def test_ranks_are_read_as_they_were_written(tmp_path):
    ranks = RowRanks(
        np.array([1, 1, 2], np.int32),
        np.array([4, 5, 6], np.int32),
        np.array([0, -1, 2], np.int32),
        np.array([[1, 5], [2, 1], [3, 1]], np.float32),
        np.zeros((3, 2), np.int32),
        np.arange(3),
        np.array([1.0, 2.0]),
    )
    ranks.write(tmp_path / "x.npz")
    for written, read in zip(ranks, RowRanks.read(tmp_path / "x.npz"), strict=True):
        np.testing.assert_array_equal(written, read)
    assert ranks.metrics((1,))["hr@1"] == 1 / 3
    assert ranks.metrics((1,))["nll per title"] == 2.0
    guided = ranks._replace(nll_RxT=np.full((3, 2), np.nan, np.float32))
    assert "nll per title" not in guided.metrics((1,))


def test_a_likelihood_is_given_at_the_temperature_that_is_asked_for(tmp_path):
    nll_RxT = np.array([[1, 2, 0.5], [3, 2, 1.5]], np.float32)
    rows = np.zeros(2, np.int32)
    temperatures = np.array([1.0, 1.25, 3.0])
    ranks = RowRanks(rows, rows, rows, nll_RxT, rows[:, None], rows, temperatures)
    assert ranks.best_temperature == 3.0
    assert [ranks.nll_R(at).tolist() for at in (1.25, 0.1)] == [[2, 2], [1, 3]]
    assert ranks.metrics((1,))["nll per title"] == 2.0
    assert ranks.metrics((1,), ranks.best_temperature)["nll per title"] == 1.0


def test_of_ranks_that_keep_one_likelihood_the_temperature_is_not_known(tmp_path):
    earlier = dict.fromkeys(("user_R", "target_R", "rank_R", "position_R"), np.arange(2))
    earlier |= {"nll_R": np.array([1, 2], np.float32), "items_RxM": np.zeros((2, 1), np.int32)}
    np.savez(tmp_path / "x.npz", **earlier)
    ranks = RowRanks.read(tmp_path / "x.npz")
    assert np.isnan(ranks.best_temperature)
    assert ranks.nll_R(1.25).tolist() == [1, 2]


def test_a_grid_has_a_work_directory_for_each_data_set(tmp_path):
    for name in ("one/data", "two/data", "ranks", "data"):
        (tmp_path / name).mkdir(parents=True)
    assert workdirs(tmp_path) == [tmp_path]
    append(tmp_path, line(0))
    assert workdirs(tmp_path) == [tmp_path / "one", tmp_path / "two"]
