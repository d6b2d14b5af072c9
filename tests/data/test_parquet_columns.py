"""Text of a Parquet file equals what was written, in however many parts it is read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tca4rec_jax.data import parquet_columns
from tca4rec_jax.data.tables import BadRows, Table, read_table


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int8(), pa.string())])
def test_text_of_a_parquet_file_is_read_by_the_number_of_its_distinct_values(
    kind, tmp_path, monkeypatch
):
    """One array of `string` holds 2 GiB: no column is in one, and no column is whole."""
    monkeypatch.setattr(parquet_columns, "_ROWS", 5)
    monkeypatch.setattr(parquet_columns, "_DISTINCT", 8)
    ids = [f"é{number % 17} " for number in np.random.default_rng(0).integers(0, 40, 99)]
    column = pa.array(ids).cast(kind) if pa.types.is_dictionary(kind) else pa.array(ids, kind)
    path = tmp_path / "x.parquet"
    pa.parquet.write_table(pa.table({"a": column}), path, row_group_size=30)
    table = read_table(path, {"item": "a"})
    assert table.columns["item"].type == pa.dictionary(pa.int32(), pa.large_string())
    without = np.arange(99) < 20
    for left, expected in ((table, ids), (table.without(without), ids[20:])):
        code_n, found = left.codes("item")
        wanted = [text.strip() for text in expected]
        assert found.tolist() == list(dict.fromkeys(wanted))
        assert (code_n.dtype, found[code_n].tolist()) == (np.int32, wanted)
        assert left.texts("item").tolist() == expected


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int8(), pa.string())])
def test_missing_text_of_a_parquet_file_is_named(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_columns, "_ROWS", 2)
    values = pa.array(["a", "b", "a", None, "c"]).dictionary_encode().cast(kind)
    pa.parquet.write_table(pa.table({"a": values}), tmp_path / "x.parquet")
    table = read_table(tmp_path / "x.parquet", {"item": "a"})
    for read in (table.codes, table.titles, table.integers):
        with pytest.raises(BadRows, match=r"row 4: a is None, expected .* \(1 such rows of 5\)"):
            read("item")
    assert table.attributes(["item"]) == {"item": ("a", "b", "a", "", "c")}


def test_a_dictionary_that_has_a_null_is_missing_it():
    values = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(["a", None]))
    table = Table(Path("x"), {"item": "item"}, {"item": values}, range(1, 4))
    with pytest.raises(BadRows, match="row 2: item is None"):
        table.codes("item")


def test_bytes_of_a_parquet_file_are_read_in_one_array_that_holds_more_than_2_gib(tmp_path):
    ids = pa.array([b"b", b"a", b"b"])
    pa.parquet.write_table(pa.table({"a": ids}), tmp_path / "x.parquet", row_group_size=2)
    table = read_table(tmp_path / "x.parquet", {"item": "a"})
    assert table.columns["item"].type == pa.large_binary()
    assert table.ids("item").tolist() == ["b", "a", "b"]
