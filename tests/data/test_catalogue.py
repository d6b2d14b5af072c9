import hashlib
import pickle

import pytest

from tca4rec_jax.data.catalogue import Catalogue


def test_indices():
    catalogue = Catalogue(("x", "y", "z"), ("One", "Two", "One"))
    assert catalogue.num_items == 3
    assert catalogue.find(["z", "nobody", "x"]).tolist() == [2, -1, 0]


def test_content_hash_depends_on_ids_titles_and_their_boundaries():
    catalogues = [
        Catalogue(("x", "y"), ("One", "Two")),
        Catalogue(("y", "x"), ("One", "Two")),
        Catalogue(("x", "y"), ("OneT", "wo")),
        Catalogue(("x", "y"), ("Two", "One")),
    ]
    assert len({catalogue.content_hash() for catalogue in catalogues}) == 4
    assert catalogues[0].content_hash() == Catalogue(("x", "y"), ("One", "Two")).content_hash()


def test_the_content_is_hashed_once(monkeypatch):
    catalogue = Catalogue(("x", "y"), ("One", "Two"))
    expected = Catalogue(("x", "y"), ("One", "Two")).content_hash()
    assert catalogue.content_hash() == expected
    monkeypatch.setattr(hashlib, "sha256", None)
    assert catalogue.content_hash() == expected
    assert pickle.loads(pickle.dumps(catalogue)).content_hash() == expected


@pytest.mark.parametrize(
    ("item_ids", "titles", "message"),
    [
        ((), (), "no items"),
        (("a", "b"), ("A",), "2 item ids but 1 titles"),
        (("a", "b", "a"), ("A", "B", "C"), r"item id 'a' occurs more than once.*item 2"),
        (("a", "b"), ("A", "  "), r"item 'b' \(index 1\) has an empty title"),
    ],
)
def test_bad_catalogues_are_refused(item_ids, titles, message):
    with pytest.raises(ValueError, match=message):
        Catalogue(item_ids, titles)
