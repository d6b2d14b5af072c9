"""GGUF files that we write: read back they are what was written, the tokenizer included."""

import dataclasses

import jax
import make_decoder_golden as goldens
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.checkpoints.export import export_decoder
from tca4rec_jax.llm.checkpoints.gguf import GGUFFile
from tca4rec_jax.llm.checkpoints.gguf_export import MODEL, _vocabulary, check_gguf, write_gguf
from tca4rec_jax.llm.checkpoints.loading import load_weights
from tca4rec_jax.llm.config import DecoderConfig, RopeScaling
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.families import FAMILIES
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters, merge_adapters
from tca4rec_jax.llm.tokenizer import load_tokenizer

CHAT = "{{ messages[0]['content'] }}"
TEXTS = ("toy story", "a</s>b", " <s>x ", "")


@pytest.fixture
def tokenizer():
    """Byte-level BPE of 29 tokens; a folder's own."""
    names = ["<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwx", "to", "st"]
    vocabulary = {name: index for index, name in enumerate(names)}
    found = Tokenizer(models.BPE(vocabulary, merges=[("t", "o"), ("s", "t")]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=found, chat_template=CHAT, **special)


def load_golden(name, folder):
    goldens.write_files(folder, golden := goldens.read_model(name))
    return golden, *load_weights(folder)


@pytest.mark.parametrize("name", ["smollm2", "llama_biased", "llama3", "qwen2", "qwen3"])
def test_weights_and_tokenizer_are_read_back(tmp_path, name, tokenizer):
    _, config, params = load_golden(name, tmp_path)
    if name == "llama3":  # the reader knows the settings that every Llama 3 has
        scaling = RopeScaling("llama3", 32.0)
        config = dataclasses.replace(config, rope_theta=500000.0, rope_scaling=scaling)
    write_gguf(tmp_path / MODEL, config, params, tokenizer, dtype="float32")
    found, again = load_weights(tmp_path / MODEL)
    eps = float(np.float32(config.rms_norm_eps))  # metadata holds float32
    assert found == dataclasses.replace(config, rms_norm_eps=eps)
    assert params.keys() == again.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(again[path], value)
    loaded = load_tokenizer(tmp_path / MODEL)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.chat_template == tokenizer.chat_template
    assert len(GGUFFile(tmp_path / MODEL).field("tokenizer.ggml.tokens")) == config.vocab_size


def test_adapters_are_merged_and_matrices_rounded_once(tmp_path, tokenizer):
    _, config, params = load_golden("smollm2", tmp_path)
    lora = LoRAConfig(rank=2, alpha=8.0)
    rng = np.random.default_rng(0)
    fresh = init_adapters(config, lora, jax.random.key(0))
    adapters = {
        name: {
            part: rng.normal(0, 0.3, value.shape).astype(np.float32)
            for part, value in parts.items()
        }
        for name, parts in fresh.items()
    }
    decoder, folder = Decoder(config, params, lora=lora, adapters=adapters), tmp_path / "exported"
    how = {"kind": "gguf", "dtype": "bfloat16", "base_model": None}
    assert export_decoder(folder, decoder, tokenizer, **how).endswith(f"{folder}/{MODEL}")
    _, again = load_weights(folder / MODEL)
    merged = merge_adapters(params, adapters, lora)
    for path, value in merged.items():
        is_vector = path.endswith("norm")
        expected = value if is_vector else value.astype("bfloat16").astype("float32")
        np.testing.assert_array_equal(again[path], expected)
    assert [file.name for file in folder.iterdir()] == [MODEL]


def test_what_llama_cpp_would_read_otherwise_is_refused(tmp_path, tokenizer):
    _, config, params = load_golden("smollm2", tmp_path)
    path = tmp_path / MODEL

    def write(**given):
        write_gguf(path, **({"config": config, "params": params, "tokenizer": tokenizer} | given))

    large = params | {"embedding": params["embedding"] * 1e6}
    with pytest.raises(ValueError, match=r"token_embd.weight has values .* as float16"):
        write(params=large, dtype="float16")
    _, gemma, of_gemma = load_golden("gemma3", tmp_path)
    with pytest.raises(ValueError, match="can't be written as GGUF: export with --format=merged"):
        write(config=gemma, params=of_gemma, dtype="float32")
    check_gguf(config, tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="cut like those of gpt-2, smollm, qwen2, llama-bpe"):
        write(dtype="float32")
    with pytest.raises(ValueError, match="cut like those of gpt-2, smollm, qwen2, llama-bpe"):
        check_gguf(config, tokenizer)
    tokenizer.backend_tokenizer.model = models.WordLevel({"a": 0}, unk_token="a")
    with pytest.raises(ValueError, match="not a byte-level BPE"):
        write(dtype="float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_or_refused_in_words(tokenizer, family):
    config = DecoderConfig(29, 8, 16, 2, 2, 1, 4, family=family)
    windowed = dataclasses.replace(config, sliding_window=4)
    if family in ("llama", "qwen2", "qwen3"):
        check_gguf(config, tokenizer)
        refused = f"a {family} whose sliding_window is 4 can't be written as GGUF: export with"
    else:
        refused = f"a {family} can't be written as GGUF: export with --format=merged"
        with pytest.raises(UserError, match=refused):
            check_gguf(config, tokenizer)
    with pytest.raises(UserError, match=refused):
        check_gguf(windowed, tokenizer)


def test_the_vocabulary_of_smollm2_is_that_of_its_file(smollm2_path):
    file = GGUFFile(smollm2_path)
    tokens = file.field("tokenizer.ggml.tokens")
    found = _vocabulary(load_tokenizer(smollm2_path), len(tokens) + 2)
    fields = {"token_list": "tokens", "token_types": "token_type", "token_merges": "merges"}
    fields |= {"tokenizer_model": "model", "tokenizer_pre": "pre", "add_bos_token": "add_bos_token"}
    fields |= {f"{name}_token_id": f"{name}_token_id" for name in ("bos", "eos")}
    for name, field in fields.items():
        expected = file.field(f"tokenizer.ggml.{field}")
        if name in ("token_list", "token_types"):
            *value, one, two = found[name]
            assert (one, two) in (("[PAD49152]", "[PAD49153]"), (5, 5))
        else:
            value = found[name]
        assert value == expected, name
    assert found["chat_template"] == file.field("tokenizer.chat_template")
