"""transformers' `generate` on a dictionary trie, for decoding.py."""

from pathlib import Path

import numpy as np
import torch
from measuring import pytorch_device
from transformers import AutoModelForCausalLM

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged


class Generate:
    """Constrained beam search with `prefix_allowed_tokens_fn`."""

    def __init__(self, weights: Path, titles: Ragged, *, dtype: str, beams: int):
        """weights: a Hugging Face folder; titles: of the items, with their end token."""
        leaf_of_item = ItemTrie.build(titles).leaf_of_item.tolist()
        self._leaf_of_title = {
            tuple(titles[item].tolist()): leaf for item, leaf in enumerate(leaf_of_item)
        }
        self._root: dict = {}
        for title in self._leaf_of_title:
            node = self._root
            for token in title:
                node = node.setdefault(token, {})
        self._end, self._longest = int(titles.values[-1]), int(titles.lengths.max())
        self._beams = beams
        torch.set_default_device(pytorch_device())
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, dtype))
        self._model = model.to(pytorch_device()).eval()

    def __call__(self, prompts: Ragged) -> tuple[np.ndarray, np.ndarray]:
        """The leaves (int, -1 for none) and scores [B, M] after prompts, in one batch."""
        width, shape = int(prompts.lengths.max()), (len(prompts), self._beams)
        tokens = np.zeros((len(prompts), width), np.int64)
        mask = np.zeros_like(tokens)
        for row, length in enumerate(prompts.lengths):
            tokens[row, width - length :] = prompts[row]
            mask[row, width - length :] = 1

        def allowed(_, sequence):
            node = self._root
            for token in sequence[width:].tolist():
                node = node.get(token, {})
            return list(node) or [self._end]

        with torch.inference_mode():
            out = self._model.generate(
                torch.tensor(tokens),
                attention_mask=torch.tensor(mask),
                num_beams=self._beams,
                num_return_sequences=self._beams,
                do_sample=False,
                length_penalty=1.0,
                early_stopping=False,
                max_new_tokens=self._longest,
                prefix_allowed_tokens_fn=allowed,
                eos_token_id=self._end,
                pad_token_id=self._end,
                return_dict_in_generate=True,
                output_scores=True,
            )
        leaves = []
        for sequence in out.sequences[:, width:].tolist():
            title = tuple(sequence[: sequence.index(self._end) + 1])
            leaves.append(self._leaf_of_title.get(title, -1))
        return np.reshape(leaves, shape), out.sequences_scores.float().cpu().numpy().reshape(shape)
