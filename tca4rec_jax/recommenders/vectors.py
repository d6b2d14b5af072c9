"""What the placeholders of prompts carry: the vectors of items and of users.

An item's vector is its row in the item table of the CF logits store, or in the user's own file; a
user's is what the store holds of the row, or what the CF model makes of a history.

Axis letters: R rows, B rows of a batch, S sequence, L placeholders of a row, I items, C width of a
vector.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from tca4rec_jax.config import build
from tca4rec_jax.core import Array
from tca4rec_jax.core.collaborative_tokenizer import DENSE, CFItems
from tca4rec_jax.data.item_vectors import read_item_vectors
from tca4rec_jax.data.prompts import USER_SLOT, Prompts
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.templates import reads_users
from tca4rec_jax.distributed.sharding import tree_shardings
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.checkpoints.projector_file import read_projector
from tca4rec_jax.llm.projector import Projector, ProjectorConfig, SoftTokens, init_projector
from tca4rec_jax.training.run_inputs import training_split

if TYPE_CHECKING:
    from tca4rec_jax.experiment import Experiment

# Row numbers int64 [B] -> vectors float [B, C], on the host or a device.
CFVectors = Callable[[np.ndarray], Array]
_STREAM = 1000  # tells a projector's random numbers from those of the adapters


@dataclass(frozen=True, eq=False)
class SoftRows:
    """The soft tokens of rows of prompts.

    Attributes:
      prompts: of R rows.
      token: the placeholder.
      item_IxC: float32.
      most: L, the room for placeholders in a row.
      user: of the rows; None if no placeholder is a user's.
    """

    prompts: Prompts
    token: int
    item_IxC: np.ndarray
    most: int
    user: CFVectors | None = None
    _position: Ragged = field(init=False, repr=False)  # int32 [R], aligned with the slots

    def __post_init__(self):
        tokens, slots = self.prompts
        placed = np.flatnonzero(tokens.values == self.token)
        at = (placed - tokens.offsets[tokens.row_of(placed)]).astype(np.int32)
        object.__setattr__(self, "_position", Ragged(at, slots.offsets))

    def __call__(self, rows_B: np.ndarray, width: int) -> SoftTokens:
        """Those of some rows, whose tokens are padded to `width`."""
        position_BxL = self._position.pad(rows_B, self.most, width)
        slot_BxL = self.prompts.slots.pad(rows_B, self.most, 0)
        vector_BxLxC = self.item_IxC[np.maximum(slot_BxL, 0)]
        if self.user is not None:
            of_user_B = np.asarray(self.user(rows_B), np.float32)
            is_user_BxLx1 = (slot_BxL == USER_SLOT)[:, :, None]
            vector_BxLxC = np.where(is_user_BxLx1, of_user_B[:, None, :], vector_BxLxC)
        vector_BxLxC[position_BxL == width] = 0
        return SoftTokens(position_BxL, vector_BxLxC)


def soft_rows(
    experiment: "Experiment",
    prompts: Prompts,
    cf: CFVectors | None = None,
    cf_items: CFItems = DENSE,
) -> SoftRows | None:
    """The soft tokens of prompts; None if they have no placeholders.

    There is room for those of any prompt of data.history_length items, and for more (of a training
    that reads whole sequences, of candidates). `cf` are the users' vectors and `cf_items` the item
    side of their CF model, as in SearchRows; only placeholders of users need them. Raises UserError
    as `check_table`.
    """
    item_IxC, items = experiment.item_vectors, experiment.items
    if item_IxC is None or items.placeholder is None:
        return None

    def count(tokens: np.ndarray) -> int:
        return int((tokens == items.placeholder).sum())

    for_users = reads_users(experiment.config.prompt)
    if for_users:
        check_table(experiment.config.cf.model, cf_items.table_IxD, item_IxC)
    of_item = count(items.shown.values) // len(items.shown)
    around = count(items.before[0]) + count(items.after.values)
    asked = experiment.config.data.history_length + bool(items.answers)  # and the candidate
    most = asked * of_item + around
    most = max(most, int(prompts.slots.lengths.max(initial=0)))
    return SoftRows(prompts, items.placeholder, item_IxC, most, cf if for_users else None)


def item_vectors(experiment: "Experiment") -> np.ndarray:
    """float32 [I, C]: those of projector.vectors, or else the item table of the CF logits.

    Raises UserError as `read_item_vectors`, and for CF logits as `check_table`.
    """
    if file := experiment.config.projector.vectors:
        return read_item_vectors(Path(file), experiment.data.catalogue)
    store = experiment.cf_store(training_split(experiment.config), np.zeros(0, np.int64))
    check_table(experiment.config.cf.model, store.item_table, store.item_table)
    return np.asarray(store.item_table, np.float32)


def check_table(model: str, table_IxC: Array | None, item_IxC: np.ndarray | None) -> None:
    """Checks the item table of a CF model, whose user vectors are as wide.

    Raises UserError if there is none, if its rows are all equal, as those of 'popularity', or if
    the items' vectors, which the same projector takes, are of another width.
    """
    instead = "projector.vectors=FILE.npy for the items and leave {user} out of prompt.templates"
    if table_IxC is None or item_IxC is None:
        raise UserError(
            "prompts carry CF vectors, but the CF model has logits only: take a cf.model that is "
            f"an inner product, without cf.top_k and cf.label_items, or give {instead}"
        )
    if len(table_IxC) > 1 and (table_IxC == table_IxC[:1]).all():
        raise UserError(
            f"prompts carry CF vectors, but cf.model={model!r} has the same one for every item: "
            f"take another, or give {instead}"
        )
    if table_IxC.shape[1] != item_IxC.shape[1]:
        raise UserError(
            f"the CF model's user vectors have width {table_IxC.shape[1]}, projector.vectors "
            f"{item_IxC.shape[1]}: give item vectors of the same width, or leave {{user}} out of "
            "prompt.templates"
        )


def first_projector(experiment: "Experiment") -> Projector:
    """The projector of a run before its first step: random, or read from projector.weights.

    Raises UserError, before any weight of the LLM is read, as `read_projector`.
    """
    assert experiment.item_vectors is not None
    config = build(ProjectorConfig, experiment.config.projector)
    sizes = experiment.item_vectors.shape[1], experiment.stored_architecture.hidden_size
    key = jax.random.fold_in(jax.random.key(experiment.config.seed), _STREAM)

    def tree(layers):  # so that every parameter's sharding is found by its path
        return {"projector": {"layers": layers}}

    if file := experiment.config.projector.weights:
        params = tree(read_projector(file, config, *sizes))
        places = tree_shardings(experiment.mesh, experiment.architecture, params)
        params = experiment.put(params, places)
    else:
        params = experiment.compute(lambda key: tree(init_projector(config, *sizes, key)), key)
    return Projector(config, params["projector"]["layers"], *sizes)


def describe_vectors(experiment: "Experiment") -> dict[str, object]:
    """What the README.md of an exported projector says, see `write_projector`."""
    config, token = experiment.config, experiment.items.placeholder
    if token is None:
        return {}
    scale, note = experiment.architecture.embedding_scale, ""
    if scale != 1:
        note = f"\nWhere the LLM scales inputs_embeds itself, divide the projected by {scale:g}.\n"
    return {
        "token": token,
        "text": experiment.tokenizer.convert_ids_to_tokens(token),
        "vectors": config.projector.vectors or f"the vectors of cf.model={config.cf.model!r}",
        "template": config.prompt.templates[0],
        "item": config.prompt.item,
        "note": note,
    }
