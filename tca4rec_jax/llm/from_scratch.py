"""A decoder that is trained from scratch: its architecture, and a tokenizer of ids alone.

TIGER (arXiv 2305.05065) showed that a small transformer on semantic ids needs no pretraining.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tca4rec_jax.data.item_tokens import ItemTokens
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.families import decoder_config
from tca4rec_jax.ranges import Count, check_fields

RANDOM = "random"  # config.llm.weights
PAD, BOS, UNKNOWN = "<pad>", "<bos>", "<unk>"
SPECIAL = {"pad_token": PAD, "bos_token": BOS, "unk_token": UNKNOWN}
"""The tokens of an `id_tokenizer` before those of ids, by what transformers calls them."""
_MULTIPLE = 64  # of the vocabulary, so that it divides over devices


@dataclass(frozen=True)
class FromScratch:
    """The architecture of llm.weights=random; what is not here is as in its family's config.json.

    Attributes:
      family: the model_type of its config.json.
      num_layers, hidden_size, intermediate_size: layers, their width, that of the feed-forward.
      num_heads, num_kv_heads, head_dim: query heads, key and value heads, the width of each.
      max_positions: the longest sequence, in tokens.
      tie_embeddings: whether the head is the embedding table.
    """

    family: Literal["llama", "mistral", "qwen2", "qwen3", "gemma3_text"] = "llama"
    num_layers: Count = 4
    hidden_size: Count = 128
    intermediate_size: Count = 512
    num_heads: Count = 4
    num_kv_heads: Count = 4
    head_dim: Count = 32
    max_positions: Count = 512
    tie_embeddings: bool = True

    def __post_init__(self):
        check_fields(self, "llm.random.")

    def architecture(self, tokens: int) -> DecoderConfig:
        """With room for so many tokens, SPECIAL ones among them.

        Raises UserError for a family that is not supported.
        """
        return decoder_config(
            {
                "model_type": self.family,
                "vocab_size": -(-tokens // _MULTIPLE) * _MULTIPLE,
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "num_hidden_layers": self.num_layers,
                "num_attention_heads": self.num_heads,
                "num_key_value_heads": self.num_kv_heads,
                "head_dim": self.head_dim,
                "max_position_embeddings": self.max_positions,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": self.tie_embeddings,
            }
        )


def check_known(items: ItemTokens, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if items or prompts have text that is no token of an `id_tokenizer`."""
    pieces = [items.pieces.tokens, *(part for task in items.tasks for part in task)]
    if any(tokenizer.unk_token_id in part.values for part in pieces):
        raise UserError(
            f"prompts have other texts than ids, which an LLM with llm.weights={RANDOM} does not "
            "know: set prompt.item='{id}', prompt.templates=('{history}{target}',), "
            "prompt.separator='' and prompt.end='', and no training.tasks"
        )


def id_tokenizer(tokens: Sequence[str]) -> PreTrainedTokenizerBase:
    """A tokenizer that knows these tokens alone; it adds BOS to a text.

    Raises UserError for a token that is given twice, or is one of SPECIAL.
    """
    names = (*SPECIAL.values(), *tokens)
    vocabulary = {token: at for at, token in enumerate(names)}
    if len(vocabulary) < len(names):
        twice, _ = Counter(names).most_common(1)[0]
        raise UserError(f"the token {twice!r} is there twice: name one of them otherwise")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[BOS, "$A"], special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL
    )
