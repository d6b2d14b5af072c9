"""A store is replaced by its manifest alone: there is always an old or a new one, and nobody's."""

import json
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import tensorstore as ts

from tca4rec_jax import fileio
from tca4rec_jax.cf import logits_format, logits_writer
from tca4rec_jax.cf.logits_export import export_stores
from tca4rec_jax.cf.logits_format import EXPORT, LogitsStoreError, Origin
from tca4rec_jax.cf.logits_store import open_store
from tca4rec_jax.cf.logits_writer import made_by, write_store
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData
from tca4rec_jax.lease import LeaseError

CATALOGUE = Catalogue(tuple("abcd"), tuple("ABCD"))
ROWS = ItemSequences(np.arange(3), np.arange(3), np.arange(4), np.full(3, -1))
DATA = RecData(CATALOGUE, dict.fromkeys(SPLITS, ROWS))


class Values:
    """Logits of one value; `before` is called when they are read."""

    shape = (3, 4)

    def __init__(self, value, before=lambda: None):
        self.value, self.before = value, before

    def __getitem__(self, rows):
        self.before()
        return np.full(self.shape, self.value, np.float32)[rows]


def write(place, value, before=lambda: None):
    write_store(place, ROWS, CATALOGUE, Origin("mine"), logits=Values(value, before))


def value_at(place):
    """The one value of a store that can be read."""
    (value,) = np.unique(open_store(place, ROWS, CATALOGUE).read(np.arange(3)))
    return value


def names_at(place):
    return sorted(key.decode().partition("/")[0] for key in keys_at(place))


def keys_at(place):
    return logits_format.key_values(place).list().result()


@pytest.fixture(params=["folder", "file URL", "bucket"])
def place(request, tmp_path, monkeypatch):
    """Where a store may lie; memory stands for a bucket."""
    if request.param == "folder":
        return tmp_path / "stores" / "s"
    if request.param == "file URL":
        return f"file://{tmp_path}/stores/s"
    open_, context = ts.KvStore.open, ts.Context()
    monkeypatch.setattr(ts.KvStore, "open", lambda spec: open_(spec, context=context))
    ts_open = ts.open
    monkeypatch.setattr(ts, "open", lambda *args, **kw: ts_open(*args, **{"context": context} | kw))
    cache = {"context": context}
    monkeypatch.setattr(ts, "Context", lambda spec=None: cache["context"])
    return "memory://stores/s"


def test_a_store_replaces_the_one_before_and_nothing_is_left_of_that(place):
    for value in (1.0, 2.0):
        write(place, value)
        assert value_at(place) == value
        assert len(set(names_at(place))) == 2  # the manifest and one folder


def test_until_the_new_store_is_complete_the_old_one_is_read(place):
    write(place, 1.0)
    write(place, 2.0, before=lambda: value_at(place) == 1.0 or pytest.fail("not the old one"))
    assert value_at(place) == 2.0


@pytest.mark.parametrize("error", [KeyboardInterrupt, LogitsStoreError])
def test_after_an_error_all_is_as_before(place, error):
    def fail():
        raise error

    for old in (None, 1.0):
        if old is not None:
            write(place, old)
        before = sorted(keys_at(place))
        with pytest.raises(error):
            write(place, 2.0, before=fail)
        assert sorted(keys_at(place)) == before
    assert value_at(place) == 1.0


def test_an_error_after_the_manifest_is_in_place_leaves_the_new_store(place, monkeypatch):
    write(place, 1.0)
    write_manifest = logits_writer._Place.write_manifest

    def no_answer(self, text, generation):
        written = write_manifest(self, text, generation)
        return written if b'"writing"' in text else pytest.fail("no answer")

    monkeypatch.setattr(logits_writer._Place, "write_manifest", no_answer)
    with pytest.raises(pytest.fail.Exception, match="no answer"):
        write(place, 2.0)
    assert value_at(place) == 2.0


@pytest.mark.parametrize("name", ["thesis.txt", "vectors/0.0", "manifest.json"])
def test_what_is_no_store_is_never_replaced(place, name):
    files = logits_format.key_values(place)
    files.write(name, b'{"format": 1}').result()
    with pytest.raises(LogitsStoreError, match=f"holds something other.*{name.partition('/')[0]}"):
        write(place, 1.0)
    assert files.read(name).result().value == b'{"format": 1}'
    with pytest.raises(LogitsStoreError, match="something other"):
        made_by(place)


def test_a_file_at_the_place_is_not_replaced(tmp_path):
    (tmp_path / "store").write_text("mine")
    with pytest.raises(LogitsStoreError, match="store is a file"):
        write(tmp_path / "store", 1.0)


def test_what_the_user_put_beside_the_arrays_stays(place):
    write(place, 1.0)
    files = logits_format.key_values(place)
    files.write("notes.txt", b"mine").result()
    write(place, 2.0)
    assert files.read("notes.txt").result().value == b"mine"


def test_a_store_of_the_earlier_format_is_refused_by_readers_and_replaced_by_writers(place):
    files = logits_format.key_values(place)
    manifest = {"format": 1, "rows_hash": "", "catalogue_hash": "", "cf_model": "SASRec"}
    files.write("manifest.json", json.dumps(manifest).encode()).result()
    for name in ("ids.npz", "vectors/.zarray", "item_table/0.0"):
        files.write(name, b"old").result()
    with pytest.raises(LogitsStoreError, match=r"format 2; run launch/train_cf\.py .*or import"):
        value_at(place)
    assert made_by(place) == ""
    write(place, 1.0)
    assert value_at(place) == 1.0
    assert len(set(names_at(place))) == 2


def test_of_two_writers_at_once_one_wins_and_the_other_says_so(place):
    write(place, 1.0)
    if isinstance(place, Path):  # a lease: the second is refused at once
        with pytest.raises(LeaseError, match="is being written by process"):
            write(place, 2.0, before=lambda: write(place, 3.0))
        assert value_at(place) == 1.0
    else:  # the first is refused when it is about to replace the manifest
        with pytest.raises(LogitsStoreError, match="another process has begun to write this store"):
            write(place, 2.0, before=lambda: write(place, 3.0))
        assert value_at(place) == 3.0
    assert len(set(names_at(place))) == 2


def test_a_reader_of_a_store_that_is_replaced_is_told(place):
    write(place, 1.0)
    store = open_store(place, ROWS, CATALOGUE, positions=np.zeros(0, np.int64))
    write(place, 2.0)
    with pytest.raises(LogitsStoreError, match="was replaced or damaged while it was read"):
        store.read(np.arange(3))


def test_a_store_is_exported_onto_itself(place):
    root = logits_format.store_path(place)
    write(logits_format.within(root, "train"), 1.0)
    export_stores(str(place), [str(place)], DATA, ["train"], weights=[3.0])
    train = logits_format.within(root, "train")
    assert value_at(train) == 3.0
    assert made_by(train) == EXPORT


def test_equal_values_have_equal_content_hashes(tmp_path):
    def content(value, **options):
        path = tmp_path / "s"
        write_store(path, ROWS, CATALOGUE, Origin("x"), logits=Values(value), **options)
        return open_store(path, ROWS, CATALOGUE).manifest["content_hash"]

    assert content(1.0) == content(1.0)
    assert len({content(1.0), content(2.0), content(1.0, dtype="bfloat16")}) == 3


def _write_again_and_again(place: str) -> None:
    logits_writer.temperature_statistics = lambda logits: {}  # no program to compile
    value = 0.0
    while True:
        write(Path(place), value := value + 1)
        Path(f"{place}.written").touch()


@pytest.fixture
def memory(tmp_path):
    """A folder in memory, where there is one: nothing waits for a disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_whenever_a_writer_is_killed_there_is_a_store(memory):
    for number in range(20):
        place, written = memory / str(number), memory / f"{number}.written"
        writer = forked.start(_write_again_and_again, str(place))
        while not written.exists() and writer.is_alive():
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.02))
        writer.kill()
        writer.join()
        assert value_at(place) > 0.0
        write(place, -1.0)
        assert value_at(place) == -1.0
        assert len(set(names_at(place))) == 2  # nothing is left of what was killed


def test_dense_logits_of_many_items_are_cut_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(logits_writer, "MANY_ITEMS", 3)
    monkeypatch.setattr(logits_writer, "TOP_K", 2)
    logits = np.array([[4, 1, 2, 3]] * 3, np.float32)
    for name, how, kept in (("cut", {}, 2), ("all", {"top_k": 4}, 4)):
        write_store(tmp_path / name, ROWS, CATALOGUE, Origin("mine"), logits=logits, **how)
        assert open_store(tmp_path / name, ROWS, CATALOGUE).arrays["values"].shape == (3, kept)
    vectors = {"vectors": logits[:, :2], "item_table": np.ones((4, 2), np.float32)}
    write_store(tmp_path / "factorised", ROWS, CATALOGUE, Origin("mine"), **vectors)
    assert open_store(tmp_path / "factorised", ROWS, CATALOGUE).kind == "factorised"


def test_logits_that_the_disk_has_no_room_for_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fileio.shutil, "disk_usage", lambda _: SimpleNamespace(free=47))
    with pytest.raises(ValueError, match=r"take 0\.00 GB: make room, or keep fewer with cf\.top_k"):
        write(tmp_path / "s", 1.0)
    assert not (tmp_path / "s").exists()
