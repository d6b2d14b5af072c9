"""LLaRA's curriculum (arXiv 2312.02445, section 3.3): from texts alone to texts with vectors."""

from dataclasses import dataclass

import numpy as np

_STREAM = 1  # tells these draws from those of the batches' order


@dataclass(frozen=True)
class Curriculum:
    """Which batches read vectors: each with a probability that rises linearly, from 0 to 1."""

    seed: int
    steps: int  # of the whole training

    def reads_vectors(self, batch: int) -> bool:
        """Whether a batch, counted over all epochs, does: a function of nothing but its number."""
        return np.random.default_rng([self.seed, batch, _STREAM]).random() < batch / self.steps
