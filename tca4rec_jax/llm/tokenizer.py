"""The tokenizer that a GGUF file describes (BPE of bytes or of SentencePiece), or a folder's own.

`text_encoder` is what a prompt takes of it, `in_chat` puts prompts into its chat template.
"""

import copy
import dataclasses
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

from tca4rec_jax.data.templates import PromptTemplate, parse
from tca4rec_jax.data.text_encoder import TextEncoder
from tca4rec_jax.errors import UserError, reading
from tca4rec_jax.llm.checkpoints.gguf import GGUFFile

# tokenizer.ggml.token_type: of plain text; what text never produces; what is never taken apart.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
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
CHAT_TEMPLATE = "tokenizer.chat_template"
SPACE = "▁"  # SentencePiece's
LONGEST_PIECE = 256  # letters; a longer one would take long to split, and is never made of others


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file or a Hugging Face folder.

    That of a GGUF file adds the BOS token to a text if the file says so, and nothing else.

    Raises UserError if a file's tokenizer is neither SentencePiece's BPE nor a byte-level one whose
    pre-tokenizer is in PRE_TOKENIZERS, or if a folder has no tokenizer. No code in a folder is ever
    run.
    """
    with reading(path, "tokenizer"):
        if Path(path).is_dir():
            return AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        return _gguf_tokenizer(path)


def _gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    file = GGUFFile(path)
    model, pre_tokenizer = (file.field(f"tokenizer.ggml.{name}", "") for name in ("model", "pre"))
    if model != "llama" and (model != "gpt2" or pre_tokenizer not in PRE_TOKENIZERS):
        raise UserError(
            f"{path}: tokenizer {model!r} with pre-tokenizer {pre_tokenizer!r}; known are 'llama',"
            f" and 'gpt2' with {', '.join(map(repr, PRE_TOKENIZERS))}"
        )
    tokens, kinds = (file.field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    tokenizer = _sentencepiece(file) if model == "llama" else _byte_level(file, pre_tokenizer)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    special = {
        name: tokens[file.field(key)] for name, key in SPECIAL_TOKENS.items() if key in file.fields
    }
    # Where the file does not say: as llama.cpp.
    by_default = model == "llama" or pre_tokenizer == "llama-bpe"
    if "bos_token" in special and file.field(ADD_BOS, by_default):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokens.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=file.field(CHAT_TEMPLATE, "") or None,
        **special,
    )


def _byte_level(file: GGUFFile, pre_tokenizer: str) -> Tokenizer:
    """A BPE of bytes by its merges, as GPT-2's."""
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
    return tokenizer


def _sentencepiece(file: GGUFFile) -> Tokenizer:
    """A BPE as SentencePiece's: of two neighbours that make a piece, those of the highest score are
    joined first; what is in no piece becomes its bytes."""
    tokens, kinds, scores = (
        file.field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "scores")
    )
    pieces = zip(scores, tokens, kinds, strict=True)
    scored = {
        token: score
        for score, token, kind in pieces
        if kind == NORMAL and len(token) <= LONGEST_PIECE
    }
    merges = [
        (piece[:at], piece[at:])
        for piece in sorted(scored, key=scored.__getitem__, reverse=True)
        for at in range(1, len(piece))
        if piece[:at] in scored and piece[at:] in scored
    ]
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges,
            unk_token=tokens[file.field(SPECIAL_TOKENS["unk_token"], 0)],
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    prefixed = file.field("tokenizer.ggml.add_space_prefix", True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        SPACE, prepend_scheme="first" if prefixed else "never", split=False
    )
    bytes_and_spaces = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] * prefixed
    tokenizer.decoder = decoders.Sequence([*bytes_and_spaces, *strip])
    return tokenizer


def text_encoder(tokenizer: PreTrainedTokenizerBase, bos: str, bos_token: str = "") -> TextEncoder:
    """A prompt's encoder: a text never becomes a control token, nor gets a space that it lacks.

    SentencePiece tokenizers (Llama 2, Mistral) put a space before a text; here only before the
    first one of a prompt. `bos` and `bos_token` are as in PromptTemplate.

    Raises UserError for a tokenizer in Python, which has no such settings, or a bos_token that is
    none of its tokens.
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
    control = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and index != tokenizer.unk_token_id
    }
    if bos_token and bos_token not in control:
        raise UserError(
            f"prompt.bos_token is {bos_token!r}: expected one of the tokenizer's control tokens, "
            f"{', '.join([*control][:3])} .."
        )
    known = [control[bos_token]] if bos_token else [tokenizer.bos_token_id]
    known = [token for token in known if token is not None]
    added = [token for token in tokenizer("")["input_ids"][:1] if token in known]
    begin = {"known": known, "added": added, "never": []}[bos]
    roles = {*tokenizer.special_tokens_map.values(), bos_token}
    return TextEncoder(
        inside=lambda text: inside.encode(text, add_special_tokens=False).ids,
        first=lambda text: begin + first.encode(text, add_special_tokens=False).ids,
        control=control,
        spare=[text for text in control if text not in roles],
        bos=known[0] if known else None,
    )


def in_chat(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """The template as a chat: the text before {target} is a message of the user, the target the
    model's answer. The chat template decides about BOS.

    Raises UserError for a tokenizer without a chat template, or one that fails or changes a text.
    """
    texts = tuple(_chat_text(text, tokenizer) for text in template.templates)
    return dataclasses.replace(template, templates=texts, bos="never")


def _chat_text(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    *parts, (literal, _) = parse(text, "prompt.templates")
    # Fields in no brackets that a chat template, or the text, could have.
    marked = "".join(text + f"\ue000{field}\ue001" * bool(field) for text, field in parts) + literal
    if tokenizer.chat_template is None:
        raise UserError("prompt.chat is true, but the LLM's tokenizer has no chat template")
    try:
        message = {"role": "user", "content": marked}
        chat = str(
            tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # whatever Jinja, or the template itself, raises
        raise UserError(f"prompt.chat: the LLM's chat template fails: {error}") from error
    if marked.strip() not in chat:
        raise UserError("prompt.chat: the LLM's chat template does not hold a message as it is")
    escaped = chat.replace("{", "{{").replace("}", "}}")
    return escaped.replace("\ue000", "{").replace("\ue001", "}") + "{target}"


def _plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """A copy to which the text of a control token is text, of any length.

    It shares the model: a copy of a large vocabulary takes seconds.
    """
    plain = Tokenizer(tokenizer.model)
    plain.normalizer = copy.deepcopy(tokenizer.normalizer)
    plain.pre_tokenizer = copy.deepcopy(tokenizer.pre_tokenizer)
    plain.add_tokens([token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())])
    plain.encode_special_tokens = True
    return plain


def _parts(part: Any) -> Iterator:
    """The steps of a normalizer or pre-tokenizer: those of a sequence, however nested."""
    if isinstance(part, normalizers.Sequence | pre_tokenizers.Sequence):
        for inner in iter(part):
            yield from _parts(inner)
    elif part is not None:
        yield part
