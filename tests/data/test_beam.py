"""Beam's pipeline writes the bytes that one machine writes."""

import errno
import importlib.util
import os
import signal
import sys
import tracemalloc
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from forked import Script

from tca4rec_jax import fileio
from tca4rec_jax.data import beam_rows, beam_sort, dataset
from tca4rec_jax.data.interactions import Interactions
from tca4rec_jax.data.records import write_shard
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.tfds_rec import builder
from tca4rec_jax.errors import UserError

ROOT = Path(__file__).parents[2]
HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not HAS_BEAM, reason="needs Apache Beam: launch/locks/beam.txt")
DIRECT = ["--runner=DirectRunner"]
FILTERS = {"user_core": 6, "item_core": 5, "min_rating": 2.0, "max_items": 30}


@pytest.fixture
def config(tmp_path):
    """Few users, items and times, so that ties and duplicates abound."""
    rng = np.random.default_rng(0)
    items, interactions = tmp_path / "items.csv", tmp_path / "interactions.csv"
    items.write_text("item,title\n" + "".join(f"i{n},Title {n // 2}\n" for n in range(40)))
    most_n = (rng.integers(1, most, 900) for most in (25, 40, 60, 6))
    rows = [f"u{u},i{i},{time},{stars}\n" for u, i, time, stars in zip(*most_n, strict=True)]
    interactions.write_text("user,item,timestamp,stars\n" + "".join(rows + rows[:50]))
    return {
        "source": "files",
        "catalogue": str(items),
        "interactions": str(interactions),
        "history_length": 4,
    }


@pytest.fixture
def many_parts(monkeypatch):
    """Parts, blocks and files so small that there are many of each."""
    for module, name, value in (
        (beam_sort, "_IN_A_PART", 200),
        (beam_sort, "_READ_AT_ONCE", 150),
        (beam_rows, "_ITEMS_AT_ONCE", 64),
        (beam_rows, "_COPIED_AT_ONCE", 50),
        (beam_rows, "_BLOCKS", 7),
        (builder, "_ITEMS_OF_A_SHARD", 300),
    ):
        monkeypatch.setattr(module, name, value)


def files_of(folder):
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items()}


@needs_beam
@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"drop_duplicates": True, "filters": FILTERS, "rating_column": "stars", "seed": 3},
        {"split_by": "leave_one_out", "rating_column": "stars", "filters": FILTERS},
        {"split_by": "ratio", "min_history": 2},
        {"source": "sequences", "split_by": "leave_one_out"},
    ],
)
def test_the_files_are_those_of_one_machine_byte_for_byte(config, fields, many_parts, tmp_path):
    config |= fields
    dataset.prepare(config, tmp_path / "one")
    dataset.prepare(config, tmp_path / "beam", DIRECT)
    one, beam = files_of(tmp_path / "one"), files_of(tmp_path / "beam")
    assert len([name for name in one if "array_record" in name]) > 8
    assert one.keys() == beam.keys()
    assert [name for name in one if one[name] != beam[name]] == []


@needs_beam
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"history_length": 100}, "0 interactions have 100 or more"),
        ({"history_length": 99, "min_history": 99, "split_by": "ratio"}, "the most interactions"),
    ],
)
def test_what_fills_no_split_is_refused_in_the_same_words(config, fields, message, tmp_path):
    said = []
    for beam in (None, DIRECT):
        with pytest.raises(UserError, match=message) as raised:
            dataset.prepare(config | fields, tmp_path / "data", beam)
        said.append(str(raised.value))
    assert said[0] == said[1]
    assert not (tmp_path / "data").exists()


def test_what_beam_does_not_do_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(beam_rows, "beam_module", lambda: None)
    config |= {"ties": "numbered", "samples": (1, 1, 1)}
    with pytest.raises(UserError, match="does not do data.ties=numbered, data.samples: leave"):
        dataset.prepare(config, tmp_path / "data", DIRECT)


@needs_beam
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runner=FooRunner"], "Unexpected pipeline runner: FooRunner"),
        (["--runner=foo.Runner"], "No module named 'foo'$"),
        ([*DIRECT, "--parallelism=x"], "argument --parallelism: invalid int value: 'x'$"),
        ([*DIRECT, "--help"], "without --help$"),
        (["--runner=DataflowRunner"], "Missing required option: project"),
    ],
)
def test_what_beam_refuses_is_said_before_the_source_is_read(
    config, options, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(dataset, "_read_source", None)
    with pytest.raises(UserError, match=f"^--beam_runner, --beam_options: .*{message}") as raised:
        dataset.prepare(config, tmp_path / "run" / "data", options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beam_options=--parallelism=2"], "--beam_options needs --beam_runner"),
        (
            ["--beam_runner=DirectRunner", "--beam_options=--name='open"],
            "--beam_options=--name='open: No closing quotation",
        ),
    ],
)
def test_flags_that_say_no_pipeline_are_refused(flags, message, tmp_path):
    command = [f"{ROOT}/launch/prepare_data.py", f"--config={ROOT}/configs/quickstart.py"]
    done = Script([*command, f"--workdir={tmp_path / 'run'}", *flags], dict(os.environ)).completed()
    assert (done.returncode, done.stderr) == (1, f"prepare_data: {message}\n")


def test_without_beam_its_extra_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"needs Apache Beam: install launch/locks/beam.txt"):
        dataset.prepare(config, tmp_path / "data", DIRECT)


@needs_beam
def test_a_signal_within_a_pipeline_raises_what_its_handler_does(
    config, tmp_path, monkeypatch, caplog
):
    def signalled(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(beam_sort, "_save_histories", signalled)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit) as stopped:
            dataset.prepare(config, tmp_path / "run" / "data", DIRECT)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert stopped.value.code == 143
    assert "while running" not in caplog.text
    assert [*(tmp_path / "run").iterdir()] == []


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    user = np.zeros(100, np.int32)
    interactions = Interactions(user, user, np.arange(100), (), np.zeros(100, np.float32))
    num_bytes = 2 * 2000 + 2 * 400  # two times the columns, the shuffle, the places
    disk = SimpleNamespace(free=num_bytes - 1)
    monkeypatch.setattr(fileio.shutil, "disk_usage", lambda _: disk)
    with pytest.raises(UserError, match=r"sorted parts take .*: make room, or take a"):
        beam_sort.save_given(interactions, 0, tmp_path / "histories")
    assert not (tmp_path / "histories").exists()
    disk.free += 1
    beam_sort.save_given(interactions, 0, tmp_path / "histories")


@needs_beam
def test_a_full_disk_within_a_pipeline_is_said_in_one_line(config, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "users-0/item.npy")

    monkeypatch.setattr(beam_sort, "_save_histories", full)
    message = r"histories: a worker of Beam failed there: \[Errno 28\] No space .*item\.npy.* room"
    with pytest.raises(UserError, match=message) as raised:
        dataset.prepare(config, tmp_path / "run" / "data", DIRECT)
    assert "\n" not in str(raised.value)
    assert [*(tmp_path / "run").iterdir()] == []


@needs_beam
def test_the_interactions_are_let_go_of_before_the_rows_are_written(config, tmp_path, monkeypatch):
    read, columns = dataset._read_source, []

    def reading(*args):
        found = read(*args)
        columns.append(weakref.ref(found.interactions.item))
        return found

    def writing(*_):
        raise LookupError("let go of" if columns[0]() is None else "held")

    monkeypatch.setattr(dataset, "_read_source", reading)
    monkeypatch.setattr(beam_rows, "_write_shards", writing)
    with pytest.raises(LookupError, match="let go of"):
        dataset.prepare(config, tmp_path / "data", DIRECT)


@needs_beam
def test_every_pipeline_keeps_what_it_adds_up_in_a_file_of_its_own(tmp_path, monkeypatch):
    kept, paths = beam_sort.kept, []

    def noting(measured, path):
        paths.append(path)
        kept(measured, path)

    monkeypatch.setattr(beam_sort, "kept", noting)
    workers = beam_sort.Workers(tuple(DIRECT), tmp_path)
    for numbers in ([1, 2], [3, 4]):
        found = beam_sort.combined(workers, numbers, lambda number: {"sum": number})
        assert found == {"sum": sum(numbers)}
    assert len({*paths}) == 2
    assert [*tmp_path.iterdir()] == []


def test_a_file_is_written_in_little_more_memory_than_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(beam_rows, "_COPIED_AT_ONCE", 1 << 12)
    rng = np.random.default_rng(0)
    count, length = 2000, 100
    columns = rng.integers(0, 9, (2, count * length))
    offsets = np.arange(count + 1) * length
    rows = ItemSequences(np.arange(count), columns[0], offsets, columns[1])
    keyed = np.array_split(rng.permutation(count), 30)  # the keys are the rows' numbers
    found = [(key_R, rows.take(key_R)) for key_R in keyed]
    size = write_shard(rows, tmp_path / "expected")  # and makes what is made once
    tracemalloc.start()
    written = beam_rows._write_file(str(tmp_path / "found"), found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written == {"sizes": [(str(tmp_path / "found"), size)]}
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
    assert peak < 8 * rows.num_items  # a row's copy is 12 bytes an item
