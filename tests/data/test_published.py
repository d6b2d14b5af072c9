import pytest

from tca4rec_jax.data.published import read_published

ITEMS = ',rawid,title,mapping_iid,iid\n1,B2,"Pens,  blue",B2,2\n0,B1,Paper,B1,1\n2,B3,NA,B3,3\n'
HEADER = "uid,iid,his_len,hist_id,rating,timestamp\n"
FILES = {
    "item.csv": ITEMS,
    "train_3.csv": HEADER + '4,3,2,"[1, 2]",5.0,100\n9,1,1,[3],5.0,200\n4,2,2,"[2, 3]",1.0,300\n',
    "valid_1.csv": HEADER + '4,1,2,"[3, 2]",5.0,400\n',
    "test_1.csv": HEADER + '9,2,2,"[3, 1]",5.0,500\n',
}


def _write(folder, **changes):
    for name, text in {**FILES, **changes}.items():
        (folder / name).write_text(text)


def test_other_columns_of_the_items_are_attributes(tmp_path):
    _write(tmp_path)
    catalogue = read_published(tmp_path, attributes=("mapping_iid",)).catalogue
    assert catalogue.attributes == {"mapping_iid": ("B1", "B2", "B3")}


def test_rows_are_history_and_target(tmp_path):
    _write(tmp_path)
    data = read_published(tmp_path)
    assert data.catalogue.item_ids == ("B1", "B2", "B3")
    assert data.catalogue.titles == ("Paper", "Pens, blue", "NA")
    train = data.splits["train"]
    assert [train[r].tolist() for r in range(3)] == [[0, 1, 2], [2, 0], [1, 2, 1]]
    assert train.user.tolist() == [4, 9, 4]
    assert train.timestamps.tolist() == [-1, -1, 100, -1, 200, -1, -1, 300]
    assert data.splits["train_sequences"].content_hash() == train.content_hash()
    assert data.splits["validation"][0].tolist() == [2, 1, 0]
    assert data.splits["test"][0].tolist() == [2, 0, 1]


def test_titles_are_cut(tmp_path):
    _write(tmp_path)
    assert read_published(tmp_path, max_title_length=3).catalogue.titles == ("Pap", "Pen", "NA")


def test_spaces_in_titles_are_kept_if_asked(tmp_path):
    _write(tmp_path, **{"item.csv": ITEMS.replace("NA", "N ")})
    kept = read_published(tmp_path, max_title_length=7, keep_spaces=True).catalogue.titles
    assert kept == ("Paper", "Pens,  ", "N ")
    assert read_published(tmp_path, max_title_length=7).catalogue.titles == (
        "Paper",
        "Pens, b",
        "N",
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("item.csv", ITEMS + "3,B4,Tape,B4,3\n", "iids must be 1..4, each once, but 3 stands"),
        ("item.csv", ITEMS + "3,B1,Tape,B1,4\n", "item id 'B1' occurs more than once"),
        ("item.csv", ITEMS + "3,B4, ,B4,4\n", "item.csv, row 4: title is ' '"),
        ("item.csv", ITEMS.replace("rawid", "asin"), r"item.csv has no column \['rawid'\]"),
        ("test_1.csv", HEADER + "9,4,1,[1],5,5\n", "test_1.csv, row 1: iid has item 4"),
        ("test_1.csv", HEADER + '9,1,1,[1],5,5\n9,1,2,"[1, 0]",5,5\n', "row 2: hist_id has item 0"),
        ("test_1.csv", HEADER + "9,1,0,[],5,5\n", r"row 1: hist_id is '\[\]', expected a list"),
        ("test_1.csv", HEADER + '9,1,2,"[1, x]",5,5\n', "row 1: hist_id is"),
        ("test_1.csv", HEADER + "9,1,1,[1],5,\n", "row 1: timestamp is ''"),
        ("test_1.csv", HEADER + "4294967297,1,1,[1],5,5\n", "row 1: uid is .* at most 2147483647"),
        ("test_1.csv", HEADER + "9,1,1,[9999999999],5,5\n", r"row 1: hist_id is '\[99"),
        ("test_1.csv", HEADER, "has a header but no rows"),
        ("test_1.csv", "", "test_1.csv is empty"),
        ("test_2.csv", HEADER, r"exactly one file test\*.csv, it holds"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    _write(tmp_path, **{name: text})
    with pytest.raises(ValueError, match=message):
        read_published(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="item.csv does not exist"):
        read_published(tmp_path)
    _write(tmp_path)
    (tmp_path / "valid_1.csv").unlink()
    with pytest.raises(ValueError, match=r"exactly one file valid\*.csv, it holds \[\]"):
        read_published(tmp_path)
