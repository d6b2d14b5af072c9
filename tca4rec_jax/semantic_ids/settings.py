"""The section `ids` of a config."""

from typing import NamedTuple

from tca4rec_jax.ranges import LocalPath


class IdsFields(NamedTuple):
    """Semantic ids, where prompts show {id}.

    Attributes:
      path: a JSON file {item id: [token, ..]}; by default WORKDIR/ids/ids.json.
      train: whether the rows of their tokens, which a pretrained LLM lacks, are trained.
    """

    path: LocalPath | None = None
    train: bool = True
