"""The id report, against brute force."""

import json

import numpy as np
import pytest

from tca4rec_jax.core.collaborative_tokenizer import DENSE, CFItems
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.semantic_ids.ids import SemanticIds
from tca4rec_jax.semantic_ids.report import (
    CFRows,
    describe,
    level_rows,
    lines_of,
    resolved_entropy,
    write_report,
)

ITEMS = 30


def _ids(seed=0):
    """Of two to four tokens; the last two items share theirs."""
    rng = np.random.default_rng(seed)
    rows = [[f"<a_{rng.integers(3)}>", f"<b_{rng.integers(3)}>"] for _ in range(ITEMS - 2)]
    for number, row in enumerate(rows):  # unique, and none a prefix of another
        row += [f"<c_{number}>"] + ([f"<d_{number % 2}>"] if number % 3 == 0 else [])
    rows += [["<a_0>", "<b_7>"]] * 2
    return SemanticIds.of(rows, list(map(str, range(ITEMS)))), rows


def _by_brute_force(rows, p_I):
    """Entropy of the items, and the mutual information of item and token given the prefix."""
    resolved = []
    for level in range(max(map(len, rows))):
        total = 0.0
        for prefix in {tuple(row[:level]) for row in rows if len(row) > level}:
            below = [i for i, row in enumerate(rows) if tuple(row[:level]) == prefix]
            mass = p_I[below].sum()
            for token in {rows[i][level] for i in below}:
                joint = sum(p_I[i] for i in below if rows[i][level] == token)
                total -= joint * np.log(joint / mass)
        resolved.append(total)
    return -(p_I * np.log(p_I)).sum(), resolved


@pytest.mark.parametrize("factorised", [False, True])
def test_what_levels_resolve_is_what_brute_force_says(factorised):
    ids, rows = _ids()
    rng, beta = np.random.default_rng(1), 0.7
    table_IxD, vector_UxD = rng.normal(size=(ITEMS, 4)), 2 * rng.normal(size=(5, 4))
    logits_UxI = vector_UxD @ table_IxD.T
    cf = CFRows(logits_UxI.astype(np.float32), DENSE, beta)
    if factorised:
        items = CFItems(table_IxD.astype(np.float32), None)
        cf = CFRows(vector_UxD.astype(np.float32), items, beta)
    entropy, resolved_L = resolved_entropy(ItemTrie.build(ids.codes), cf)
    p_UxI = np.exp(logits_UxI / beta)
    p_UxI /= p_UxI.sum(axis=1, keepdims=True)
    found = [_by_brute_force(rows, p_I) for p_I in p_UxI]
    assert entropy == pytest.approx(np.mean([one[0] for one in found]), rel=1e-5)
    np.testing.assert_allclose(resolved_L, np.mean([one[1] for one in found], axis=0), rtol=1e-5)
    within = np.mean([p_I[-2:].sum() * _two(p_I[-2:]) for p_I in p_UxI])
    assert entropy - resolved_L.sum() == pytest.approx(within, rel=1e-3)


def _two(mass):
    share = mass / mass.sum()
    return -(share * np.log(share)).sum()


def test_extreme_logits_resolve_nothing_more_and_stay_finite():
    ids, _ = _ids()
    logits_UxI = np.full((1, ITEMS), -200.0, np.float32)
    logits_UxI[0, 3] = 200.0
    entropy, resolved_L = resolved_entropy(
        ItemTrie.build(ids.codes), CFRows(logits_UxI, DENSE, 1.0)
    )
    assert entropy == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(resolved_L, 0, atol=1e-5)


def test_counts_of_a_level():
    rows = [["<a_1>", "<b_1>"], ["<a_1>", "<b_2>"], ["<a_2>", "<b_1>"], ["<a_1>", "<b_2>"]]
    report = describe(SemanticIds.of(rows, list("abcd")))
    assert (report["items"], report["ids"], report["items that share an id"]) == (4, 3, 2)
    first, second = report["levels"].values()
    assert (first["tokens"], first["prefixes"], second["tokens"], second["prefixes"]) == (
        2,
        2,
        2,
        3,
    )
    assert first["entropy"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert second["perplexity"] == pytest.approx(2)
    counted = SemanticIds.of([["<a_1>", "<b_0>"], ["<a_1>", "<b_1>"], ["<a_2>"]], list("abc"))
    assert [level["prefixes"] for level in describe(counted)["levels"].values()] == [2, 3]
    assert "4 items, 3 ids, 2 items share theirs with another one." in lines_of(report)


def test_the_longest_ids_have_a_name_for_every_level():
    report = describe(SemanticIds.of([[f"<{level}>" for level in range(26)]], ["a"]))
    assert "".join(report["levels"]) == "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("with_cf", [False, True])
def test_writes_numbers_table_and_picture(tmp_path, with_cf):
    ids, _ = _ids()
    cf = CFRows(np.zeros((2, ITEMS), np.float32), DENSE, 1.0) if with_cf else None
    report = describe(ids, cf)
    write_report(tmp_path, report, ids)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert ("share of it" in (tmp_path / "report.md").read_text()) == with_cf
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(level_rows(report)) == 4
    if with_cf:  # everything is as likely: the levels resolve the ids' entropy
        nats = sum(level["cf_nats"] for level in report["levels"].values())
        assert nats == pytest.approx(np.log(ITEMS) - 2 / ITEMS * np.log(2), rel=1e-5)
