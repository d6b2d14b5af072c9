"""Leases: one writer, the others are told who it is, and the dead hold nothing."""

import json
import os
import signal
import threading
import time

import forked
import pytest

from tca4rec_jax import lease
from tca4rec_jax.lease import Holder, LeaseError, holder_of, only_writer


def hold(path, ready, how_long=60.0):
    """Holds the lease in a process of its own; tells by a file that it does."""
    with only_writer(path):
        ready.write_text("")
        time.sleep(how_long)


@pytest.fixture
def other(tmp_path):
    """A process that holds the lease of tmp_path/run."""
    process = forked.start(hold, tmp_path / "run", tmp_path / "ready")
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def left(path, **changes):
    """A lease of `path` that someone left."""
    holder = Holder.this()._replace(**changes)
    path.with_name(f".{path.name}.lease").write_text(json.dumps(holder._asdict()))


def test_a_second_process_is_refused_in_one_line_that_names_the_first(tmp_path, other):
    with pytest.raises(LeaseError) as refused, only_writer(tmp_path / "run"):
        pass
    assert f"run is being written by process {other.pid} on " in str(refused.value)
    assert "\n" not in str(refused.value)
    assert holder_of(tmp_path / "run").process == other.pid


def test_what_a_killed_process_held_is_taken_over(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert holder_of(tmp_path / "run") is None
    with only_writer(tmp_path / "run"):
        assert holder_of(tmp_path / "run").process == os.getpid()
    assert not list(tmp_path.glob(".*"))


def test_it_is_released_after_an_error_and_can_be_held_again(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), only_writer(tmp_path / "new" / "run"):
            raise KeyError
    assert not list((tmp_path / "new").iterdir())


def test_of_one_process_too_only_one_block_writes(tmp_path):
    path = tmp_path / "run"
    with only_writer(path), pytest.raises(LeaseError), only_writer(path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "a"}'])
def test_a_damaged_lease_holds_nothing(tmp_path, text):
    (tmp_path / ".run.lease").write_text(text)
    with only_writer(tmp_path / "run"):
        pass


def test_a_process_of_the_same_number_that_began_later_is_another(tmp_path):
    left(tmp_path / "run", started="1")
    with only_writer(tmp_path / "run"):
        pass


def test_another_host_is_believed_while_it_touches_its_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_TOUCHED_EVERY", 0.1)
    monkeypatch.setattr(lease, "_SILENT", 0.5)
    left(tmp_path / "run", host="elsewhere")
    assert holder_of(tmp_path / "run").host == "elsewhere"
    touch = threading.Timer(0.2, os.utime, [tmp_path / ".run.lease"])
    touch.start()
    message = "run is being written by process .* on elsewhere, since"
    with pytest.raises(LeaseError, match=message), only_writer(tmp_path / "run"):
        pass
    touch.join()
    began = time.monotonic()
    with only_writer(tmp_path / "run"):
        assert time.monotonic() - began >= 0.5


def take_if_free(path, gate, won):
    """Waits for the gate, then holds the lease until the gate is gone; tells if it did."""
    while not gate.exists():
        time.sleep(0.001)
    try:
        with only_writer(path):
            (won / str(os.getpid())).write_text("")
            while gate.exists():
                time.sleep(0.01)
    except LeaseError:
        (won / f"{os.getpid()}.refused").write_text("")


def test_of_many_that_take_over_at_once_one_wins(tmp_path):
    won, gate = tmp_path / "won", tmp_path / "gate"
    won.mkdir()
    left(tmp_path / "run", started="1")
    processes = [forked.start(take_if_free, tmp_path / "run", gate, won) for _ in range(4)]
    time.sleep(0.3)
    gate.write_text("")
    deadline = time.monotonic() + 60
    while len(list(won.iterdir())) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len([name for name in won.iterdir() if name.suffix]) == 3
    gate.unlink()
    for process in processes:
        process.join(60)


def test_a_url_has_no_lease():
    with only_writer("gs://bucket/logits"), only_writer("gs://bucket/logits"):
        pass
