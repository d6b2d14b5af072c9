"""The section `ids` of a config."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from tca4rec_jax.ranges import Count, LocalPath, Range, Seed, check_fields
from tca4rec_jax.semantic_ids.collisions import Policy
from tca4rec_jax.semantic_ids.ids import LEVELS

_MOST_LEVELS = len(LEVELS) - 1  # and the counter
Codes = Annotated[
    tuple[Count, ...], Range(f"1 to {_MOST_LEVELS} levels", lambda x: 1 <= len(x) <= _MOST_LEVELS)
]


class IdsFields(NamedTuple):
    """Semantic ids, where prompts show {id}.

    Attributes:
      path: a JSON file {item id: [token, ..]}; by default WORKDIR/ids/ids.json.
      train: whether the rows of their tokens, which a pretrained LLM lacks, are trained.
    """

    path: LocalPath | None = None
    train: bool = True


@dataclass(frozen=True)
class Quantiser:
    """How launch/make_ids.py makes semantic ids.

    Attributes:
      item_vectors: a .npy file [items, width] of the catalogue's items; by default those that
        launch/embed_items.py has written.
      method: residual k-means, plain or with clusters of one size, or RQ-VAE (ids.rq_vae).
      codes: how many codes each level has.
      collisions: what items with the same codes get: 'counter' one more token, which numbers them;
        'assignment' and 'sinkhorn' other last codes, then a counter where these are not enough;
        'none' leaves them with one id.
      seed: of everything random.
    """

    item_vectors: LocalPath | None = None
    method: Literal["rq_k_means", "balanced_rq_k_means", "rq_vae"] = "rq_k_means"
    codes: Codes = (256, 256, 256)
    collisions: Policy = "assignment"
    seed: Seed = 0

    def __post_init__(self):
        check_fields(self, "ids.")
