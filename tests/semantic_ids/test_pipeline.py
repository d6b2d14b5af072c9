"""From item embeddings to WORKDIR/ids, on the tiny work directory."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_workdir
from forked import Script

from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.config import build
from tca4rec_jax.data.dataset import load
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import file_sha256
from tca4rec_jax.provenance import Provenance, StaleError
from tca4rec_jax.semantic_ids import pipeline
from tca4rec_jax.semantic_ids.ids import catalogue_ids, ids_path
from tca4rec_jax.semantic_ids.pipeline import make_ids
from tca4rec_jax.semantic_ids.rq_vae import RQVAEConfig
from tca4rec_jax.semantic_ids.settings import Quantiser
from tca4rec_jax.status import Status


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny_workdir.make_workdir(path)
    vectors = np.random.default_rng(0).normal(size=(tiny_workdir.ITEMS, 6)).astype(np.float32)
    vectors[1] = vectors[0]
    np.save(path / "vectors.npy", vectors)
    return path


def _make(workdir, path=None, rq_vae=(), cf=None, beta=1.0, **fields):
    config = tiny_workdir.make_config(workdir, "any")
    config.ids.update({"item_vectors": str(workdir / "vectors.npy"), "codes": (4, 4), **fields})
    config.ids.rq_vae.update({"units": (8,), "width": 4, "epochs": 3, **dict(rq_vae)})
    settings = build(Quantiser, config.ids), build(RQVAEConfig, config.ids.rq_vae)
    data = load(workdir / "data")
    return make_ids(data, workdir, *settings, path=path, cf=cf or config.cf, beta=beta)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rq_k_means"},
        {"method": "balanced_rq_k_means"},
        {"method": "rq_vae", "rq_vae": {"cf_weight": 0.1}},
    ],
)
def test_ids_that_tell_all_items_apart(workdir, settings):
    report = _make(workdir, **settings)
    ids = catalogue_ids(ids_path(None, workdir), load(workdir / "data").catalogue)
    assert len(set(ids.texts)) == tiny_workdir.ITEMS == report["ids"]
    assert report["items with the embedding of another one"] == 2
    assert report["sharing"]["quantiser"] >= 2
    assert list(report["levels"])[:2] == ["a", "b"]
    assert report["levels"]["a"]["left"] > 0
    # Popularity is one distribution over all items: the unique ids resolve all of it.
    assert report["cf"]["within ids"] == pytest.approx(0, abs=1e-5)
    assert (workdir / "ids" / "report.png").is_file()
    row = Status(workdir).rows()["ids"]
    assert (row["what"], row["state"]) == ("semantic ids", "up to date")


def test_the_same_inputs_are_found_and_others_made_anew(workdir):
    first = _make(workdir, seed=1)
    assert _make(workdir, seed=1)["seconds"] == first["seconds"]  # of the first call
    assert _make(workdir, seed=2)["seconds"] != first["seconds"]
    inputs = Provenance.load(workdir / "ids").inputs
    assert {"item_vectors", "catalogue", "ids.seed", "ids.codes"} <= set(inputs)
    assert "cf_logits" not in inputs
    (workdir / "ids" / "ids.json").unlink()
    assert Status(workdir).rows()["ids"]["state"] == "interrupted"
    _make(workdir, seed=2)
    assert (workdir / "ids" / "ids.json").is_file()


@pytest.mark.parametrize("agrees", [False, True], ids=["report alone", "cf_weight"])
def test_another_cf_model_makes_ids_anew_only_where_they_are_made_of_it(workdir, tmp_path, agrees):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    settings = {"method": "rq_vae", "rq_vae": {"cf_weight": 0.1}} if agrees else {}
    first = _make(tmp_path, **settings)
    config = tiny_workdir.make_config(tmp_path, "any")
    config.cf.update(model="sasrec", max_epochs=1, history_length=4)
    config.cf.sasrec.units = 6
    shutil.rmtree(tmp_path / "cf")
    run_cf(config.cf, load(tmp_path / "data"), tmp_path, history_length=4)
    again = _make(tmp_path, cf=config.cf, **settings)
    assert again["cf"]["entropy"] != first["cf"]["entropy"]
    assert (again["seconds"] == first["seconds"]) != agrees
    assert ("sharing" in again, again["levels"]["a"]["left"] > 0) == (True, True)
    hotter = _make(tmp_path, cf=config.cf, beta=3.0, **settings)
    assert hotter["cf"]["entropy"] > again["cf"]["entropy"]
    assert hotter["seconds"] == again["seconds"]


@pytest.mark.parametrize("broken", ["quantise_items", "write_ids", "write_report"])
def test_a_call_that_fails_leaves_no_ids_without_what_they_were_made_from(
    workdir, tmp_path, monkeypatch, broken
):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    _make(tmp_path, seed=3)
    before = (tmp_path / "ids" / "ids.json").read_bytes()

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, broken, fail)
        with pytest.raises(KeyboardInterrupt):
            _make(tmp_path, seed=4)
    files = {name: (tmp_path / "ids" / name).is_file() for name in ("ids.json", "report.json")}
    seed = Provenance.load(tmp_path / "ids").inputs["ids.seed"]
    assert (*files.values(), seed) == {
        "quantise_items": (True, True, 3),
        "write_ids": (False, False, 4),
        "write_report": (True, False, 4),
    }[broken]
    if broken == "quantise_items":
        assert (tmp_path / "ids" / "ids.json").read_bytes() == before
    report = _make(tmp_path, seed=4)
    assert report == json.loads((tmp_path / "ids" / "report.json").read_text())
    assert report["provenance"]["inputs"]["SHA-256 of ids"] == file_sha256(
        tmp_path / "ids" / "ids.json"
    )


def test_ids_of_embeddings_that_are_no_more_are_stale(workdir, tmp_path):
    shutil.copytree(workdir / "data", tmp_path / "data")
    folder = tmp_path / "item_embeddings"
    folder.mkdir()
    shutil.copy(workdir / "vectors.npy", folder / "embeddings.npy")
    catalogue = load(tmp_path / "data").catalogue.content_hash()
    for pooling in ("mean", "last"):
        inputs = {"catalogue": catalogue, "embedding.pooling": pooling}
        Provenance("item embeddings", "launch/embed_items.py", inputs).save(folder)
        if pooling == "mean":
            _make(tmp_path, item_vectors=None)
            assert Status(tmp_path).rows()["ids"]["state"] == "up to date"
    assert "stale: item embeddings was " in Status(tmp_path).rows()["ids"]["state"]
    _make(tmp_path, item_vectors=None)
    assert Status(tmp_path).rows()["ids"]["state"] == "up to date"


def test_a_report_on_the_ids_of_others(workdir):
    _make(workdir)
    theirs = workdir / "theirs.json"
    shutil.copy(workdir / "ids" / "ids.json", theirs)
    made = json.loads((workdir / "ids" / "report.json").read_text())
    ours = {path: path.read_bytes() for path in (workdir / "ids").iterdir()}
    report = _make(workdir, path=str(theirs))
    assert {path: path.read_bytes() for path in (workdir / "ids").iterdir()} == ours
    saved = workdir / "ids_of_others" / "report.json"
    assert json.loads(saved.read_text()) == report
    assert not saved.with_name("provenance.json").exists()
    assert Status(workdir).rows()["ids_of_others/report.json"]["what"] == "report on semantic ids"
    assert report["path"] == str(theirs)
    assert report["cf"] == made["cf"]
    assert "sharing" not in report


def test_without_cf_logits_the_report_leaves_them_out(workdir, tmp_path):
    shutil.copytree(workdir / "data", tmp_path / "data")
    shutil.copy(workdir / "vectors.npy", tmp_path)
    shutil.copy(workdir / "interactions.csv", tmp_path)
    report = _make(tmp_path, collisions="none")
    assert "cf" not in report
    assert report["items that share an id"] >= 2
    with pytest.raises(UserError, match="cf_weight is 0.1: it needs the item vectors of factor"):
        _make(tmp_path, method="rq_vae", rq_vae={"cf_weight": 0.1})


def test_ids_of_another_catalogue_are_stale(workdir):
    _make(workdir)
    catalogue = load(workdir / "data").catalogue
    renamed = dataclasses.replace(catalogue, titles=("another", *catalogue.titles[1:]))
    with pytest.raises(StaleError, match="semantic ids was made from other inputs: catalogue was"):
        catalogue_ids(ids_path(None, workdir), renamed)
    with pytest.raises(UserError, match=r"no such file of ids; launch/make_ids.py makes some"):
        catalogue_ids(ids_path(None, workdir / "nowhere"), catalogue)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"item_vectors": "nowhere.npy"}, "nowhere.npy: no such file of item vectors"),
        ({"path": "nowhere.json"}, "ids.path: nowhere.json does not exist"),
        ({"codes": ()}, "ids.codes is .*: expected 1 to 25 levels"),
        ({"codes": (4, 0)}, "ids.codes is .*: expected at least 1"),
        ({"rq_vae": {"learning_rate": 0.0}}, "ids.rq_vae.learning_rate is 0.0"),
    ],
)
def test_refuses_before_any_work(workdir, changes, expected):
    with pytest.raises(UserError, match=expected):
        _make(workdir, **changes)


def test_the_script_prints_the_report(workdir):
    config = workdir / "config.py"
    config.write_text(
        "import tiny_workdir\nfrom pathlib import Path\n"
        f"get_config = lambda arg='': tiny_workdir.make_config(Path({str(workdir)!r}), 'any')\n"
    )
    script = Path(__file__).parents[2] / "launch" / "make_ids.py"
    command = [str(script), f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.ids.item_vectors={workdir}/vectors.npy", "--config.ids.codes=(4,4)"]
    done = Script(command, {}).completed()
    assert done.returncode == 0, done.stderr
    assert "1: <a_..>" in done.stdout
    assert "12 items, 12 ids, 0 items share theirs with another one." in done.stdout
    refused = Script([*command[:-1], "--config.ids.codes=(4,0)"], {}).completed()
    assert refused.returncode == 1
    assert "make_ids: ids.codes is (4, 0): expected at least 1" in refused.stderr
