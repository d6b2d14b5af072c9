"""The tokenizers of GGUF files against a byte-level BPE from its definition, and transformers."""

import json
from pathlib import Path

import gguf
import pytest
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

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


TEXTS = (
    "Toy Story (1995)",
    "I'LL see 12345 films,  two  spaces\n\n and lines \t",
    "Les Misérables and Les Mise\u0301rables 100%!!\n",
    "東京物語 🎬",
)
MERGES = ["1 9", "i e", "Ġ S", "t o", "to r", "1 2", "12 3"]


def write_tokenizer(path, pre, vocabulary=()):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    if vocabulary:
        writer.add_token_list(list(vocabulary))
        writer.add_token_types([1] * len(vocabulary))
        writer.add_token_merges(MERGES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_vocabulary(*more):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*letters, *(merge.replace(" ", "") for merge in MERGES), *more]


def test_qwen2_equals_transformers(tmp_path):
    vocabulary = byte_level_vocabulary()
    ours = load_tokenizer(write_tokenizer(tmp_path / "qwen.gguf", "qwen2", vocabulary))
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    theirs = Qwen2Tokenizer({token: i for i, token in enumerate(vocabulary)}, merges)
    for text in TEXTS:
        assert ours.tokenize(text) == theirs.tokenize(text), text
    assert ours.tokenize("123") == ["1", "2", "3"]


def test_llama3_keeps_three_digits_and_whole_words(tmp_path):
    vocabulary = byte_level_vocabulary("whole")  # which no merge makes
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "llama.gguf", "llama-bpe", vocabulary))
    assert tokenizer.tokenize("12345 whole") == ["123", "4", "5", "Ġ", *"whole"]
    assert tokenizer.tokenize("whole") == ["whole"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_unknown_pre_tokenizer_is_refused(tmp_path):
    path = write_tokenizer(tmp_path / "other.gguf", "tekken")
    with pytest.raises(ValueError, match=r"other.gguf.*'tekken'; known are.*'smollm'"):
        load_tokenizer(path)
