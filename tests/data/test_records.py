"""Records and shards equal what protobuf and TFDS' own reader have of the same rows."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.core.features import FeaturesDict, Tensor
from tensorflow_datasets.proto import tf_example_pb2

from tca4rec_jax.data import tfds_rec
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.records import records, write_shard
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData
from tca4rec_jax.data.tfds_rec import builder

FEATURES = FeaturesDict(
    {"user": np.int32, "items": Tensor(shape=(None,), dtype=np.int32)}
    | {"timestamps": Tensor(shape=(None,), dtype=np.int64)}
)


def made_rows(lengths, seed, liked=False):
    """Rows whose values have every number of bytes; -1 among the times."""
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    items = rng.integers(0, 1 << rng.integers(1, 32, count))
    times = rng.integers(-1, 1 << rng.integers(1, 60, count))
    users = rng.integers(0, 1 << rng.integers(1, 32, len(lengths)))
    flags = rng.random(count) > 0.5 if liked else None
    return ItemSequences(users, items, np.cumsum([0, *lengths]), times, flags)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(0, 999), st.booleans())
def test_records_equal_those_of_protobuf(lengths, seed, liked):
    rows = made_rows(lengths, seed, liked)
    found = [*records(rows)]
    assert len(found) == len(rows)
    for row, record in enumerate(found):
        part = slice(*rows.offsets[row : row + 2])
        example = tf_example_pb2.Example()
        feature = example.features.feature
        feature["user"].int64_list.value.append(rows.user[row])
        feature["items"].int64_list.value.extend(rows.items[part])
        feature["timestamps"].int64_list.value.extend(rows.timestamps[part])
        if liked:
            feature["liked"].int64_list.value.extend(rows.liked[part].astype(int))
        assert record == example.SerializeToString(deterministic=True)


def test_a_full_disk_is_an_error_of_the_system_that_names_the_file():
    with pytest.raises(OSError, match=r"No space left") as raised:
        write_shard(made_rows([3] * 9, 0), Path("/dev/full"))
    assert raised.value.filename == "/dev/full"


def test_what_tfds_would_write_says_the_same():
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    rows = made_rows([3, 1, 40], 0)
    serializer = ExampleSerializer(FEATURES.get_serialized_info())
    for row, record in enumerate(records(rows)):
        part = slice(*rows.offsets[row : row + 2])
        example = {"user": rows.user[row], "items": rows.items[part]}
        example["timestamps"] = rows.timestamps[part]
        theirs = serializer.serialize_example(FEATURES.encode_example(example))
        parsed = (tf_example_pb2.Example.FromString(one) for one in (record, theirs))
        assert len(record) == len(theirs)
        assert next(parsed) == next(parsed)


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_share_the_rows_and_are_read_as_one(workers, tmp_path, monkeypatch):
    ids = tuple("abcdefghi")
    splits = {}
    for seed, name in enumerate(SPLITS):
        rows = made_rows([5] * 40, seed)
        splits[name] = dataclasses.replace(rows, items=rows.items % len(ids))
    monkeypatch.setattr(builder, "_ITEMS_OF_A_SHARD", 64)
    monkeypatch.setattr(builder.os, "sched_getaffinity", lambda _: range(workers))
    tfds_rec.write(RecData(Catalogue(ids, ids), splits), tmp_path)
    read = tfds_rec.read(tmp_path)
    for name in SPLITS:
        assert read.splits[name].content_hash() == splits[name].content_hash()
        assert len([*tmp_path.rglob(f"*-{name}.array_record*")]) == 4


@pytest.mark.parametrize("liked", [False, True])
def test_a_split_is_read_in_little_more_memory_than_its_arrays(liked, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "_READ_AT_ONCE", 64)
    rows = made_rows([1, *[200] * 600], 0, liked)
    rows = dataclasses.replace(rows, items=rows.items % 9)
    catalogue = Catalogue(tuple("abcdefghi"), tuple("abcdefghi"))
    tfds_rec.write(RecData(catalogue, dict.fromkeys(SPLITS, rows)), tmp_path)
    read = tfds_rec.read(tmp_path)
    read.splits["train"]  # what is made once
    tracemalloc.start()
    found = read.splits["test"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.content_hash() == rows.content_hash()
    assert peak < 25 * rows.items.size  # int32 and int64 are 12 bytes an item
