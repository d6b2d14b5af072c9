"""The tokenizer that a GGUF file describes (byte-level BPE, special tokens), or a folder's own."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tca4rec_jax.errors import UserError
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


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file or a Hugging Face folder.

    The tokenizer of a GGUF file adds no special tokens to a text.

    Raises UserError if a file's tokenizer is not byte-level BPE or its pre-tokenizer is not in
    PRE_TOKENIZERS, or if a folder has no tokenizer.
    """
    if Path(path).is_dir():
        try:
            return AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no tokenizer that transformers can read ({error})") from error
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
