import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from tca4rec_jax.cf.logits_export import export_npy, export_parquet, export_stores
from tca4rec_jax.cf.logits_format import LogitsStoreError, Origin
from tca4rec_jax.cf.logits_import import import_logits
from tca4rec_jax.cf.logits_store import open_store
from tca4rec_jax.cf.logits_writer import write_store
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData
from tca4rec_jax.errors import UserError

CATALOGUE = Catalogue(tuple("abcd"), tuple("ABCD"))
ROWS = ItemSequences(
    np.array([5, 2, 5]), np.array([0, 1, 2, 3, 0, 1]), np.array([0, 3, 4, 6]), np.full(6, -1)
)


def imported(source, tmp_path, **options):
    import_logits(source, tmp_path / "store", ROWS, CATALOGUE, **options)
    return open_store(tmp_path / "store", ROWS, CATALOGUE)


@pytest.mark.parametrize("rows", [3, 6])
def test_the_logits_of_rows_and_of_positions(tmp_path, rows):
    logits = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float16)
    np.save(tmp_path / "mine.npy", logits)
    of_last = logits if rows == len(ROWS) else logits[ROWS.last_positions]
    store = imported(tmp_path / "mine.npy", tmp_path)
    np.testing.assert_array_equal(store.read(ROWS.last_positions), of_last.astype(np.float32))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.zeros((4, 4)), r"mine\.npy: logits has 4 events; expected 3 .* or 6"),
        (np.zeros((3, 5)), r"mine\.npy: logits has 5 items; expected 4 .*padding"),
        (np.zeros(3), r"mine\.npy: logits must have 2 axes"),
        (
            np.full((3, 4), np.nan),
            r"mine\.npy/logits: event 0 \(row 0 of the data\), column 0 is nan",
        ),
        (np.full((3, 4), "x"), r"mine\.npy: logits is of <U1, expected floating point"),
        (np.full((3, 4), {}), r"mine\.npy: not a readable .*Python objects"),
    ],
)
def test_what_does_not_fit_names_the_users_file(tmp_path, logits, message):
    np.save(tmp_path / "mine.npy", logits)
    with pytest.raises(ValueError, match=message):
        imported(tmp_path / "mine.npy", tmp_path)
    assert not (tmp_path / "store").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"mine\.npy: no such file"):
        imported(tmp_path / "mine.npy", tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files_dense_and_factorised(tmp_path, save):
    rng = np.random.default_rng(0)
    logits = np.asfortranarray(rng.normal(size=(6, 4)))
    save(tmp_path / "dense.npz", anything=logits)
    store = imported(tmp_path / "dense.npz", tmp_path)
    np.testing.assert_array_equal(store.read(np.arange(6)), logits.astype(np.float32))
    vectors, table = rng.normal(size=(3, 2)), rng.normal(size=(4, 2))
    save(tmp_path / "factors.npz", vectors=vectors, item_table=table)
    store = imported(tmp_path / "factors.npz", tmp_path)
    assert store.kind == "factorised"
    np.testing.assert_array_equal(store.read(ROWS.last_positions), vectors.astype(np.float32))
    with pytest.raises(LogitsStoreError, match="a floor goes with a table"):
        imported(tmp_path / "dense.npz", tmp_path, floor=0.0)


TABLE = pd.DataFrame(
    {"row": [2, 0, 0, 1], "item": ["d", "b", "a", "c"], "score": [0.5, 2.0, -1.0, 3.0]}
)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_of_rows(tmp_path, suffix):
    path = tmp_path / f"scores{suffix}"
    TABLE.to_parquet(path) if suffix == ".parquet" else TABLE.to_csv(path, index=False)
    got = imported(path, tmp_path).logits(ROWS.last_positions)
    np.testing.assert_array_equal(got, [[-1, 2, -1, -1], [3, 3, 3, 3], [0.5, 0.5, 0.5, 0.5]])
    got = imported(path, tmp_path, floor=-7.0).logits(ROWS.last_positions)
    np.testing.assert_array_equal(got, [[-1, 2, -7, -7], [-7, -7, 3, -7], [-7, -7, -7, 0.5]])


def test_tables_of_positions_and_of_users(tmp_path):
    places = pd.DataFrame({"position": range(6), "item": list("abcdab"), "score": np.arange(6.0)})
    places.to_csv(tmp_path / "places.csv", index=False)
    got = imported(tmp_path / "places.csv", tmp_path, floor=-1.0).logits(np.array([4, 1]))
    np.testing.assert_array_equal(got, [[4, -1, -1, -1], [-1, 1, -1, -1]])
    users = pd.DataFrame({"user": [5, 2], "item": ["a", "b"], "score": [1.0, 2.0]})
    users.to_csv(tmp_path / "users.csv", index=False)
    got = imported(tmp_path / "users.csv", tmp_path, floor=0.0).logits(np.arange(6))
    assert got.argmax(axis=1).tolist() == [0, 0, 0, 1, 0, 0]


def test_a_table_of_users_means_the_ids_of_the_data(tmp_path):
    """Ids are sorted as text, so '10' is user 2 of the ids '1' to '10', not user 10."""
    user_ids = tuple(sorted(str(number) for number in range(1, 11)))
    rows = ItemSequences(
        np.array([1, 2]), np.array([0, 1, 2, 3]), np.array([0, 2, 4]), np.full(4, -1)
    )
    scores = pd.DataFrame({"user": [2, 10, 7], "item": list("abc"), "score": [1.0, 2.0, 3.0]})
    scores.to_csv(tmp_path / "users.csv", index=False)
    source, path = tmp_path / "users.csv", tmp_path / "store"
    import_logits(source, path, rows, CATALOGUE, floor=0.0, user_ids=user_ids)
    best = open_store(path, rows, CATALOGUE).logits(np.arange(4)).argmax(axis=1)
    assert user_ids[1:3] == ("10", "2")
    assert best.tolist() == [1, 1, 0, 0]
    with pytest.raises(UserError, match=r"row 3: 1 users are not .* such as \['7'\]"):
        import_logits(source, path, rows, CATALOGUE, user_ids=user_ids[:5])
    with pytest.raises(LogitsStoreError, match="prepare them again"):
        import_logits(source, path, rows, CATALOGUE, user_ids=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item": list("dbxc")}, r"row 3: 1 items are not in the catalogue of 4, such as \['x'\]"),
        ({"row": [2, 0, 0, 7]}, r"row 4: row is '7', expected 0\.\.2"),
        ({"row": [0, 0, 0, 0]}, r"2 of 3 rows have no score, such as \[1, 2\]"),
        ({"item": list("dbbc")}, "row 0 has two scores for item 'b'"),
        ({"score": [0.5, "inf", 1, 1]}, "row 2: score is 'inf', expected a finite number"),
        ({"score": [0.5, "1e39", 1, 1]}, "row 2: score is '1e39', expected a finite number"),
        ({"score": ["much", 1, 1, 1]}, "row 1: score is 'much', expected a finite number"),
    ],
)
def test_a_table_that_does_not_fit_names_the_row_or_the_ids(tmp_path, changes, message):
    TABLE.assign(**changes).to_csv(tmp_path / "scores.csv", index=False)
    with pytest.raises(ValueError, match=rf"scores\.csv.*{message}"):
        imported(tmp_path / "scores.csv", tmp_path)
    assert not (tmp_path / "store").exists()


def test_a_floor_above_a_listed_score_is_refused(tmp_path):
    TABLE.to_csv(tmp_path / "scores.csv", index=False)
    with pytest.raises(UserError, match="row 1: score is '0.5', expected at least the floor 1.0"):
        imported(tmp_path / "scores.csv", tmp_path, floor=1.0)


def test_a_table_without_a_key_column(tmp_path):
    TABLE.drop(columns="row").to_csv(tmp_path / "scores.csv", index=False)
    with pytest.raises(LogitsStoreError, match=r"needs one of the columns \('row', 'position', 'u"):
        imported(tmp_path / "scores.csv", tmp_path)


DATA = RecData(CATALOGUE, dict.fromkeys(SPLITS, ROWS))


def two_stores(tmp_path, dense):
    """The folders of two models' stores, and their logits."""
    rng, sources, full = np.random.default_rng(0), [], []
    for number in range(2):
        vectors, table = rng.normal(size=(6, 2 + number)), rng.normal(size=(4, 2 + number))
        bias = rng.normal(size=4) if number else None
        full.append(vectors @ table.T + (0 if bias is None else bias))
        arrays = {"vectors": vectors, "item_table": table, "item_bias": bias}
        if dense and number:
            arrays = {"logits": full[1]}
        sources.append(str(tmp_path / f"model{number}"))
        path = f"{sources[-1]}/train"
        write_store(path, ROWS, CATALOGUE, **arrays, origin=Origin(f"M{number}", history_length=3))
    return sources, full


@pytest.mark.parametrize("dense", [False, True])
def test_a_mixture_is_the_weighted_sum_of_tempered_logits(tmp_path, dense):
    sources, full = two_stores(tmp_path, dense)
    mix = {"weights": [0.25, 2.0], "temperatures": [0.5, 4.0]}
    export_stores(tmp_path / "mix", sources, DATA, ["train"], **mix)
    mixed = open_store(tmp_path / "mix" / "train", ROWS, CATALOGUE)
    assert mixed.kind == ("dense" if dense else "factorised")
    assert mixed.manifest["cf_model"] == "0.25 x M0 / 0.5 + 2 x M1 / 4"
    assert mixed.manifest["history_length"] == 3
    expected = 0.5 * full[0] + 0.5 * full[1]
    np.testing.assert_allclose(mixed.logits(np.arange(6)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "mix",
    [{"weights": [1.0]}, {"weights": [1, np.nan]}, {"weights": [1, 1], "temperatures": [1, 0]}],
)
def test_weights_that_do_not_fit_are_errors(tmp_path, mix):
    sources, _ = two_stores(tmp_path, False)
    with pytest.raises(LogitsStoreError, match="weight"):
        export_stores(tmp_path / "mix", sources, DATA, ["train"], **mix)


def test_logits_that_leave_as_npy_come_back_bit_equal(tmp_path):
    sources = two_stores(tmp_path, False)[0][1:]
    export_npy(tmp_path / "out", sources, DATA, ["train"])
    back = imported(tmp_path / "out" / "train.npy", tmp_path)
    stored = open_store(tmp_path / "model1" / "train", ROWS, CATALOGUE)
    np.testing.assert_array_equal(back.read(np.arange(6)), stored.logits(np.arange(6)))
    export_stores(str(tmp_path / "dense"), sources, DATA, ["train"], weights=[1.0], dense=True)
    dense = open_store(tmp_path / "dense" / "train", ROWS, CATALOGUE)
    assert dense.kind == "dense"
    np.testing.assert_array_equal(back.read(np.arange(6)), dense.read(np.arange(6)))
    options = {"weights": [1.0], "dtype": "bfloat16", "top_k": 2}
    export_stores(str(tmp_path / "small"), sources, DATA, ["train"], **options)
    small = open_store(tmp_path / "small" / "train", ROWS, CATALOGUE)
    assert small.kind == "topk"
    same = small.logits(np.arange(6)).argmax(1) == stored.logits(np.arange(6)).argmax(1)
    assert same.mean() > 0.8
    with pytest.raises(ValueError, match="mix them first"):
        export_npy(tmp_path / "out", sources * 2, DATA, ["train"])


@pytest.mark.parametrize("last_events", [False, True])
def test_logits_that_leave_as_parquet_come_back(tmp_path, last_events):
    sources = two_stores(tmp_path, False)[0][1:]
    stored = open_store(tmp_path / "model1" / "train", ROWS, CATALOGUE)
    events = ROWS.last_positions if last_events else np.arange(6)
    logits_ExI = stored.logits(events)
    if last_events:
        write_store(
            tmp_path / "last" / "train", ROWS, CATALOGUE, origin=Origin("L"), logits=logits_ExI
        )
        sources = [str(tmp_path / "last")]
    export_parquet(tmp_path / "out", sources, DATA, ["train"])
    back = imported(tmp_path / "out" / "train.parquet", tmp_path)
    np.testing.assert_array_equal(back.logits(events), logits_ExI)
    export_parquet(tmp_path / "best", sources, DATA, ["train"], top_k=2)
    table = pd.read_parquet(tmp_path / "best" / "train.parquet")
    assert [*table] == ["user", "row" if last_events else "position", "item", "score"]
    users = np.repeat(ROWS.user, 1 if last_events else ROWS.lengths)
    assert table["user"].tolist() == [str(user) for user in users for _ in range(2)]
    best_ExK = np.argsort(-logits_ExI, axis=1)[:, :2]
    assert table["item"].tolist() == [CATALOGUE.item_ids[item] for item in best_ExK.ravel()]
    np.testing.assert_array_equal(
        table["score"], np.take_along_axis(logits_ExI, best_ExK, axis=1).ravel()
    )


def test_logits_as_npy_on_a_full_disk_are_an_error_that_names_the_file(tmp_path, monkeypatch):
    sources = two_stores(tmp_path, False)[0][1:]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (140, limits[1]))  # the header is of 128 bytes
    try:
        with pytest.raises(OSError, match="File too large") as error:
            export_npy(tmp_path / "out", sources, DATA, ["train"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path / "out" / "train.npy")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=95))
    with pytest.raises(UserError, match=r"out has room for 0\.00 GB, float32 logits take"):
        export_npy(tmp_path / "out", sources, DATA, ["train"])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_truncated_file_of_logits_is_an_error_that_names_it(tmp_path, suffix):
    path = tmp_path / f"logits{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, np.zeros((6, 4)))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=rf"logits\{suffix}: not a readable .* save it with numpy"):
        imported(path, tmp_path)
