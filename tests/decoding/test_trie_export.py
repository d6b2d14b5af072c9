"""What is written beside an exported LLM gives the lists of the recommender: by our own decoder,
and by transformers where PyTorch is."""

import dataclasses
import importlib.util
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import oracle
import pytest
from flax import nnx
from tiny_catalogue import IDS, SEQUENCES, changed
from tiny_workdir import make_config, make_workdir

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.decoding.trie_export import CODE, _is_certain, write_trie
from tca4rec_jax.decoding.trie_logits_processor import (
    SGLangProcessor,
    TransformersProcessor,
    Trie,
    VLLMProcessor,
    generate_options,
    recommend,
    transformers_scores,
)
from tca4rec_jax.experiment import Experiment

needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs PyTorch")
MARK = 25  # in no title
HISTORIES = [["i4", "i6", "i2"], ["i0"], ["i9", "i9"], ["i11", "i3", "i7", "i1"]]


@nnx.jit
def log_probs(decoder, tokens_BxS, length_B):
    hidden_BxSxD = decoder.hidden(tokens_BxS, length_B)
    last_BxD = hidden_BxSxD[np.arange(len(tokens_BxS)), length_B - 1]
    return jax.nn.log_softmax(decoder.head(None)(last_BxD))


def scores_of(decoder, rows=16, longest=24):
    """As an engine gives them: log-probabilities of the vocabulary at a few tokens."""

    def scores(sequences, children):
        assert len(sequences) <= rows
        padded = Ragged.from_lengths(np.concatenate(sequences), list(map(len, sequences)))
        at = np.resize(np.arange(len(sequences)), rows)
        tokens_BxS = padded.pad(at, longest, 0).astype(np.int32)
        log_p_BxV = np.asarray(log_probs(decoder, tokens_BxS, padded.lengths[at]))
        return [log_p_V[tokens] for log_p_V, tokens in zip(log_p_BxV, children, strict=False)]

    return scores


def decoding(run, **fields):
    config = run.config.copy_and_resolve_references()
    config.decoding.update(fields)
    return changed(run, config=config)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.7, "exclude_history": True},
        {"mask": "after_softmax"},
        {"mask": "after_softmax", "length_penalty": 1.0},
        {"length_penalty": 0.5, "exclude_history": True},
    ],
)
def test_the_lists_are_those_of_the_recommender(run, tmp_path, fields):
    experiment = decoding(run, **fields)
    write_trie(experiment, tmp_path)
    trie, scores = Trie(tmp_path), scores_of(oracle.tiny_decoder())
    expected = Recommender(experiment, "any").recommend(HISTORIES, k=5)
    for history, wanted in zip(HISTORIES, expected, strict=True):
        found = recommend(trie, scores, history, k=5)
        assert [name for name, _, _ in found] == [one.item_id for one in wanted]
        assert [title for _, title, _ in found] == [one.title for one in wanted]
        expected_scores = [one.score for one in wanted]
        np.testing.assert_allclose([score for *_, score in found], expected_scores, atol=1e-4)


def test_prompts_are_those_of_training(run, tmp_path):
    experiment = decoding(run, exclude_history=False)
    experiment.config.prompt.max_tokens = 9
    write_trie(experiment, tmp_path)
    trie = Trie(tmp_path)
    for history in itertools.permutations([0, 1, 2, 6], 3):
        (expected,) = experiment.prompts(np.array([history])).tokens
        assert trie.prompt(history) == expected.tolist()
    with pytest.raises(ValueError, match="none of the history's 0 items fits"):
        trie.prompt([])
    with pytest.raises(KeyError, match="'i99' is no item id and no title"):
        trie.find(["i1", "i99"])
    trie.settings["max_tokens"] = 2
    with pytest.raises(ValueError, match="none of the history's 1 items fits"):
        trie.prompt([6])


def test_the_items_that_decoding_leaves_out_are_not_written(run, tmp_path):
    (tmp_path / "deny.txt").write_text("i3\ni7\n")
    write_trie(decoding(run, deny=str(tmp_path / "deny.txt")), tmp_path)
    trie = Trie(tmp_path)
    for title in SEQUENCES:
        named = [other for other in range(len(IDS)) if [*SEQUENCES[other]] == [*title]]
        assert trie.items(title) == [other for other in named if other not in (3, 7)]
    assert trie.without([0]).items(SEQUENCES[0]) == [i for i in trie.items(SEQUENCES[0]) if i]
    assert trie.items(SEQUENCES[0][:-1]) == trie.items((99,)) == []


def allowed_after(title):
    """By brute force."""
    return sorted(
        {one[len(title)] for one in SEQUENCES if [*one[: len(title)]] == [*title] != [*one]}
    )


@pytest.mark.parametrize("mask", ["before_softmax", "after_softmax"])
def test_processors_leave_the_log_probabilities_of_the_trie(run, tmp_path, mask):
    write_trie(decoding(run, mask=mask, temperature=0.5), tmp_path)
    trie = Trie(tmp_path)
    rng, end = np.random.default_rng(0), trie.settings["end"]
    titles = [SEQUENCES[5][:n] for n in range(len(SEQUENCES[5]) + 1)]
    logits = rng.normal(size=(len(titles), 32)).astype(np.float32)
    for title, row in zip(titles, logits, strict=True):
        (found,) = TransformersProcessor(trie, 2)(np.array([[5, 6, *title]]), row[None])
        allowed = allowed_after(title) or [end]
        assert np.flatnonzero(found > -np.inf).tolist() == allowed
        p = np.exp(2 * row.astype(np.float64))
        whole = p.sum() if mask == "after_softmax" else p[allowed].sum()
        expected = np.log(p[allowed] / whole) if title != titles[-1] else [0.0]
        np.testing.assert_allclose(found[allowed], expected, atol=1e-5)


def test_a_trie_without_items_holds_a_search_to_the_others(run, tmp_path):
    write_trie(run, tmp_path)
    trie, left_out = Trie(tmp_path), [5]
    of_another = {tuple(one) for item, one in enumerate(SEQUENCES) if item not in left_out}
    for title in SEQUENCES:
        for n in range(len(title)):
            searched = trie.without(left_out)
            (found,) = TransformersProcessor(searched, 2)(
                np.array([[5, 6, *title[:n]]]), np.zeros((1, 32), np.float32)
            )
            expected = {one[n] for one in of_another if one[:n] == tuple(title[:n]) and one[n:]}
            assert {*np.flatnonzero(found > -np.inf)} == (expected or {trie.settings["end"] or 0})


@pytest.fixture
def marked(run, tmp_path, monkeypatch):
    """An exported folder, as the code in it sees it: MARK stands before a title."""
    mark = Ragged.from_lengths(np.array([MARK], np.int32), [1])
    items = dataclasses.replace(run.items, after=mark)
    write_trie(changed(run, items=items), tmp_path)
    code = importlib.util.spec_from_file_location("trie_logits_processor", tmp_path / CODE)
    module = importlib.util.module_from_spec(code)
    code.loader.exec_module(module)
    return module


def held_to(logits, titles):
    """Whether every row is held to what may follow a title; None: the row is as it was."""
    for row, title in zip(logits, titles, strict=True):
        expected = np.arange(32).tolist() if title is None else allowed_after(title)
        assert np.flatnonzero(row > -np.inf).tolist() == expected


def test_rows_of_vllm_are_followed_as_they_come_go_and_move(marked):
    processor = marked.VLLMProcessor(None, "cpu", False)
    long, short = SEQUENCES[5], SEQUENCES[0]
    assert not processor.is_argmax_invariant()

    def update(removed=(), added=(), moved=()):
        added = [(row, None, prompt, generated) for row, prompt, generated in added]
        moved = [(one, other, SimpleNamespace(name=name)) for one, other, name in moved]
        processor.update_state(SimpleNamespace(removed=removed, added=added, moved=moved))
        return processor.apply(np.zeros((3, 32), np.float32))

    generated = []
    held_to(
        update(added=[(0, [5, MARK], generated), (2, [5, MARK, *long[:2]], [])]),
        [(), None, long[:2]],
    )
    generated.append(int(short[0]))  # a reference to the request's tokens
    processor.update_state(None)
    held_to(processor.apply(np.zeros((3, 32), np.float32)), [short[:1], None, long[:2]])
    held_to(update(moved=[(2, 1, "UNIDIRECTIONAL")]), [short[:1], long[:2], None])
    held_to(update(moved=[(0, 1, "SWAP")]), [long[:2], short[:1], None])
    held_to(update(removed=[0], moved=[(1, 0, "UNIDIRECTIONAL")]), [short[:1], None, None])
    with pytest.raises(ValueError, match="has not the tokens"):
        update(added=[(1, [5], [])])


def test_rows_of_sglang_are_held_to_the_trie(marked):
    rows = [SEQUENCES[5][:n] for n in (0, 1, 2)]
    given = [{"__req__": SimpleNamespace(output_ids=[*map(int, row)])} for row in rows]
    held_to(marked.SGLangProcessor()(np.zeros((3, 32), np.float32), given), rows)


def test_where_titles_begin_is_certain_or_not_said(run, tmp_path):
    titles = Ragged.from_lengths(np.array([1, 2, 3, 2, 2, 4]), [3, 3])
    for start, certain in (([5], True), ([], False), ([2], False), ([3, 2], True), ([2, 2], False)):
        assert _is_certain(np.array(start), titles) == certain
    write_trie(run, tmp_path)  # whose prompts end with the history
    with pytest.raises(ValueError, match="the text before a title is in titles too"):
        Trie(tmp_path).title_in([5, 6])
    assert isinstance(SGLangProcessor, type)
    assert isinstance(VLLMProcessor, type)


@needs_torch
@pytest.mark.parametrize("mask", ["before_softmax", "after_softmax"])
def test_transformers_finds_our_lists(tmp_path, mask):
    """For 50 users: by `recommend`, and by its own beam search with the rules 'huggingface'."""
    import torch
    from transformers import AutoModelForCausalLM

    make_workdir(tmp_path)
    config = make_config(tmp_path, "any")
    config.decoding.update(mask=mask, beams=4)
    experiment = Experiment(config, tmp_path)
    write_trie(experiment, tmp_path)
    model, trie = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), Trie(tmp_path)
    rng = np.random.default_rng(0)
    histories = [[str(item) for item in rng.integers(0, 12, 4)] for _ in range(50)]
    expected = Recommender(experiment, "").recommend(histories, k=4)
    for history, wanted in zip(histories, expected, strict=True):
        found = recommend(trie, transformers_scores(model), history, k=4)
        assert [name for name, _, _ in found] == [one.item_id for one in wanted]
        np.testing.assert_allclose([x for *_, x in found], [x.score for x in wanted], atol=1e-4)
    config.decoding.update(rules="huggingface" if mask == "after_softmax" else "exact")
    write_trie(experiment := Experiment(config, tmp_path), tmp_path)
    trie, expected = Trie(tmp_path), Recommender(experiment, "").recommend(histories, k=4)
    for history, wanted in zip(histories, expected, strict=True):
        prompt = trie.prompt(trie.find(history))
        titles = model.generate(torch.tensor([prompt]), **generate_options(trie, len(prompt)))
        end = trie.settings["end"]
        titles = [title[len(prompt) :].tolist() for title in titles]
        titles = [title[: title.index(end) + 1] for title in titles]
        found = [trie.item_ids[item] for title in titles for item in trie.items(title)]
        assert found[:4] == [one.item_id for one in wanted]
