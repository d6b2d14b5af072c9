import pytest

from tca4rec_jax.data.movielens import read_movielens, readable_title


@pytest.mark.parametrize(
    ("stored", "year", "readable"),
    [
        ("Toy Story", "1995", "Toy Story (1995)"),
        ("Usual Suspects, The", "1995", "The Usual Suspects (1995)"),
        ("Good, The Bad and The Ugly, The", "1966", "The Good, The Bad and The Ugly (1966)"),
        ("American in Paris, An", "1951", "An American in Paris (1951)"),
        ("Fish Called Wanda, A", "1988", "A Fish Called Wanda (1988)"),
        ("Postino, Il", "1994", "Il Postino (1994)"),
        ("Enfer, L'", "1994", "L'Enfer (1994)"),
        ("Boot, Das", "1981", "Das Boot (1981)"),
        ("Contempt (Mépris, Le)", "1963", "Contempt (Le Mépris) (1963)"),
        ("Star Maker, The (Uomo, L')", "1995", "The Star Maker (L'Uomo) (1995)"),
        ("Die xue shuang xiong (Killer, The)", "1989", "Die xue shuang xiong (The Killer) (1989)"),
        ("Convent, The (Convento, O)", "1995", "The Convent (O Convento) (1995)"),
        ("Paris, Texas", "1984", "Paris, Texas (1984)"),
        ("Cry, the Beloved Country", "1995", "Cry, the Beloved Country (1995)"),
        ("Corrina, Corrina", "1994", "Corrina, Corrina (1994)"),
        ("To Have, or Not", "1995", "To Have, or Not (1995)"),
        ("Two\nLines (Film, Le)", "1990", "Two\nLines (Le Film) (1990)"),
        ("unknown", "", "unknown"),
        ("The Great Giving (1995)", "V", "The Great Giving (1995)"),
    ],
)  # fmt: skip
def test_titles_read_as_people_write_them(stored, year, readable):
    assert readable_title(stored, year) == readable


def _write(folder, items, ratings):
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    (folder / "ml-100k.item").write_text(header + items, encoding="utf-8")
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "ml-100k.inter").write_text(header + ratings)


def test_the_files_are_read(tmp_path):
    items = "7\tMisérables, Les\t1995\tDrama\n3\tunknown\t\tunknown\n"
    _write(tmp_path, items, "196\t3\t3\t881250949\n9\t7\t1\t891717742\n")
    catalogue, interactions = read_movielens(tmp_path)
    assert catalogue.item_ids == ("7", "3")
    assert catalogue.titles == ("Les Misérables (1995)", "unknown")
    assert interactions.item.tolist() == [1, 0]
    assert interactions.timestamp.tolist() == [881250949, 891717742]
    assert read_movielens(tmp_path, max_title_length=5)[0].titles == ("Les M", "unkno")


def test_ratings_are_read_on_request(tmp_path):
    items = "7\tMisérables, Les\t1995\tDrama\n3\tunknown\t\tunknown\n"
    _write(tmp_path, items, "196\t3\t3\t881250949\n9\t7\t4\t891717742\n")
    rating = {"rating": "rating"}
    assert read_movielens(tmp_path)[1].rating is None
    assert read_movielens(tmp_path, rating=rating)[1].rating.tolist() == [3, 4]


def test_year_and_genres_are_attributes(tmp_path):
    items = "7\tMisérables, Les\t1995\tDrama Sci-Fi\n3\tunknown\t\tunknown\n"
    _write(tmp_path, items, "196\t3\t3\t881250949\n")
    catalogue, _ = read_movielens(tmp_path, attributes=("category", "year"))
    assert catalogue.attributes == {"category": ("Drama, Sci-Fi", "unknown"), "year": ("1995", "")}
    with pytest.raises(ValueError, match="data.attributes is 'brand': expected one of 'year', 'ca"):
        read_movielens(tmp_path, attributes=("brand",))


def test_an_empty_title_and_an_unknown_item_are_named(tmp_path):
    _write(tmp_path, "7\t\t1995\tDrama\n", "196\t7\t3\t881250949\n")
    with pytest.raises(ValueError, match=r"ml-100k\.item, row 1: movie_title is ''"):
        read_movielens(tmp_path)
    _write(tmp_path, "7\tSeven\t1995\tDrama\n", "196\t8\t3\t881250949\n")
    with pytest.raises(ValueError, match=r"ml-100k\.inter, row 1: 1 items are not in .* \['8'\]"):
        read_movielens(tmp_path)
