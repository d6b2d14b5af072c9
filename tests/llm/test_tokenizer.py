"""The tokenizer of a GGUF file against a byte-level BPE written from its definition."""

import json
from pathlib import Path

import gguf
import pytest

from tca4rec_jax.llm.tokenizer import load_tokenizer

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return load_tokenizer(smollm2_path)


def test_encodings_equal_the_plain_bpe(tokenizer):
    encodings = json.loads((GOLDENS / "smollm2_tokens.json").read_text("utf-8"))
    assert len(encodings) > 8
    for text, ids in encodings.items():
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == text


def test_digits_are_tokens_of_their_own(tokenizer):
    assert tokenizer.tokenize("1995") == ["1", "9", "9", "5"]


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token_id == 0
    assert len(tokenizer) == 49152
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    assert tokenizer.decode([2, 68], skip_special_tokens=True) == tokenizer.decode([68])


def test_unknown_pre_tokenizer_is_refused(tmp_path):
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"other.gguf.*'llama-bpe'; known are.*'smollm'"):
        load_tokenizer(path)
