"""Lists of the items of trie.npz by an exported LLM, in transformers, vLLM or SGLang.

    trie = Trie("exported")
    recommend(trie, transformers_scores(model), ["id of an item", "title of an item"], k=10)

`recommend` is the search that the LLM was evaluated with: `scores` asks an engine for the
log-probabilities of a few next tokens. The processors hold an engine's own search or sampling to
the catalogue. NumPy is all that this file needs; engines are imported where they are used.
"""

import copy
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor as _VLLMBase
except ImportError:
    _VLLMBase = object
try:
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor as _SGLangBase
except ImportError:
    _SGLangBase = object

FILE = "trie.npz"
_VLLM_TOKENS = 128  # whose log-probabilities one request of vLLM returns
# (sequences of token ids, the next tokens that are wanted of each) -> their log-probabilities.
Scores = Callable[[list[list[int]], list[list[int]]], list[np.ndarray]]


class Trie:
    """The titles of a catalogue as tokens, and how the LLM was asked for them.

    Attributes:
      settings: mask ('before_softmax': a token's probability is among the tokens that the trie
        allows; 'after_softmax': among the vocabulary), rules, beams, temperature, length_penalty,
        exclude_history, end (the token that ends every title, or null), and of prompts start (the
        tokens before a title, which no title has, or null), max_tokens and history_length.
    """

    def __init__(self, folder: str | Path | None = None):
        """Of a folder with trie.npz, by default that of this file."""
        with np.load(Path(folder or Path(__file__).parent) / FILE, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays.pop("about").tobytes())
        self.item_ids, self.titles = about.pop("item_ids"), about.pop("titles")
        self.settings: dict[str, Any] = about
        self._tokens_QxL, self._length_Q = arrays["tokens"], arrays["lengths"]
        leaf_I = arrays["leaf_of_item"]
        order_I = np.argsort(leaf_I, kind="stable")  # the last ones have no title here
        self._item_n = order_I[: np.count_nonzero(leaf_I < len(self._length_Q))]
        self._leaf_n = leaf_I[self._item_n]  # ascending
        self._pieces = {
            name: np.split(arrays[name], np.cumsum(arrays[f"{name}_lengths"]))[:-1]
            for name in ("before", "shown", "separator", "after")
            if name in arrays
        }
        self._item_of = {name: i for i, name in reversed([*enumerate(self.titles)])}
        self._item_of |= {name: item for item, name in enumerate(self.item_ids)}
        self.children = functools.lru_cache(1 << 16)(self._children)

    def without(self, items: Sequence[int]) -> "Trie":
        """The titles that have another item than these, by number."""
        other, left_n = copy.copy(self), ~np.isin(self._item_n, items)
        kept, other._leaf_n = np.unique(self._leaf_n[left_n], return_inverse=True)
        other._item_n = self._item_n[left_n]
        other._tokens_QxL, other._length_Q = self._tokens_QxL[kept], self._length_Q[kept]
        other.children = functools.lru_cache(1 << 16)(other._children)
        return other

    def find(self, names: Sequence[str]) -> list[int]:
        """The numbers of items named by id or title. Raises KeyError for an unknown one."""
        if unknown := [name for name in names if name not in self._item_of]:
            raise KeyError(f"{unknown[0]!r} is no item id and no title")
        return [self._item_of[name] for name in names]

    def prompt(self, items: Sequence[int]) -> list[int]:
        """The tokens of the prompt after a history of items, by number, oldest first.

        Raises ValueError if the file has no texts of prompts (they carry vectors or candidates),
        or the last item does not fit.
        """
        if not self._pieces:
            raise ValueError(f"{FILE} holds no texts of prompts: make them as in training")
        before, shown, separator, after = self._pieces.values()
        room = self.settings["max_tokens"] - len(before[0]) - len(after[0])
        tokens: list[int] = []
        for item in reversed(items[-self.settings["history_length"] :]):
            more = [*shown[item].tolist(), *(separator[0].tolist() if tokens else [])]
            if len(more) + len(tokens) > room:
                break
            tokens = more + tokens
        if not tokens:
            raise ValueError(f"none of the history's {len(items)} items fits the prompt")
        return [*before[0].tolist(), *tokens, *after[0].tolist()]

    def items(self, title: Sequence[int]) -> list[int]:
        """The numbers of the items whose title has exactly these tokens."""
        if not self.ends(title):
            return []
        leaf = self._range(title)[0]
        return self._item_n[slice(*np.searchsorted(self._leaf_n, [leaf, leaf + 1]))].tolist()

    def ends(self, title: Sequence[int]) -> bool:
        """Whether a title is complete."""
        low, high = self._range(title)
        return high == low + 1 and int(self._length_Q[low]) == len(title)

    def longest(self, title: Sequence[int]) -> int:
        """Tokens of the longest title that begins so."""
        return int(self._length_Q[slice(*self._range(title))].max())

    def title_in(self, sequence: Sequence[int]) -> tuple[int, ...]:
        """What follows the last `start` in a prompt and what was generated after it.

        Raises ValueError where titles begin at no certain place.
        """
        start = self.settings["start"]
        if start is None:
            raise ValueError("the text before a title is in titles too: use `recommend`")
        for at in range(len(sequence) - len(start), -1, -1):
            if list(sequence[at : at + len(start)]) == start:
                return tuple(sequence[at + len(start) :])
        raise ValueError(f"the prompt has not the tokens {start}, which a title follows")

    def mask(self, logits_V: Any, title: Sequence[int]) -> None:
        """Turns logits after a title's first tokens (NumPy or PyTorch, in place) into the
        log-probabilities of the search, -inf where the trie has no token."""
        if allowed := self.children(tuple(title)):
            scaled_V = logits_V / self.settings["temperature"]
            if self.settings["mask"] == "after_softmax":
                kept = _log_softmax(scaled_V)[allowed]
            else:
                kept = _log_softmax(scaled_V[allowed])
        else:  # nothing follows a title: its end once more
            allowed, kept = [self.settings["end"] or 0], 0.0
        logits_V[:] = -float("inf")
        logits_V[allowed] = kept

    def _children(self, title: tuple[int, ...]) -> list[int]:
        low, high = self._range(title)
        if len(title) == self._tokens_QxL.shape[1]:
            return []
        found = np.unique(self._tokens_QxL[low:high, len(title)])
        return found[found >= 0].tolist()

    def _range(self, title: Sequence[int]) -> tuple[int, int]:
        """The titles, which are sorted, that begin so."""
        low, high = 0, len(self._tokens_QxL)
        for depth, token in enumerate(title):
            column = self._tokens_QxL[low:high, depth] if depth < self._tokens_QxL.shape[1] else []
            low, high = (low + int(at) for at in np.searchsorted(column, [token, token + 1]))
        return low, high


def recommend(
    trie: Trie, scores: Scores, history: Sequence[str], k: int = 10, beams: int | None = None
) -> list[tuple[str, str, float]]:
    """The best k items (id, title, score) after a history of ids or titles, oldest first.

    Without guidance: the CF model is not here. Raises KeyError for an unknown item, ValueError as
    `Trie.prompt` and `beam_search`.
    """
    items = trie.find(history)
    searched = trie.without(items) if trie.settings["exclude_history"] else trie
    beams = max(k, beams or trie.settings["beams"])
    found = beam_search(searched, scores, trie.prompt(items), beams)
    listed = [(item, score) for title, score in found for item in searched.items(title)]
    return [(trie.item_ids[item], trie.titles[item], score) for item, score in listed[:k]]


def beam_search(
    trie: Trie, scores: Scores, prompt: Sequence[int], beams: int
) -> list[tuple[tuple[int, ...], float]]:
    """The best titles (tokens, score) after a prompt, one decision of the trie a step.

    These are the 'exact' rules of decoding.rules; for those of 'huggingface' use `generate` with a
    TransformersProcessor. Raises ValueError for such a trie, or a temperature of the vocabulary.
    """
    settings, whole = trie.settings, trie.settings["mask"] == "after_softmax"
    if settings["rules"] != "exact" or (whole and settings["temperature"] != 1):
        raise ValueError("this search has the rules 'exact', at temperature 1 of the vocabulary")

    def ask(titles: list[tuple[int, ...]]) -> Iterator[tuple[list[int], np.ndarray]]:
        children = [trie.children(title) for title in titles]
        found = scores([[*prompt, *title] for title in titles], children) if titles else []
        for tokens, values in zip(children, found, strict=True):
            values = np.asarray(values, np.float64)
            yield tokens, values if whole else _log_softmax(values / settings["temperature"])

    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []
    penalty = settings["length_penalty"]
    while live:
        live = _to_decisions(trie, ask, live, whole)
        ended = [(total, title) for total, title in live if trie.ends(title)]
        live = [(total, title) for total, title in live if not trie.ends(title)]
        found = ask([title for _, title in live])
        candidates: list[tuple[float, tuple[int, ...]]] = []
        for (total, title), (tokens, values) in zip(live, found, strict=True):
            for token, value in zip(tokens, values.tolist(), strict=True):
                child = (*title, token)
                if not whole:  # tokens without a choice count for nothing
                    child = _forced(trie, child)
                (ended if trie.ends(child) else candidates).append((total + value, child))
        done += [(total / len(title) ** penalty, title) for total, title in ended]
        done = sorted(done, key=lambda one: -one[0])[:beams]
        worst = done[-1][0] if len(done) == beams else -np.inf
        live = [one for one in candidates if one[0] / trie.longest(one[1]) ** penalty > worst]
        live = sorted(live, key=lambda one: -one[0])[:beams]
    return [(title, score) for score, title in done]


def _forced(trie: Trie, title: tuple[int, ...]) -> tuple[int, ...]:
    """A title's tokens up to the next choice, or its end."""
    while len(only := trie.children(title)) == 1:
        title = (*title, *only)
    return title


def _to_decisions(trie: Trie, ask: Callable, live: list, scored: bool) -> list:
    """Beams at their next choice, or their end; the tokens between are `scored`, or free."""
    if not scored:
        return [(total, _forced(trie, title)) for total, title in live]
    at_end = []
    while live:
        at_end += [one for one in live if len(trie.children(one[1])) != 1]
        live = [one for one in live if len(trie.children(one[1])) == 1]
        found = ask([title for _, title in live])
        live = [
            (total + float(values[0]), (*title, *tokens))
            for (total, title), (tokens, values) in zip(live, found, strict=True)
        ]
    return at_end


def transformers_scores(model: Any, batch_size: int = 64) -> Scores:
    """Of a transformers model, on its device."""
    import torch

    @torch.no_grad()
    def scores(sequences: list[list[int]], children: list[list[int]]) -> list[np.ndarray]:
        found = []
        for start in range(0, len(sequences), batch_size):
            part = sequences[start : start + batch_size]
            longest = max(map(len, part))  # what follows a sequence changes nothing before it
            padded = torch.tensor([one + [0] * (longest - len(one)) for one in part])
            logits_BxSxV = model(padded.to(model.device)).logits.float()
            for row, tokens in enumerate(children[start : start + batch_size]):
                log_p_V = logits_BxSxV[row, len(part[row]) - 1].log_softmax(-1)
                found.append(log_p_V[tokens].cpu().numpy())
        return found

    return scores


def vllm_scores(llm: Any) -> Scores:
    """Of a `vllm.LLM`; enable_prefix_caching=True reads every prompt once."""
    from vllm import SamplingParams

    def scores(sequences: list[list[int]], children: list[list[int]]) -> list[np.ndarray]:
        parts = [
            (row, tokens[start : start + _VLLM_TOKENS])
            for row, tokens in enumerate(children)
            for start in range(0, len(tokens), _VLLM_TOKENS)
        ]
        how = {"max_tokens": 1, "temperature": 0}
        outputs = llm.generate(
            [{"prompt_token_ids": sequences[row]} for row, _ in parts],
            [SamplingParams(**how, logprob_token_ids=part) for _, part in parts],
            use_tqdm=False,
        )
        found: list[list[float]] = [[] for _ in sequences]
        for (row, part), output in zip(parts, outputs, strict=True):
            of_token = output.outputs[0].logprobs[0]
            found[row] += [of_token[token].logprob for token in part]
        return list(map(np.array, found))

    return scores


def sglang_scores(engine: Any) -> Scores:
    """Of a `sglang.Engine`."""

    def scores(sequences: list[list[int]], children: list[list[int]]) -> list[np.ndarray]:
        outputs = engine.generate(
            input_ids=sequences,
            sampling_params={"max_new_tokens": 1, "temperature": 0},
            return_logprob=True,
            token_ids_logprob=children,
        )
        found = []
        for output, tokens in zip(outputs, children, strict=True):
            (values,) = output["meta_info"]["output_token_ids_logprobs"]
            of_token = {token: value for value, token, *_ in values}
            found.append(np.array([of_token[token] for token in tokens]))
        return found

    return scores


class TransformersProcessor:
    """For `generate(.., logits_processor=[TransformersProcessor(trie, prompt_length)])`."""

    def __init__(self, trie: Trie, prompt_length: int):
        self._trie, self._prompt_length = trie, prompt_length

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores [rows, vocabulary] after token ids [rows, length]; as transformers has them."""
        scores = scores + 0  # a copy
        for row, sequence in enumerate(input_ids.tolist()):
            self._trie.mask(scores[row], sequence[self._prompt_length :])
        return scores


def generate_options(trie: Trie, prompt_length: int, beams: int | None = None) -> dict[str, Any]:
    """What transformers' `generate` takes for lists of the rules 'huggingface'; where settings
    say exclude_history, of `trie.without(trie.find(history))`."""
    beams = beams or trie.settings["beams"]
    return {
        "num_beams": beams,
        "num_return_sequences": beams,
        "do_sample": False,
        "length_penalty": float(trie.settings["length_penalty"]),
        "early_stopping": False,
        "max_new_tokens": trie.longest(()),
        "eos_token_id": trie.settings["end"],
        "pad_token_id": trie.settings["end"],
        "logits_processor": [TransformersProcessor(trie, prompt_length)],
    }


class VLLMProcessor(_VLLMBase):  # type: ignore[misc, valid-type]
    """For `vllm.LLM(.., logits_processors=["trie_logits_processor:VLLMProcessor"],
    logprobs_mode="processed_logits")`, its `beam_search` included.

    Every request is for a title: it follows the trie's `start`, the prompt's last tokens. It may
    be one of the history: ask for as many more, and drop those.
    """

    def __init__(self, vllm_config: Any = None, device: Any = None, is_pin_memory: bool = False):
        self._trie = Trie()
        self._of_row: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """It changes which token is the most probable."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Rows of the batch that are new, gone or elsewhere; None if all stay."""
        if batch_update is None:
            return
        rows = self._of_row
        for row in batch_update.removed:
            rows.pop(row, None)
        for row, _, prompt, generated in batch_update.added:
            rows[row] = prompt or [], generated
        for one, other, direction in batch_update.moved:
            here, there = rows.pop(one, None), rows.pop(other, None)
            if here is not None:
                rows[other] = here
            if there is not None and direction.name == "SWAP":
                rows[one] = there

    def apply(self, logits: Any) -> Any:
        """Logits [rows, vocabulary], in place."""
        for row, (prompt, generated) in self._of_row.items():
            self._trie.mask(logits[row], self._trie.title_in([*prompt, *generated]))
        return logits


class SGLangProcessor(_SGLangBase):  # type: ignore[misc, valid-type]
    """For `engine.generate(.., custom_logit_processor=SGLangProcessor.to_str())`: one title each.

    The server finds this file on its PYTHONPATH, with --enable-custom-logit-processor. SGLang's
    beam_width takes the logits before any processor: use `recommend` with `sglang_scores`.
    """

    def __init__(self) -> None:
        self._trie = Trie()

    def __call__(self, logits: Any, custom_param_list: list[dict[str, Any]] | None = None) -> Any:
        """Logits [rows, vocabulary], in place."""
        for row, parameters in enumerate(custom_param_list or []):
            self._trie.mask(logits[row], list(parameters["__req__"].output_ids))
        return logits


def _log_softmax(values: Any) -> Any:
    """Over the last axis, float32, of one axis; NumPy or PyTorch."""
    if not isinstance(values, np.ndarray):
        return values.float().log_softmax(-1).to(values.dtype)
    above = values - values.max()
    return above - np.log(np.exp(above).sum())
