"""The tokenizer that a GGUF file describes (byte-level BPE, special tokens), or a folder's own.

`text_encoder` is what a prompt takes of it.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tca4rec_jax.data.prompts import TextEncoder
from tca4rec_jax.errors import UserError, reading
from tca4rec_jax.llm.checkpoints.gguf import GGUFFile

# tokenizer.ggml.token_type of tokens that text never produces.
CONTROL = 3
# How text is cut into words, within which the BPE merges: by GPT-2's pattern, or by one that keeps
# at most so many digits together.
GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _words(digits: int) -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", str(digits))), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# By tokenizer.ggml.pre. Qwen3 has Qwen2's.
PRE_TOKENIZERS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "gpt-2": [GPT2_WORDS],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2_WORDS],
    "qwen2": _words(1),
    "llama-bpe": _words(3),
}
SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
ADD_BOS = "tokenizer.ggml.add_bos_token"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file or a Hugging Face folder.

    That of a GGUF file adds the BOS token to a text if the file says so, and nothing else.

    Raises UserError if a file's tokenizer is not byte-level BPE or its pre-tokenizer is not in
    PRE_TOKENIZERS, or if a folder has no tokenizer. No code in a folder is ever run.
    """
    with reading(path, "tokenizer"):
        if Path(path).is_dir():
            return AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        return _gguf_tokenizer(path)


def _gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    file = GGUFFile(path)
    model = file.field("tokenizer.ggml.model")
    pre_tokenizer = file.field("tokenizer.ggml.pre")
    if model != "gpt2" or pre_tokenizer not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: tokenizer {model!r} with pre-tokenizer {pre_tokenizer!r}; known are 'gpt2'"
            f" with {', '.join(map(repr, PRE_TOKENIZERS))}"
        )
    tokens = file.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # A Llama 3 takes a word that is a token as it is, however the merges would have made it.
    ignore_merges = pre_tokenizer == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre_tokenizer])
    if pre_tokenizer == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = file.field("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    special = {
        name: tokens[file.field(key)] for name, key in SPECIAL_TOKENS.items() if key in file.fields
    }
    # Where the file does not say: as llama.cpp.
    if "bos_token" in special and file.field(ADD_BOS, pre_tokenizer == "llama-bpe"):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )


def text_encoder(tokenizer: PreTrainedTokenizerBase, bos: str) -> TextEncoder:
    """A prompt's encoder: a text never becomes a control token, nor gets a space that it lacks.

    SentencePiece tokenizers (Llama 2, Mistral) put a space before a text; here only before the
    first one of a prompt. `bos` is as in PromptTemplate.

    Raises UserError for a tokenizer in Python, which has no such settings.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json: save the folder's "
            "tokenizer with transformers' AutoTokenizer.save_pretrained"
        )
    first, inside = (_plain_text(tokenizer.backend_tokenizer) for _ in range(2))
    for part in _parts(inside.normalizer):
        if isinstance(part, normalizers.Prepend):
            part.prepend = ""
    for part in _parts(inside.pre_tokenizer):
        if isinstance(part, pre_tokenizers.Metaspace):
            part.prepend_scheme = "never"
        if isinstance(part, pre_tokenizers.ByteLevel):
            part.add_prefix_space = False
    known = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
    added = [token for token in tokenizer("")["input_ids"][:1] if token in known]
    begin = {"known": known, "added": added, "never": []}[bos]
    return TextEncoder(
        inside=lambda text: inside.encode(text, add_special_tokens=False).ids,
        first=lambda text: begin + first.encode(text, add_special_tokens=False).ids,
        control={
            str(token): index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special and index != tokenizer.unk_token_id
        },
    )


def _plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """A copy to which the text of a control token is text, of any length."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _parts(part: Any) -> Iterator:
    """The steps of a normalizer or pre-tokenizer: those of a sequence, however nested."""
    if isinstance(part, normalizers.Sequence | pre_tokenizers.Sequence):
        for inner in iter(part):
            yield from _parts(inner)
    elif part is not None:
        yield part
