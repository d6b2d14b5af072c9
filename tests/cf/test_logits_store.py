import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from tca4rec_jax.cf import logits_format
from tca4rec_jax.cf.logits_format import LogitsStoreError, Origin
from tca4rec_jax.cf.logits_store import made_from_of, open_store, read_manifest
from tca4rec_jax.cf.logits_writer import write_store
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.errors import UserError

CATALOGUE = Catalogue(tuple("abcdef"), tuple("ABCDEF"))
ROWS = ItemSequences(
    np.arange(3),
    np.array([0, 1, 2, 3, 4, 5, 0, 1, 2]),
    np.array([0, 4, 6, 9]),
    np.full(9, -1),
)
NUM_POSITIONS, NUM_ITEMS, WIDTH = 9, 6, 4


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def factorised(rng):
    return {
        "vectors": rng.normal(size=(NUM_POSITIONS, WIDTH)).astype(np.float32),
        "item_table": rng.normal(size=(NUM_ITEMS, WIDTH)).astype(np.float32),
        "item_bias": rng.normal(size=NUM_ITEMS).astype(np.float32),
    }


@pytest.fixture
def store_path(tmp_path, factorised):
    path = tmp_path / "store"
    write_store(path, ROWS, CATALOGUE, **factorised, origin=Origin("SASRec", history_length=10))
    return path


def edit_manifest(path, **changes):
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def array_at(path, name):
    """The folder of an array of the store at a path."""
    return next(path.glob("values_*")) / name


def overwrite(path, name, index, value):
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{array_at(path, name)}/"}}
    ts.open(spec, open=True).result()[index].write(value).result()


def test_factorised_round_trip(store_path, factorised):
    store = open_store(store_path, ROWS, CATALOGUE)
    positions = np.array([8, 0, 3, 3])
    assert store.kind == "factorised"
    assert store.manifest["cf_model"] == "SASRec"
    np.testing.assert_array_equal(store.read(positions), factorised["vectors"][positions])
    np.testing.assert_array_equal(store.item_table, factorised["item_table"])
    np.testing.assert_array_equal(store.item_bias, factorised["item_bias"])
    expected = factorised["vectors"][positions] @ factorised["item_table"].T
    expected = expected + factorised["item_bias"][None, :]
    np.testing.assert_allclose(store.logits(positions), expected, rtol=1e-5)
    assert store.read(np.zeros(0, np.int64)).shape == (0, WIDTH)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1], ids=["one chunk", "a chunk per event"])
def test_dense_round_trip_over_chunks_and_blocks(tmp_path, rng, monkeypatch, chunk_bytes):
    monkeypatch.setattr(logits_format, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(logits_format, "_BLOCK_BYTES", 4 * NUM_ITEMS * 2)
    logits = rng.normal(size=(NUM_POSITIONS, NUM_ITEMS))
    write_store(tmp_path / "dense", ROWS, CATALOGUE, logits=logits, origin=Origin("mine"))
    store = open_store(tmp_path / "dense", ROWS, CATALOGUE)
    assert store.kind == "dense"
    assert store.item_table is None
    positions = np.array([5, 1, 7])
    np.testing.assert_array_equal(store.read(positions), logits[positions].astype(np.float32))
    np.testing.assert_array_equal(store.logits(positions), store.read(positions))


def test_one_event_per_row_stands_for_the_last_items(tmp_path, rng):
    logits = rng.normal(size=(3, NUM_ITEMS)).astype(np.float32)
    write_store(tmp_path / "rows", ROWS, CATALOGUE, logits=logits, origin=Origin("mine"))
    store = open_store(tmp_path / "rows", ROWS, CATALOGUE)
    np.testing.assert_array_equal(store.read(ROWS.last_positions[[2, 0]]), logits[[2, 0]])
    with pytest.raises(LogitsStoreError, match="flat position 4 lies earlier in row 1"):
        store.read(np.array([3, 4]))


@pytest.mark.parametrize("position", [-1, NUM_POSITIONS])
def test_positions_outside_the_rows_are_errors(store_path, position):
    store = open_store(store_path, ROWS, CATALOGUE)
    with pytest.raises(LogitsStoreError, match=f"flat position {position} is not one of the 9"):
        store.read(np.array([0, position]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_writing_a_value_that_is_not_finite_names_file_and_row(tmp_path, factorised, value):
    factorised["vectors"][5, 2] = value
    message = r"store/vectors: event 5 \(row 1 of the data, position 1\), column 2 is"
    with pytest.raises(LogitsStoreError, match=message):
        write_store(tmp_path / "store", ROWS, CATALOGUE, **factorised, origin=Origin("SASRec"))
    assert not (tmp_path / "store").exists()


def test_what_float32_cannot_hold_is_reported(tmp_path):
    logits = np.zeros((3, NUM_ITEMS))
    logits[2, 1] = 1e300
    with pytest.raises(
        LogitsStoreError, match=r"logits: event 2 \(row 2 of the data\), column 1 is"
    ):
        write_store(tmp_path / "store", ROWS, CATALOGUE, logits=logits, origin=Origin("mine"))


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("vectors", (8, 3), r"vectors: event 8 \(row 2 of the data, position 2\), column 3 is nan"),
        ("item_table", (2, 0), r"item_table: item 2, column 0 is nan"),
        ("item_bias", 4, r"item_bias: item 4 is nan"),
    ],
)
def test_opening_a_store_finds_nan(store_path, name, index, message):
    overwrite(store_path, name, index, np.nan)
    with pytest.raises(LogitsStoreError, match=message):
        open_store(store_path, ROWS, CATALOGUE)


def test_a_missing_store_says_how_to_make_one(tmp_path):
    with pytest.raises(LogitsStoreError, match=r"no CF logits at .*nowhere.*launch/train_cf\.py"):
        open_store(tmp_path / "nowhere", ROWS, CATALOGUE)


def test_a_store_of_other_rows_is_stale(store_path):
    other = ItemSequences(ROWS.user, ROWS.items[::-1].copy(), ROWS.offsets, ROWS.timestamps)
    with pytest.raises(LogitsStoreError, match="rows_hash is .* written for other data"):
        open_store(store_path, other, CATALOGUE)


def test_a_store_of_another_catalogue_is_stale(store_path):
    renamed = Catalogue(CATALOGUE.item_ids, tuple("ABCDEX"))
    with pytest.raises(LogitsStoreError, match="catalogue_hash is .* written for other data"):
        open_store(store_path, ROWS, renamed)
    larger = Catalogue(tuple("abcdefg"), tuple("ABCDEFG"))
    with pytest.raises(LogitsStoreError, match="num_items is 6, but the data has 7"):
        open_store(store_path, ROWS, larger)


def test_a_store_with_other_row_counts_says_both(store_path):
    with pytest.raises(LogitsStoreError, match="num_rows is 3, but the data has 2"):
        open_store(store_path, ROWS.take([0, 1]), CATALOGUE)


def test_a_damaged_store_is_an_error_that_names_the_file(store_path):
    shutil.rmtree(array_at(store_path, "vectors"))
    with pytest.raises(LogitsStoreError, match="vectors cannot be opened"):
        open_store(store_path, ROWS, CATALOGUE)
    edit_manifest(store_path, kind="sparse")
    with pytest.raises(LogitsStoreError, match=r"manifest\.json: it is incomplete"):
        open_store(store_path, ROWS, CATALOGUE)
    (store_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not a readable manifest of CF logits"):
        open_store(store_path, ROWS, CATALOGUE)


def test_a_manifest_does_not_leave_its_folder(store_path, factorised):
    victim = store_path.parent / "victim"
    victim.mkdir()
    edit_manifest(store_path, folder="../victim")
    with pytest.raises(UserError, match=r"manifest\.json: folder is '\.\./victim': expected"):
        open_store(store_path, ROWS, CATALOGUE)
    write_store(store_path, ROWS, CATALOGUE, **factorised, origin=Origin("SASRec"))
    assert victim.is_dir()


@pytest.mark.parametrize(
    "changes",
    [
        {"arrays": None},
        {"arrays": {"logits": [9, "6"]}, "kind": "dense"},
        {"dtype": "object"},
        {"folder": 1},
        {"made_from": 1},
        {"format": [1]},
    ],
)
def test_a_malformed_manifest_is_refused_in_one_line(store_path, changes):
    edit_manifest(store_path, **changes)
    with pytest.raises(UserError, match=r"manifest\.json") as error:
        made_from_of(store_path, read_manifest(store_path))
    assert len(str(error.value).splitlines()) == 1


def test_arrays_of_another_shape_than_the_manifest_says(store_path):
    edit_manifest(store_path, arrays={"vectors": [9, 5], "item_table": [6, 5]})
    with pytest.raises(
        LogitsStoreError, match=r"shape \[9, 4\], expected float32 of shape \[9, 5\]"
    ):
        open_store(store_path, ROWS, CATALOGUE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": np.zeros((8, WIDTH))}, r"vectors has 8 events; expected 3 .* or 9"),
        (
            {"item_table": np.zeros((5, WIDTH))},
            r"item_table has 5 items; expected 6 \(the cat",
        ),
        ({"item_bias": np.zeros(7)}, "item_bias has 7 items.*for padding"),
        ({"vectors": np.zeros((9, 3))}, r"item_table has 4 columns; expected 3 \(as vectors\)"),
        ({"item_bias": np.zeros((6, 1))}, "item_bias must have 1 axes"),
        ({"item_table": None}, "either vectors with an item_table .*or logits"),
    ],
)
def test_arrays_that_do_not_fit_are_errors(tmp_path, factorised, changes, message):
    with pytest.raises(LogitsStoreError, match=message):
        write_store(
            tmp_path / "store", ROWS, CATALOGUE, **(factorised | changes), origin=Origin("x")
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_round_trip_bit_equal(tmp_path, rng, factorised, dtype):
    logits = rng.normal(size=(NUM_POSITIONS, NUM_ITEMS)).astype(jnp.dtype(dtype))
    write_store(tmp_path / "s", ROWS, CATALOGUE, logits=logits, dtype=dtype, origin=Origin("mine"))
    store = open_store(tmp_path / "s", ROWS, CATALOGUE)
    got = store.read(np.array([4, 0]))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, logits[[4, 0]].astype(np.float32))
    write_store(tmp_path / "f", ROWS, CATALOGUE, **factorised, dtype=dtype, origin=Origin("mine"))
    store = open_store(tmp_path / "f", ROWS, CATALOGUE)
    np.testing.assert_array_equal(store.item_table, factorised["item_table"])  # stays float32
    expected = factorised["vectors"].astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(store.read(np.arange(9)), expected)


def test_what_the_dtype_cannot_hold_is_reported(tmp_path):
    logits = np.zeros((3, NUM_ITEMS), np.float32)
    logits[1, 4] = 1e5
    with pytest.raises(LogitsStoreError, match=r"event 1 \(row 1 of the data\), column 4 is inf"):
        write_store(
            tmp_path / "s", ROWS, CATALOGUE, logits=logits, dtype="float16", origin=Origin("mine")
        )
    with pytest.raises(LogitsStoreError, match="dtype is 'int8'"):
        write_store(
            tmp_path / "s", ROWS, CATALOGUE, logits=logits, dtype="int8", origin=Origin("mine")
        )


def test_top_k_keeps_the_highest_and_the_mass_of_the_others(tmp_path, rng, factorised):
    write_store(tmp_path / "s", ROWS, CATALOGUE, **factorised, top_k=2, origin=Origin("mine"))
    store = open_store(tmp_path / "s", ROWS, CATALOGUE)
    assert store.kind == "topk"
    assert store.item_table is None
    full = factorised["vectors"] @ factorised["item_table"].T + factorised["item_bias"][None, :]
    got = store.read(np.arange(9))
    assert got.shape == (9, NUM_ITEMS)
    np.testing.assert_array_equal(got, store.logits(np.arange(9)))
    for row, kept in enumerate(np.argsort(-full, axis=1)[:, :2]):
        np.testing.assert_allclose(got[row, kept], full[row, kept], rtol=1e-5)
        assert len(np.unique(np.delete(got[row], kept))) == 1
    np.testing.assert_allclose(np.exp(got).sum(1), np.exp(full).sum(1), rtol=1e-5)
    every = factorised | {"vectors": factorised["vectors"]}
    write_store(tmp_path / "s", ROWS, CATALOGUE, **every, top_k=99, origin=Origin("mine"))
    kept = open_store(tmp_path / "s", ROWS, CATALOGUE).read(np.arange(9))
    np.testing.assert_allclose(kept, full, rtol=1e-5)


def test_a_top_k_store_with_an_item_outside_the_catalogue(tmp_path):
    arrays = {"values": np.ones((3, 2)), "items": np.array([[0, 1]] * 3), "floor": np.zeros(3)}
    write_store(tmp_path / "s", ROWS, CATALOGUE, **arrays, origin=Origin("mine"))
    overwrite(tmp_path / "s", "items", (1, 1), NUM_ITEMS)
    with pytest.raises(
        LogitsStoreError,
        match=r"items: event 1 \(row 1 of the data\) names item 6, expected -1 to 5",
    ):
        open_store(tmp_path / "s", ROWS, CATALOGUE)


@pytest.fixture
def sharded(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(logits_format, "_CHUNK_BYTES", 4 * NUM_ITEMS * 2)  # two events a shard
    logits = rng.normal(size=(NUM_POSITIONS, NUM_ITEMS)).astype(np.float32)
    write_store(tmp_path / "s", ROWS, CATALOGUE, logits=logits, origin=Origin("mine"))
    return tmp_path / "s", logits


SHARD = r"logits/2\.0: this shard, event 4 \(row 1 of the data, position 0\) to event 5 \(row 1 "


def test_a_truncated_shard_names_its_file_and_rows(sharded):
    path, _ = sharded
    with (array_at(path, "logits") / "2.0").open("r+b") as file:
        file.truncate(20)
    with pytest.raises(LogitsStoreError, match=SHARD + ".*damaged or truncated"):
        open_store(path, ROWS, CATALOGUE)


def test_a_missing_shard_names_its_file_and_rows(sharded):
    path, _ = sharded
    (array_at(path, "logits") / "2.0").unlink()
    with pytest.raises(LogitsStoreError, match=SHARD + ".*is missing"):
        open_store(path, ROWS, CATALOGUE)


def test_an_array_without_a_fill_value_may_leave_out_shards_of_zeros(sharded):
    path, logits = sharded
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{array_at(path, 'logits')}/"}}
    metadata = {"dtype": "<f4", "shape": logits.shape, "chunks": [2, NUM_ITEMS]}
    spec |= {"metadata": metadata, "delete_existing": True, "create": True}
    zeros = np.zeros_like(logits)
    ts.open(spec).result().write(zeros).result()
    (array_at(path, "logits") / "0.0").unlink(missing_ok=True)
    np.testing.assert_array_equal(open_store(path, ROWS, CATALOGUE).read(np.arange(9)), zeros)


def test_a_reader_of_some_rows_needs_only_their_shards(sharded):
    path, logits = sharded
    for shard in ("0.0", "2.0", "4.0"):
        (array_at(path, "logits") / shard).unlink()
    positions = np.array([6, 3])
    store = open_store(path, ROWS, CATALOGUE, positions=positions)
    np.testing.assert_array_equal(store.read(positions), logits[positions])
    with pytest.raises(LogitsStoreError, match=r"logits/4\.0.*missing"):
        open_store(path, ROWS, CATALOGUE, positions=np.array([6, 8]))


def test_a_mismatch_says_which_ids_differ(store_path):
    renamed = Catalogue(tuple("abcdxf"), tuple("ABCDEF"))
    message = r"1 items only there, such as \['e'\]; 1 items only in the data, such as \['x'\]"
    with pytest.raises(LogitsStoreError, match=message):
        open_store(store_path, ROWS, renamed)
    with pytest.raises(LogitsStoreError, match="another order: item 0 is 'a' there, 'b' here"):
        open_store(store_path, ROWS, Catalogue(tuple("bacdef"), tuple("ABCDEF")))
    items = ROWS.items.copy()
    items[5] = 2
    other = ItemSequences(ROWS.user, items, ROWS.offsets, ROWS.timestamps)
    with pytest.raises(
        LogitsStoreError, match=r"row 1 is user 1 .*'f'\] there, user 1 .*'c'\] in the"
    ):
        open_store(store_path, other, CATALOGUE)
    with pytest.raises(LogitsStoreError, match=r"2 in the data; the first 2 agree"):
        open_store(store_path, ROWS.take([0, 1]), CATALOGUE)
    with pytest.raises(
        LogitsStoreError, match="row 0 is user 0 with .* there, user 2 with .* in the data"
    ):
        open_store(store_path, ROWS.take([2, 1, 0]), CATALOGUE)


def test_the_manifest_says_what_beta_will_mean(tmp_path):
    logits = np.log(np.tile([0.5, 0.25, 0.25, 1e-30, 1e-30, 1e-30], (3, 1)))
    write_store(tmp_path / "s", ROWS, CATALOGUE, logits=logits, origin=Origin("mine"))
    statistics = open_store(tmp_path / "s", ROWS, CATALOGUE).manifest["temperature"]
    assert statistics["sampled_entries"] == 3
    assert statistics["entropy_nats"]["1"] == pytest.approx(1.5 * np.log(2), rel=1e-5)
    assert statistics["highest"] == pytest.approx(np.log(0.5))
