"""New rows of the vocabulary, against a decoder whose tables have them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder, init_params
from tca4rec_jax.llm.from_scratch import id_tokenizer
from tca4rec_jax.llm.vocabulary import NewRow, NewRows, init_new_rows, with_tokens

NEW, OLD = 5, 61
TOKENS = np.random.default_rng(0).integers(0, 58 + NEW, (3, 9)).astype(np.int32)
LENGTHS = np.array([9, 5, 7])


def make(tied, first):
    """The decoder with new rows from token `first` on, and one whose tables have them."""
    config = DecoderConfig(OLD, 32, 48, 2, 6, 2, 8, tie_embeddings=tied, embedding_scale=3.0)
    params = init_params(config, jax.random.key(0))
    rows = NewRows(config, first, init_new_rows(config, NEW, params, jax.random.key(1)))
    wider = dataclasses.replace(config, vocab_size=max(OLD, first + NEW))
    return Decoder(config, params, new_rows=rows), Decoder(wider, rows.merge(params))


@pytest.mark.parametrize("first", [OLD, 58, 50])  # at the end of the table, across it, inside
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_as_good_as_rows_of_the_tables(tied, first):
    ours, merged = make(tied, first)
    some = jnp.array([0, 7, first, first + NEW - 1])
    for tokens in (TOKENS, np.full_like(TOKENS, first + NEW - 1)):
        tokens = np.minimum(tokens, first + NEW - 1)
        states, same = (one.hidden(tokens, LENGTHS) for one in (ours, merged))
        np.testing.assert_allclose(states, same, rtol=1e-6, atol=1e-6)
        logits = ours.head()(states)
        np.testing.assert_allclose(logits, merged.head()(states), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours.head(some)(states), logits[..., some], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_their_gradients_are_those_of_the_tables(tied):
    def gradients(decoder, kind):
        graph, params, rest = nnx.split(decoder, kind, ...)

        def loss(params):
            decoder = nnx.merge(graph, params, rest)
            states = decoder.hidden(TOKENS, LENGTHS)
            return jnp.sum(jax.nn.logsumexp(decoder.head()(states), axis=-1))

        return nnx.to_pure_dict(jax.grad(loss)(params))

    ours, merged = make(tied, OLD)
    found, expected = gradients(ours, NewRow), gradients(merged, nnx.Param)
    tables = found["new_rows"]["tables"]
    assert found.keys() == {"new_rows"}
    np.testing.assert_allclose(
        tables["embedding"], expected["embedding"][OLD:], rtol=1e-4, atol=1e-5
    )
    if not tied:
        np.testing.assert_allclose(
            tables["lm_head"], expected["lm_head"][:, OLD:], rtol=1e-4, atol=1e-5
        )


def test_new_rows_are_drawn_like_the_old_ones():
    config = DecoderConfig(OLD, 4, 48, 1, 2, 2, 2)
    scale = np.array([0.1, 1.0, 2.0, 3.0])
    table = np.random.default_rng(0).normal(5.0, scale, (OLD, 4)).astype(np.float32)
    tables = {"embedding": table, "lm_head": table.T}
    rows = init_new_rows(config, 4000, tables, jax.random.key(0))
    for drawn in (rows["embedding"], rows["lm_head"].T):
        np.testing.assert_allclose(drawn.mean(0), table.mean(0), atol=0.2)
        np.testing.assert_allclose(drawn.std(0), table.std(0), rtol=0.1)
    assert not np.allclose(rows["embedding"], rows["lm_head"].T)


def test_rows_of_another_width_are_refused():
    config = DecoderConfig(OLD, 4, 48, 1, 2, 2, 2, tie_embeddings=True)
    with pytest.raises(UserError, match=r"embedding has shape \(3, 5\), expected \(3, 4\)"):
        NewRows(config, OLD, {"embedding": jnp.zeros((3, 5))})


def test_a_tokenizer_gets_what_it_lacks():
    known = id_tokenizer(["<a_1>"])
    tokenizer = with_tokens(known, ["<a_1>", "<a_12>", "<b_1>"])
    assert tokenizer("<b_1><a_1><a_12>", add_special_tokens=False)["input_ids"] == [5, 3, 4]
    assert len(known) == 4  # a copy was changed
