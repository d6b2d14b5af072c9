"""ItemTrie: shared titles, refused sequences, and its file. See test_properties.py for the rest."""

import numpy as np
import pytest

from tca4rec_jax.core.trie import ItemTrie, trie_hash
from tca4rec_jax.data.ragged import Ragged

END = 0
HASH = trie_hash("catalogue", "tokenizer", " ", "\n")


def test_items_that_share_a_title_share_a_leaf():
    trie = ItemTrie.build([[5, END], [3, END], [5, END]])
    items, offsets = trie.items_by_leaf
    assert trie.leaf_of_item.tolist() == [1, 0, 1]
    assert items[offsets[1] : offsets[2]].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "empty"),
        ([[1, END], []], "item 1 has no tokens"),
        ([[1, END], [1, -7, END]], "item 1 has a negative token"),
        ([[1, 2, 3], [1, 2]], "tokens of item 1 are a prefix of those of item 0"),
    ],
)
def test_bad_sequences_are_named(sequences, message):
    with pytest.raises(ValueError, match=message):
        ItemTrie.build(sequences)
    values = np.array([token for sequence in sequences for token in sequence], np.int32)
    with pytest.raises(ValueError, match=message):
        ItemTrie.build(Ragged.from_lengths(values, [len(sequence) for sequence in sequences]))


def save_small_trie(folder):
    path = folder / "trie.npz"
    ItemTrie.build([[1, 2, END], [1, END]]).save(path, HASH)
    return path


def test_a_stale_trie_is_refused(tmp_path):
    path = save_small_trie(tmp_path)
    other = trie_hash("catalogue", "another tokenizer", " ", "\n")
    with pytest.raises(ValueError, match=r"trie\.npz was made from another catalogue or tokenizer"):
        ItemTrie.load(path, other)


def test_another_version_is_refused(tmp_path, monkeypatch):
    path = save_small_trie(tmp_path)
    monkeypatch.setattr("tca4rec_jax.core.trie._VERSION", 2)
    with pytest.raises(ValueError, match=r"trie\.npz is a trie file of version 1"):
        ItemTrie.load(path, HASH)


def write_text(path):
    path.write_text("a trie?")


def write_nothing(path):
    path.write_bytes(b"")


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_byte(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"\x93NUMPY") + 130] ^= 1  # inside an array
    path.write_bytes(data)


def write_a_bare_array(path):
    with path.open("wb") as file:
        np.save(file, np.arange(3))


def write_other_arrays(path):
    np.savez(path, version=[1, 2], parent=np.arange(3))


def drop_an_array(path):
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored if name != "depth"}
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "damage",
    [
        write_text,
        write_nothing,
        cut_in_half,
        change_a_byte,
        write_a_bare_array,
        write_other_arrays,
        drop_an_array,
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, damage):
    path = save_small_trie(tmp_path)
    damage(path)
    with pytest.raises(ValueError, match=r"trie\.npz is .*delete it and build the trie again"):
        ItemTrie.load(path, HASH)


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        ItemTrie.load(tmp_path / "none.npz", HASH)


def test_a_failed_save_leaves_the_file_there_was(tmp_path, monkeypatch):
    path = save_small_trie(tmp_path)

    def write_a_part(file, **arrays):
        file.write(b"PK")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", write_a_part)
    with pytest.raises(OSError, match="no space"):
        ItemTrie.build([[3, END]]).save(path, HASH)
    assert [file.name for file in tmp_path.iterdir()] == ["trie.npz"]
    assert ItemTrie.load(path, HASH).num_leaves == 2


def test_trie_hash_depends_on_every_text_and_its_boundaries():
    parts = [("a", "b"), ("ab", ""), ("a", "b", ""), ("a", "b", " "), ("b", "a")]
    assert len({trie_hash(*texts) for texts in parts}) == len(parts)
    assert trie_hash(*parts[0]) == trie_hash(*parts[0])
