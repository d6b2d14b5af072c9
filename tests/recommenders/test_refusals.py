"""What a recommender cannot be made of is refused before a weight of the LLM is read."""

import json
from dataclasses import replace

import numpy as np
import pytest
from recommenders.kinds import experiment_of, make_workdir_of
from safetensors.numpy import save_file
from tiny_workdir import ITEMS, make_workdir

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import read_json, write_text
from tca4rec_jax.llm import sources
from tca4rec_jax.train import load_batches, train

TITLES, IDS, VECTORS = "titles", "ids, new rows", "tca features"


class WeightsAreRead(Exception):
    """By a training that nothing is wrong with."""


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """By kind."""
    path = tmp_path_factory.mktemp("refusals")
    (path / "tiny").mkdir()
    make_workdir(path / "tiny")
    for kind in (TITLES, IDS, VECTORS):
        make_workdir_of(kind, path / "tiny", path / kind)
    return {kind: path / kind for kind in (TITLES, IDS, VECTORS)}


def lacking_an_item(listed):
    return {item: tokens for item, tokens in listed.items() if item != "7"}


def one_level_too_far(listed):
    return listed | {"7": [*listed["7"][:1], listed["7"][0]]}


def cut_short(listed):
    return listed | {"7": listed["7"][:1]}


def ids(change):
    def write(workdir, folder):
        listed = change(read_json(workdir / "ids" / "ids.json"))
        write_text(folder / "mine.json", json.dumps(listed))
        return {"ids__path": str(folder / "mine.json")}

    return IDS, write


def item_vectors(count, width):
    def write(_, folder):
        np.save(folder / "mine.npy", np.ones((count, width), np.float32))
        return {"projector__vectors": str(folder / "mine.npy")}

    return VECTORS, write


def projector(inputs, outputs=64):
    def write(_, folder):
        sizes = {"0": (20, inputs), "2": (outputs, 20)}
        tensors = {f"{n}.weight": np.ones(shape, np.float32) for n, shape in sizes.items()}
        tensors |= {f"{n}.bias": np.ones(shape[0], np.float32) for n, shape in sizes.items()}
        save_file(tensors, folder / "mine.safetensors", metadata={"activation": "relu"})
        return {"projector__weights": str(folder / "mine.safetensors")}

    return VECTORS, write


def fields(kind=VECTORS, **changes):
    return kind, lambda *_: changes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ids(lacking_an_item), r"mine.json: 1 of 12 items have no id, such as '7'; make ids of"),
        (ids(one_level_too_far), r"mine.json: item '7' has .* level 2, another item at level 1"),
        (ids(cut_short), r"mine.json: the id of item '7', .*: give both as many tokens"),
        (item_vectors(ITEMS, 5), r"width 6, projector.vectors 5: give item vectors of the same"),
        (item_vectors(ITEMS - 1, 6), r"mine.npy has vectors of 11 items, the catalogue 12: exp"),
        (projector(5), r"mine.safetensors takes .* width 5, but those here have 6: give the CF"),
        (projector(6, outputs=32), r"mine.safetensors: tensors.*2.weight.*expected \(64, 20\)"),
        (fields(prompt__templates=("q{target}",)), r"prompt.templates has .* {history} once"),
        (fields(prompt__templates=("q{history}",)), r"prompt.templates has .* {target} once, at"),
        (fields(prompt__placeholder="b"), r"item '1': .* contains prompt.placeholder .*: change"),
        (fields(training__targets="all"), r"set training.targets=last"),
        (fields(lora__train=False, projector__train=False), r"nothing is trained: lora.train"),
    ],
)
def test_no_weight_is_read(workdirs, tmp_path, monkeypatch, given, message):
    def read(*_, **__):
        raise WeightsAreRead

    kind, write = given
    workdir = workdirs[kind]
    changes = write(workdir, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "load_weights", read)
        with pytest.raises(UserError, match=message) as error:
            train(experiment_of(kind, workdir, "refused", **changes))
        assert "\n" not in str(error.value)
        with pytest.raises(WeightsAreRead):
            train(experiment_of(kind, workdir, "refused"))


def test_items_are_named_by_their_ids(workdirs):
    """Not by their numbers, which may be other items' ids."""

    def experiment(**changes):
        made = experiment_of(TITLES, workdirs[TITLES], "named", **changes)
        item_ids = tuple(str(ITEMS - number) for number in range(ITEMS))
        catalogue = replace(made.data.catalogue, item_ids=item_ids)
        made.__dict__["data"] = replace(made.data, catalogue=catalogue)
        return made

    with pytest.raises(UserError, match=r"item '11': .* contains prompt.end"):
        _ = experiment(prompt__end="b").items
    with pytest.raises(UserError, match=r"the title of item '\d+' has 4 tokens") as error:
        load_batches(experiment(prompt__max_tokens=4))
    first = experiment().data.splits["train_sequences"].items[0]
    assert f"item '{ITEMS - first}'" in str(error.value)
    prefix, written = experiment(), Ragged.of([[3], [4, 5], [4]], np.int32)
    prefix.__dict__["items"] = replace(prefix.items, written=written)
    with pytest.raises(UserError, match=r"tokens of item '10' are a prefix of those of item '11'"):
        _ = prefix.trie
