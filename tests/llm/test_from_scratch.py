"""Decoders from scratch: their architectures, and the tokenizer of ids alone."""

from typing import get_args, get_type_hints

import pytest

from tca4rec_jax.data.item_tokens import tokenise_items
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.families import FAMILIES, config_fields, decoder_config
from tca4rec_jax.llm.from_scratch import FromScratch, check_known, id_tokenizer
from tca4rec_jax.llm.tokenizer import text_encoder

TOKENS = ("<a_1>", "<a_12>", "<b_1>")
PLAIN = PromptTemplate(("{history}{target}",), item="{id}", separator="", end="")


def test_every_family_can_be_trained_from_scratch_and_exported():
    families = get_args(get_type_hints(FromScratch)["family"])
    assert set(families) == set(FAMILIES)
    for family in families:
        config = FromScratch(family, num_kv_heads=2, hidden_size=64).architecture(100)
        assert (config.vocab_size, config.num_kv_heads, config.hidden_size) == (128, 2, 64)
        assert decoder_config(config_fields(config)) == config


def test_each_token_of_an_id_is_one_token_and_all_else_is_unknown():
    encoder = text_encoder(id_tokenizer(TOKENS), "added")
    assert encoder.inside("<a_12><a_1><b_1>") == [4, 3, 5]
    assert encoder.first("") == [1]
    assert encoder.inside("film") == encoder.inside("<a_2>") == [2]


@pytest.mark.parametrize("tokens", [("<a>", "<a>"), ("<pad>",)])
def test_a_token_that_is_there_twice_is_refused(tokens):
    with pytest.raises(UserError, match=r"the token '<(a|pad)>' is there twice"):
        id_tokenizer(tokens)


@pytest.mark.parametrize(
    "other",
    [{"templates": ("Films: {history}{target}",)}, {"separator": "\n"}, {"end": "\n"}],
)
def test_texts_that_are_no_ids_are_refused(other):
    tokenizer, columns = id_tokenizer(TOKENS), {"id": ("<a_1><b_1>", "<a_12><b_1>")}

    def check(template):
        check_known(tokenise_items(columns, text_encoder(tokenizer, "added"), template), tokenizer)

    check(PLAIN)
    with pytest.raises(UserError, match=r"other texts than ids.*set prompt.item='\{id\}'"):
        check(PromptTemplate(**vars(PLAIN) | other))
