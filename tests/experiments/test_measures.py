"""Agreement with a CF model, and what an LLM writes without the trie, against plain Python."""

import numpy as np
import pytest
import scipy.stats
import tiny_workdir
from flax import nnx

from tca4rec_jax.cf.logits_store import split_path
from tca4rec_jax.core.collaborative_tokenizer import DENSE
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.evaluation.rankings import (
    CF,
    EvaluationRows,
    cf_models,
    rank_cf_models,
)
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.experiments import fluency
from tca4rec_jax.experiments.measures import agreement, agreement_with, listed_cf_ranks


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny_workdir.make_workdir(path)
    return Experiment(tiny_workdir.make_config(path, "run"), path)


def lists_of(rng, rows, items, places):
    lists_RxM = np.stack([rng.permutation(items)[:places] for _ in range(rows)])
    lengths_R = rng.integers(0, places + 1, rows)
    lengths_R[0] = places
    return np.where(np.arange(places) < lengths_R[:, None], lists_RxM, -1)


def test_tied_items_share_the_mean_of_their_places_among_allowed_items():
    rng = np.random.default_rng(0)
    logits_RxI = rng.integers(0, 6, (9, 12)).astype(np.float32)  # with ties
    allowed_RxI, lists_RxM = rng.random((9, 12)) < 0.7, lists_of(rng, 9, 12, 4)
    for allowed in (None, allowed_RxI):
        found = listed_cf_ranks(logits_RxI, DENSE, lists_RxM, allowed=allowed)
        for row, items_M in enumerate(lists_RxM.tolist()):
            inside = np.ones(12, bool) if allowed is None else allowed[row]
            place = scipy.stats.rankdata(-np.where(inside, logits_RxI[row], -np.inf)) - 1
            assert found[row].tolist() == [-1 if i < 0 else place[i] for i in items_M]


def test_agreement_is_what_loops_over_rows_and_pairs_count():
    rank_RxM = lists_of(np.random.default_rng(1), 30, 9, 4)
    rank_RxM = np.where(rank_RxM > 5, 7, rank_RxM)  # the CF model does not tell 6, 7 and 8 apart
    lists = [[rank for rank in row if rank >= 0] for row in rank_RxM.tolist()]
    listed = [row for row in lists if row]
    ordered = [row for row in lists if len({*row}) > 1]
    taus = [scipy.stats.kendalltau(range(len(row)), row).statistic for row in ordered]
    assert agreement(rank_RxM) == pytest.approx(
        {
            "cf rank of the first": np.mean([row[0] + 1 for row in listed]),
            "cf rank of the list": np.mean([np.mean(row) + 1 for row in listed]),
            "first of both": np.mean([row[0] == 0 for row in listed]),
            "overlap": np.mean([np.mean([rank < len(row) for rank in row]) for row in listed]),
            "kendall tau": np.mean(taus),
        }
    )
    own = agreement(np.tile(np.arange(4), (3, 1)))
    assert own == {
        "cf rank of the first": 1,
        "cf rank of the list": 2.5,
        "first of both": 1,
        "overlap": 1,
        "kendall tau": 1,
    }
    assert agreement(np.full((3, 4), -1)) == {}


def test_lists_of_items_that_a_cf_model_does_not_tell_apart_have_no_order():
    """As those that a store cut to its best three does not hold: the catalogue's order is none."""
    logits_RxI = np.tile(np.float32([9, 8, 7, *[0] * 7]), (2, 1))
    rank_RxM = listed_cf_ranks(logits_RxI, DENSE, np.array([[3, 5, 9], [9, 5, 3]]))
    assert rank_RxM.tolist() == [[6, 6, 6]] * 2
    found = agreement(rank_RxM)
    assert found["cf rank of the first"] == found["cf rank of the list"] == 7
    assert "kendall tau" not in found


def test_a_cf_models_own_lists_agree_with_it(experiment):
    rows = EvaluationRows.of(experiment)
    ranking = rank_cf_models(experiment, rows, cf_models(experiment, rows))[CF]
    store = split_path(None, experiment.workdir, rows.split)
    found = agreement_with(store, experiment, rows, ranking.items_RxM)
    assert found["kendall tau"] == found["overlap"] == 1


def test_likelihoods_and_texts_are_those_that_plain_python_finds(experiment, monkeypatch):
    """By a dictionary of prefixes, and by reading every text anew."""
    written = []
    monkeypatch.setattr(fluency, "_are_titles", lambda *of: written.append(of[1:]) or np.ones(1))
    rows, decoder = EvaluationRows.of(experiment), experiment.inference_decoder("")
    numbers = fluency.fluency(experiment, rows, decoder)
    prompts, trie = experiment.prompts(rows.history_RxH).tokens, experiment.trie
    titles = [trie.tokens_QxL[q, : trie.lengths_Q[q]].tolist() for q in trie.leaf_of_item]
    texts = [[*prompts[row], *titles[item]] for row, item in enumerate(rows.target_R)]
    padded = np.array([text + [0] * (48 - len(text)) for text in texts], np.int32)
    read = nnx.jit(lambda model, tokens, length: model.head()(model.hidden(tokens, length)))

    ((text_RxTg, length_R),) = written
    end, most = trie.tokens_QxL[0, trie.lengths_Q[0] - 1], trie.tokens_QxL.shape[1]
    likeliest = [[*prompts[row]] for row in range(len(rows))]
    for _ in range(most):
        lengths = np.array(list(map(len, likeliest)))
        tokens = np.array([text + [0] * (48 - len(text)) for text in likeliest], np.int32)
        states = np.asarray(read(decoder, tokens, lengths))
        for text, of_row in zip(likeliest, states, strict=True):
            text.append(int(of_row[len(text) - 1].argmax()))
    for row, text in enumerate(likeliest):
        after = text[len(prompts[row]) :]
        length = after.index(end) if end in after else most
        assert length_R[row] == length
        assert text_RxTg[row, :length].tolist() == after[:length]

    logits = np.asarray(read(decoder, padded, np.array(list(map(len, texts)))), np.float64)
    of_tokens, of_decisions = [], {}
    for row, item in enumerate(rows.target_R):
        title, made = titles[item], 0
        for place, token in enumerate(title):
            z = logits[row, len(prompts[row]) - 1 + place]
            of_tokens.append(np.log(np.exp(z).sum()) - z[token])
            children = {other[place] for other in titles if other[:place] == title[:place]}
            if len(children) > 1:
                nll = np.log(np.exp(z[list(children)]).sum()) - z[token]
                of_decisions.setdefault(made, []).append(nll)
                made += 1
    assert numbers["perplexity"] == pytest.approx(np.exp(np.mean(of_tokens)), rel=1e-4)
    expected = [np.mean(of_decisions[made]) for made in sorted(of_decisions)]
    assert numbers["nll by decision"] == pytest.approx(expected, rel=1e-4)
    assert numbers["rows by decision"] == [len(of_decisions[made]) for made in sorted(of_decisions)]
    assert numbers["rows"] == len(rows)
    assert numbers["written titles"] == 1  # as patched


def test_a_sample_of_the_rows_is_read(experiment, monkeypatch):
    monkeypatch.setattr(fluency, "ROWS", 2)
    rows = EvaluationRows.of(experiment)
    some = fluency._some(rows, 0)
    at = np.flatnonzero(np.isin(rows.position_R, some.position_R))
    assert len(some) == len(at) == 2
    assert some.target_R.tolist() == rows.target_R[at].tolist()
    assert some.sequences.user.tolist() == rows.sequences.user[at].tolist()


def test_a_text_is_a_title_if_it_ends_where_one_does():
    titles, end = [(3, 4), (3, 4, 5), (6,)], 9
    trie = ItemTrie.build([[*title, end] for title in titles])
    assert fluency._end_token(trie) == end
    most = trie.tokens_QxL.shape[1]
    texts = [(3, 4), (3,), (6,), (6, 6), (3, 4, 5), (3, 4, 5, 5), (3, 5), (4, 3)]
    text_RxTg = np.full((len(texts), most), 8)  # undefined after the length
    for row, text in enumerate(texts):
        text_RxTg[row, : len(text)] = text
    found = fluency._are_titles(trie, text_RxTg, np.array(list(map(len, texts))))
    assert found.tolist() == [text in titles for text in texts]
    assert fluency._end_token(ItemTrie.build([[1, 2], [1, 3]])) is None
