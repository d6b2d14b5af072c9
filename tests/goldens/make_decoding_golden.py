"""Writes decoding.npz: what transformers' constrained beam search finds with a tiny model.

    python tests/goldens/make_decoding_golden.py      # needs torch

`generate` with `prefix_allowed_tokens_fn` on a dictionary trie, length_penalty 1, early_stopping
False, for each number of beams; the model is random, with large embeddings so that its
distributions are far from uniform. Titles include prefixes of one another and duplicates.
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tca4rec_jax.llm.checkpoints.export import write_hugging_face
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import init_params

END, VOCABULARY, PROMPT = 0, 24, 9
BEAMS = (3, 8)
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=4, max_positions=64, tie_embeddings=True,
)  # fmt: skip


def load_model(params):
    words = {str(token): token for token in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="1")),
        eos_token=str(END),
        pad_token=str(END),
        bos_token="1",
    )
    with tempfile.TemporaryDirectory() as folder:
        write_hugging_face(Path(folder) / "llm", CONFIG, params, tokenizer, dtype="float32")
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "llm").eval()


def generate(model, prompt, root, beams):
    """(titles int [beams, longest], padded with -1; scores float32 [beams])."""

    def allowed(_, sequence):
        node = root
        for token in sequence[len(prompt) :].tolist():
            node = node.get(token, {})
        return list(node) or [END]

    out = model.generate(
        torch.tensor([prompt]),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        length_penalty=1.0,
        early_stopping=False,
        max_new_tokens=12,
        prefix_allowed_tokens_fn=allowed,
        eos_token_id=END,
        pad_token_id=END,
        return_dict_in_generate=True,
        output_scores=True,
    )
    titles = np.full((beams, 12), -1)
    for row, sequence in enumerate(out.sequences[:, len(prompt) :].tolist()):
        title = sequence[: sequence.index(END) + 1]
        titles[row, : len(title)] = title
    return titles, out.sequences_scores.numpy()


def main():
    rng = np.random.default_rng(0)
    words = [rng.integers(1, 7, rng.integers(1, 9)).tolist() for _ in range(40)]
    words += [words[3], words[5] + [2], words[5] + [2, 4]]
    titles = [[*word, END] for word in words]
    root: dict = {}
    for title in titles:
        node = root
        for token in title:
            node = node.setdefault(token, {})
    params = init_params(CONFIG, jax.random.key(0))
    params["embedding"] = 3 * params["embedding"]
    model = load_model(params)
    prompts = [rng.integers(1, VOCABULARY, rng.integers(2, PROMPT + 1)).tolist() for _ in range(12)]
    arrays = {f"params/{path}": np.asarray(value) for path, value in params.items()}
    for name, lists in (("titles", titles), ("prompts", prompts)):
        arrays[f"{name}/values"] = np.concatenate(lists)
        arrays[f"{name}/lengths"] = np.array([len(one) for one in lists])
    for beams in BEAMS:
        found = [generate(model, prompt, root, beams) for prompt in prompts]
        arrays[f"found/{beams}/titles"] = np.stack([titles for titles, _ in found])
        arrays[f"found/{beams}/scores"] = np.stack([scores for _, scores in found])
    np.savez_compressed(Path(__file__).with_name("decoding.npz"), **arrays)


if __name__ == "__main__":
    main()
