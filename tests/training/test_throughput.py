"""Peaks and what a token attends to; the loop's log, speed and profiler window."""

import contextlib
import functools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tca4rec_jax.distributed.sharding import make_mesh
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.training import loop, throughput
from tca4rec_jax.training.log import TrainingLog
from tca4rec_jax.training.loop import LoopOptions, run_loop
from tca4rec_jax.training.state import Metrics, TrainState
from tca4rec_jax.training.throughput import Peak, mean_context, measured_peak, peak_flops


def test_a_known_device_has_its_data_sheet_peak():
    device = types.SimpleNamespace(device_kind="TPU v5 lite")
    mesh = types.SimpleNamespace(devices=np.array([device] * 8), size=8)
    assert peak_flops(mesh, "bfloat16") == Peak(8 * 197e12, "data sheet")


def test_an_unknown_device_is_measured(monkeypatch):
    monkeypatch.setattr(throughput, "_SIZE", 64)
    monkeypatch.setattr(throughput, "_measured_once", functools.cache(measured_peak))
    mesh = make_mesh(1)
    first = peak_flops(mesh, "float32")
    assert first.source == "measured"
    # A product cannot have run faster than its time: more calls only find a better best.
    ticks = iter(np.arange(100) * 0.5)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(ticks))
    assert measured_peak(mesh, "float32") == 2 * 64**3 / 0.5
    assert peak_flops(make_mesh(1), "float32") == first  # of the next run of a process, too


def test_mean_context_by_counting():
    keys = [position + 1 for length in (3, 5) for position in range(length)]
    assert mean_context(np.array([3, 5])) == pytest.approx(np.mean(keys))


class FourTokenBatches:
    """Batches whose rows have four tokens in all."""

    def fill_cache(self, start, stop):
        pass

    def rows(self, index):
        return np.arange(3)

    def alone(self, index, row):
        return row

    def iterator(self, start, stop):
        return iter([None] * (stop - start))

    def tokens(self, index):
        return 4


class NoCheckpoints(contextlib.nullcontext):
    latest_step = None

    def save(self, *_):
        pass

    def check(self):
        pass

    def close(self):
        pass


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Six steps with a profiler that notes which steps were done when it is called."""
    done, calls = [], []

    def step(state, _):
        done.append(len(done))
        return state._replace(step=state.step + 1), Metrics(*jnp.ones(3))

    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda path: calls.append(("start", Path(path), len(done)))
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", len(done))))

    def run(profile_steps):
        options = LoopOptions(
            tmp_path,
            total_steps=6,
            checkpoint_every=100,
            inputs="",
            flops_per_token=3.0,
            peak=Peak(24.0, "measured"),
            profile_steps=profile_steps,
        )
        state = TrainState(jnp.zeros((), jnp.int32), {}, ())
        run_loop(step, state, FourTokenBatches(), NoCheckpoints(), options)
        return calls, [json.loads(line) for line in (tmp_path / "log.jsonl").open()]

    return run


def test_the_log_has_real_tokens_and_mfu(trained):
    calls, lines = trained((0, 0))
    assert calls == []
    assert [line["step"] for line in lines] == list(range(6))
    for line in lines:
        assert line["tokens"] == 4
        assert line["mfu"] == pytest.approx(3.0 * 4 / line["seconds"] / 24.0)


@pytest.mark.parametrize(("window", "stopped_after"), [((2, 4), 4), ((4, 100), 6)])
def test_the_profiler_records_its_window(trained, tmp_path, window, stopped_after):
    calls, _ = trained(window)
    assert calls == [("start", tmp_path / "profile", window[0]), ("stop", stopped_after)]


def test_the_watchdog_hears_of_every_row_that_is_tried_and_not_of_the_last_save(
    monkeypatch, tmp_path
):
    """A broken step of many rows, and a last checkpoint that is slow to write, are no hang."""
    noted = []

    class Noted(contextlib.nullcontext):
        def progress(self, step):
            noted.append(step)

        def __exit__(self, *_):
            noted.append("over")

    class Saves(NoCheckpoints):
        def close(self):
            noted.append("written")

    def run(loss):
        def step(state, _):
            return state._replace(step=state.step + 1), Metrics(*[loss] * 3)

        options = LoopOptions(tmp_path, 2, 100, "", 3.0, Peak(24.0, "measured"))
        state = TrainState(jnp.zeros((), jnp.int32), {}, ())
        run_loop(step, state, FourTokenBatches(), Saves(), options)

    monkeypatch.setattr(loop, "Watchdog", lambda *_: Noted())
    run(1.0)
    assert noted[-3:] == ["over", 2, "written"]
    noted.clear()
    with pytest.raises(FloatingPointError, match="every row of the batch is to blame"):
        run(np.nan)
    assert noted.count(0) == 3  # once for each row that was tried


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrainingLog(path, start=0, total_steps=2, ideal_seconds_per_token=1.0, name="train")
    metrics = Metrics(*[1.0] * len(Metrics._fields))
    with log:
        log.write(0, metrics, 8)
        log._file.close()
        log._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
        with pytest.raises(OSError, match=r"No space left .* start again.*log\.jsonl"):
            log.write(1, metrics, 8)
        log._file = None
    assert [line["step"] for line in read_json_lines(path)] == [0]
