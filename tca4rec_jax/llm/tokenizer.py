"""The tokenizer that a GGUF file describes (byte-level BPE, special tokens), or a folder's own."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tca4rec_jax.llm.gguf import field, open_gguf

# tokenizer.ggml.token_type of tokens that text never produces.
CONTROL = 3
# tokenizer.ggml.pre -> whether every digit is a token of its own before the BPE merges.
SPLITS_DIGITS = {"smollm": True, "gpt-2": False}
SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file or a Hugging Face folder.

    That of a GGUF file adds no special token of its own.
    Raises ValueError if a file's tokenizer is not byte-level BPE or splits text in a way that is
    not known here, or a folder has none.
    """
    if Path(path).is_dir():
        try:
            return AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: no tokenizer that transformers can read ({error})"
            ) from error
    reader = open_gguf(path)
    model = field(reader, path, "tokenizer.ggml.model")
    pre_tokenizer = field(reader, path, "tokenizer.ggml.pre")
    if model != "gpt2" or pre_tokenizer not in SPLITS_DIGITS:
        raise ValueError(
            f"{path}: tokenizer {model!r} with pre-tokenizer {pre_tokenizer!r}; known are 'gpt2'"
            f" with {', '.join(map(repr, SPLITS_DIGITS))}"
        )
    tokens = field(reader, path, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(reader, path, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    steps = [pre_tokenizers.Digits(individual_digits=True)] * SPLITS_DIGITS[pre_tokenizer]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = field(reader, path, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL
        ]
    )
    special = {
        name: tokens[reader.fields[key].contents()]
        for name, key in SPECIAL_TOKENS.items()
        if key in reader.fields
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
