"""The published prompt and loss in plain Python and NumPy (reference values for test_official.py).

A dictionary of prefixes, dense soft labels, bfloat16 sums item by item. `PublishedLoss` has an
attribute for each of the published quirks of the loss.

Axes: core/__init__.py; here T are the tokens of a title without its end.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

INSTRUCTION = (
    "###Instruction:\nGiven the user interaction history, please recommendate the {domain} that "
    "user is most likely to view.\n\n###Input:\nUser Interaction Histories: {history}.\n\n"
    "Then the movie that user is most likely to watch is:\n###Response:"
)


def prompt(titles: Sequence[str], domain: str) -> str:
    """The published text around a history, before BOS and the target."""
    history = ", ".join(f'"{title}"' for title in titles)
    return INSTRUCTION.format(domain=domain, history=history)


@dataclass
class PublishedLoss:
    """The loss of the positions of target titles, given as tokens without their end."""

    titles: Sequence[Sequence[int]]
    end: int
    alpha: float = 0.1
    beta: float = 1.0
    tau: float = 1.0
    masked: bool = False  # MSL
    form: str = "log_expectation"
    dtype: type = ml_dtypes.bfloat16  # of the CF model's part
    unsupervised_end: int = 2

    def __post_init__(self):
        self.after = defaultdict(list)  # prefix -> (next token, item)
        for item, title in enumerate(self.titles):
            for at, token in enumerate([*title, self.end]):
                self.after[tuple(title[:at])].append((token, item))

    def soft_label(self, prefix: tuple, target: int, cf_I: np.ndarray) -> dict[int, float]:
        """Of each next token of a prefix, given the CF logits of all items."""
        tokens, items = zip(*self.after[prefix], strict=True)
        scores = (cf_I[list(items)] / self.dtype(self.beta)).astype(np.float32)
        q = np.exp(scores - scores.max())
        q = (q / q.sum(dtype=np.float32)).astype(self.dtype)
        p_cf = defaultdict(lambda: self.dtype(0))
        for token, share in zip(tokens, q, strict=True):
            p_cf[token] = p_cf[token] + share
        label = {token: self.alpha * float(share) for token, share in p_cf.items()}
        label[target] += 1 - self.alpha
        return label

    def soft_labels(
        self, item: int, user_D: np.ndarray, table_IxD: np.ndarray
    ) -> list[dict[int, float]]:
        """Of each supervised token of a title."""
        user_D, table_IxD = (
            array.astype(self.dtype).astype(np.float64) for array in (user_D, table_IxD)
        )
        cf_I = (table_IxD @ user_D).astype(np.float32).astype(self.dtype)
        title = [*self.titles[item], self.end]
        supervised = title[: max(len(title) - self.unsupervised_end, 0)]
        return [
            self.soft_label(tuple(title[:at]), token, cf_I) for at, token in enumerate(supervised)
        ]

    def positions(
        self, item: int, logits_TxV: np.ndarray, user_D: np.ndarray, table_IxD: np.ndarray
    ) -> list[float]:
        """The loss of each supervised token of a title."""
        losses = []
        for at, label in enumerate(self.soft_labels(item, user_D, table_IxD)):
            z_V = np.asarray(logits_TxV[at], np.float64) / self.tau
            allowed = list(label) if self.masked else slice(None)
            log_p_V = z_V - np.logaddexp.reduce(z_V[allowed])
            if self.form == "cross_entropy":
                losses.append(-sum(y * log_p_V[token] for token, y in label.items()))
            else:
                losses.append(-np.log(sum(y * np.exp(log_p_V[t]) for t, y in label.items())))
        return losses
