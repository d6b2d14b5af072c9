"""prepare and load: round trip, reuse, refusal; and the whole launcher in its own process."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from forked import Script

from tca4rec_jax.data import dataset, downloads, tfds_rec
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.summary import summarise
from tca4rec_jax.provenance import StaleError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    items, interactions = tmp_path / "items.csv", tmp_path / "interactions.csv"
    items.write_text("item,title\n" + "".join(f"i{i},Title {i // 2} é\n" for i in range(12)))
    rows = [f"u{rng.integers(4)},i{rng.integers(12)},{rng.integers(30)}\n" for _ in range(80)]
    interactions.write_text("reviewer,item,timestamp\n" + "".join(rows))
    return ml_collections.ConfigDict(
        {
            "source": "files",
            "catalogue": str(items),
            "interactions": str(interactions),
            "history_length": 3,
        }
    )


@pytest.fixture
def good_config(config):
    path = Path(config.interactions)
    path.write_text(path.read_text().replace("reviewer", "user"))
    return config


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(config, folder) of prepared data that no test changes."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "items.csv").write_text("item,title\n" + "".join(f"{i},T{i}\n" for i in range(9)))
    rows = [f"{n % 3},{n % 7},{n}\n" for n in range(60)]
    (folder / "rows.csv").write_text("user,item,timestamp\n" + "".join(rows))
    config = {"source": "files", "history_length": 3, "catalogue": str(folder / "items.csv")}
    config["interactions"] = str(folder / "rows.csv")
    dataset.prepare(config, folder / "data")
    return config, folder / "data"


def _same(left, right):
    sides = [(side.catalogue, side.user_ids) for side in (left, right)]
    return sides[0] == sides[1] and all(
        left.splits[name].content_hash() == right.splits[name].content_hash()
        for name in {*left.splits, *right.splits}
    )


def test_prepared_data_are_loaded_and_reused(good_config, tmp_path, monkeypatch):
    data_dir = tmp_path / "run" / "data"
    prepared = dataset.prepare(good_config, data_dir)
    assert _same(dataset.load(data_dir), prepared)
    assert prepared.user_ids == ("u0", "u1", "u2", "u3")
    assert [path.name for path in data_dir.parent.iterdir()] == ["data"]
    assert not [*data_dir.rglob("*.npy")]  # of the sort
    monkeypatch.setattr(dataset, "_read_source", None)  # a second read would fail
    assert _same(dataset.prepare(good_config, data_dir), prepared)


def test_what_another_process_made_meanwhile_is_reused(good_config, tmp_path, monkeypatch):
    data_dir, read = tmp_path / "run" / "data", dataset._read_source
    made = []

    def reading(*args):
        monkeypatch.setattr(dataset, "_read_source", read)
        made.append(dataset.prepare(good_config, data_dir))
        return read(*args)

    monkeypatch.setattr(dataset, "_read_source", reading)
    assert _same(dataset.prepare(good_config, data_dir), made[0])
    assert [path.name for path in data_dir.parent.iterdir()] == ["data"]


def test_column_names_are_settings(config, tmp_path):
    config.user_column = "reviewer"
    prepared = dataset.prepare(config, tmp_path / "data")
    assert len(prepared.splits["train"]) > 10


def test_attributes_are_kept(good_config, tmp_path):
    path = Path(good_config.catalogue)
    rows = path.read_text().splitlines()
    brands = ["brand", *("" if row < 2 else f"B {row}" for row in range(12))]
    path.write_text("\n".join(f"{row},{brand}" for row, brand in zip(rows, brands, strict=True)))
    plain = dataset.prepare(good_config, tmp_path / "plain").catalogue
    good_config.attributes = ("brand",)
    made = dataset.prepare(good_config, tmp_path / "data").catalogue
    assert made.attributes["brand"] == tuple(brands[1:])
    assert dataset.load(tmp_path / "data", good_config).catalogue == made
    assert plain.content_hash() == dataclasses.replace(made, attributes={}).content_hash()
    assert plain.content_hash() != made.content_hash()


def rating_of(item):
    return sum(map(ord, item)) % 5 + 1


def test_what_is_liked_is_kept(good_config, tmp_path):
    path = Path(good_config.interactions)
    header, *rows = path.read_text().splitlines()
    lines = (f"{row},{rating_of(row.split(',')[1])}" for row in rows)
    path.write_text("\n".join([f"{header},stars", *lines]))
    good_config.update(rating_column="stars", liked_above=2.5)
    made = dataset.prepare(good_config, tmp_path / "data")
    assert _same(dataset.load(tmp_path / "data", good_config), made)
    for rows in made.splits.values():
        ids = (made.catalogue.item_ids[item] for item in rows.items.tolist())
        expected = [rating_of(item) > 2.5 for item in ids]
        assert rows.liked.tolist() == expected
        assert (
            rows.take(np.array([1])).liked.tolist() == expected[rows.offsets[1] : rows.offsets[2]]
        )
    assert {*made.splits["train"].liked.tolist()} == {True, False}


def test_files_may_move_but_not_change(good_config, tmp_path):
    prepared = dataset.prepare(good_config, tmp_path / "data")
    moved = tmp_path / "moved.csv"
    Path(good_config["catalogue"]).rename(moved)
    good_config["catalogue"] = str(moved)
    assert _same(dataset.prepare(good_config, tmp_path / "data"), prepared)
    moved.write_text(moved.read_text().replace("Title 1 ", "Other "))
    with pytest.raises(StaleError, match="SHA-256 of catalogue was .*another work directory"):
        dataset.prepare(good_config, tmp_path / "data")


def test_other_settings_are_refused_with_the_difference(good_config, tmp_path):
    dataset.prepare(good_config, tmp_path / "data")
    good_config.history_length = 2
    for read in (dataset.prepare, lambda config, folder: dataset.load(folder, config)):
        with pytest.raises(StaleError, match=r"data\.history_length was 3, is 2"):
            read(good_config, tmp_path / "data")


OTHER = {
    "source": "movielens_100k",
    "user_column": "u",
    "item_column": "i",
    "timestamp_column": "t",
    "title_column": "name",
    "split_by": "leave_one_out",
    "min_history": 1,
    "split": (0.6, 0.2, 0.2),
    "seed": 1,
    "max_title_length": 50,
}


@pytest.mark.parametrize("field", OTHER)
def test_later_steps_refuse_data_that_another_config_would_have_made(small, field):
    config, data_dir = small
    with pytest.raises(StaleError, match=rf"data\.{field} was .*with launch/prepare_data\.py"):
        dataset.load(data_dir, {**config, field: OTHER[field]})
    for place in ("path", "interactions", "catalogue"):
        dataset.load(data_dir, {**config, place: "elsewhere"})


def test_data_of_before_are_refused_with_the_command_that_makes_them(good_config, tmp_path):
    dataset.prepare(good_config, tmp_path / "data")
    (tmp_path / "data" / "provenance.json").unlink()
    with pytest.raises(StaleError, match=r"provenance\.json\): make it anew with .*prepare_data"):
        dataset.load(tmp_path / "data")


def test_a_folder_with_other_files_is_left_alone(good_config, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no prepared data"):
        dataset.prepare(good_config, tmp_path / "data")
    assert (tmp_path / "data" / "notes.txt").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(config, good_config, tmp_path, monkeypatch):
    def fail(data, scratch, source):
        (scratch / "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr(tfds_rec, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        dataset.prepare(good_config, tmp_path / "run" / "data")
    assert list((tmp_path / "run").iterdir()) == []


def test_bad_input_writes_nothing(config, tmp_path):
    with pytest.raises(ValueError, match=r"no column \['user'\]"):
        dataset.prepare(config, tmp_path / "run" / "data")
    assert not (tmp_path / "run").exists()


def test_missing_and_damaged_data_are_named(good_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no prepared data"):
        dataset.load(tmp_path / "data")
    dataset.prepare(good_config, tmp_path / "data")
    record = next((tmp_path / "data").rglob("*test.array_record*"))
    content = record.read_bytes()
    record.write_bytes(content[: len(content) // 2])
    data = dataset.load(tmp_path / "data")
    assert len(data.splits["validation"])
    with pytest.raises(ValueError, match="split 'test' in .* is damaged"):
        data.splits["test"]
    next((tmp_path / "data").rglob("features.json")).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        dataset.load(tmp_path / "data")


def test_tfds_and_its_data_source_see_the_same_rows(good_config, tmp_path):
    import tensorflow_datasets as tfds

    data = dataset.prepare(good_config, tmp_path / "data")
    folder = tmp_path / "data" / "rec_sequences" / "1.0.0"
    source = tfds.builder_from_directory(str(folder)).as_data_source("test")
    test = data.splits["test"]
    assert len(source) == len(test)
    for row in (0, len(test) - 1):
        example = source[row]
        assert example["user"] == test.user[row]
        assert example["items"].tolist() == test[row].tolist()
        start, stop = test.offsets[row : row + 2]
        assert example["timestamps"].tolist() == test.timestamps[start:stop].tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "netflix"}, "data.source is 'netflix': expected one of"),
        ({"source": "published"}, "needs data.path"),
        ({"min_history": 11}, "min_history is 11: expected at most data.history_length, 10"),
        ({"source": "sequences", "split_by": "leave_one_out"}, "needs data.interactions$"),
        ({"source": "sequences"}, "'time': data.source=sequences has no times, expected 'leave_"),
        (
            {"source": "published", "split_by": "leave_one_out"},
            "data.source=published has splits of their own, expected 'time'",
        ),
        ({"source": "files", "catalogue": "x"}, "needs data.interactions and data.catalogue"),
        ({"attributes": ("title",)}, "data.attributes has 'title': expected names of columns"),
        ({"attributes": ("a:b",)}, "data.attributes has 'a:b': expected names of columns, without"),
        (
            {
                "source": "sequences",
                "split_by": "leave_one_out",
                "interactions": "x",
                "attributes": ("a",),
            },
            "data.attributes needs data.catalogue",
        ),
    ],
)
def test_bad_configs_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dataset.prepare(values, tmp_path)


def test_an_unknown_setting_is_named(tmp_path):
    with pytest.raises(TypeError, match="'histroy_length'"):
        dataset.prepare({"histroy_length": 3}, tmp_path)


def test_missing_files_are_named_before_anything_is_read(tmp_path):
    config = {"source": "files", "catalogue": "no/items.csv", "interactions": "no/x.csv"}
    with pytest.raises(FileNotFoundError, match="data.catalogue: no/items.csv does not exist"):
        dataset.prepare(config, tmp_path)


def test_movielens_comes_from_the_download_or_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "ml"
    folder.mkdir()
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    titles = "".join(f"{i}\tFilm {i}, The\t1990\tDrama\n" for i in range(30))
    (folder / "ml-100k.item").write_text(header + titles)
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    ratings = "".join(f"1\t{i}\t5\t{100 + i}\n" for i in range(30))
    (folder / "ml-100k.inter").write_text(header + ratings)
    monkeypatch.setattr(downloads, "fetch", {"movielens-100k": folder}.get)
    config = {"source": "movielens_100k"}
    data = dataset.prepare(config, tmp_path / "a")
    assert data.catalogue.titles[0] == "The Film 0 (1990)"
    assert [len(data.splits[name]) for name in data.splits] == [1, 16, 2, 2]
    monkeypatch.setattr(downloads, "fetch", None)
    again = dataset.prepare({**config, "path": str(folder)}, tmp_path / "b")
    assert _same(again, data)


def test_sequences_are_prepared_and_their_titles_count(tmp_path):
    sequences, titles = tmp_path / "x.json", tmp_path / "titles.json"
    sequences.write_text(json.dumps({"u": [3, 1, 2, 9], "v": [1, 2], "w": [9, 3, 1]}))
    titles.write_text(json.dumps({item: f"Title {item}" for item in (1, 2, 3, 9)}))
    config = {"source": "sequences", "split_by": "leave_one_out", "interactions": str(sequences)}
    data = dataset.prepare(config, tmp_path / "data")
    assert data.catalogue == Catalogue(("3", "1", "2", "9"), ("3", "1", "2", "9"))
    rows = {
        name: [rows[r].tolist() for r in range(len(rows))] for name, rows in data.splits.items()
    }
    assert rows == {
        "train_sequences": [[0, 1], [1, 2]],
        "train": [[0, 1], [1, 2]],
        "validation": [[0, 1, 2], [3, 0]],
        "test": [[0, 1, 2, 3], [3, 0, 1]],
    }
    assert data.user_ids == ("u", "v", "w")
    assert summarise(data)["splits"]["test"]["tied"] is None
    assert _same(dataset.load(tmp_path / "data", config), data)
    titled = {**config, "catalogue": str(titles)}
    with pytest.raises(StaleError, match="SHA-256 of catalogue was None"):
        dataset.prepare(titled, tmp_path / "data")
    named = dataset.prepare(titled, tmp_path / "named")
    assert named.catalogue.titles == ("Title 1", "Title 2", "Title 3", "Title 9")
    with pytest.raises(StaleError, match="SHA-256 of catalogue was .*, is None"):
        dataset.prepare(config, tmp_path / "named")


def test_a_field_that_came_later_does_not_make_data_another(good_config, tmp_path):
    dataset.prepare(good_config, tmp_path / "data")
    path = tmp_path / "data" / "provenance.json"
    fields = json.loads(path.read_text())
    del fields["inputs"]["data.drop_duplicates"]
    path.write_text(json.dumps(fields))
    dataset.prepare(good_config, tmp_path / "data")
    with pytest.raises(StaleError, match="data.drop_duplicates was False, is True"):
        dataset.prepare({**good_config, "drop_duplicates": True}, tmp_path / "data")


CONFIG_FILE = """
from tca4rec_jax.config import default_config

def get_config():
    config = default_config()
    config.data.update({data})
    return config
"""


def test_the_launcher_prepares_prints_and_never_imports_tensorflow(good_config, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG_FILE.format(data=good_config.to_dict()))
    program = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('launch.prepare_data', run_name='__main__')\n"
        "finally:\n    assert 'tensorflow' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program]
    command += [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 items, 6 distinct titles" in done.stdout
    assert "train_sequences" in done.stdout
    assert "ownloading" not in done.stdout + done.stderr
    assert len(dataset.load(tmp_path / "run" / "data").splits["test"]) > 0
    again = [f"{ROOT}/launch/prepare_data.py", *command[3:], "--config.data.history_length=2"]
    refused = Script(again, {}).completed()
    assert refused.returncode == 1
    assert "prepare_data:" in refused.stderr
    assert "history_length was 3, is 2" in refused.stderr
    assert "Traceback" not in refused.stderr
