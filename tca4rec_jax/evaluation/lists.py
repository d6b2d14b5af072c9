"""What lists of recommendations are like, beside whether they hold the target.

Each metric looks at the first K places of a list. An item's popularity is its number of training
interactions.

Axis letters: R rows, M places of a list, I items, D width of an item vector, n targets of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tca4rec_jax.batching import map_batches
from tca4rec_jax.core import Array
from tca4rec_jax.data.ragged import Ragged, ranges
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.evaluation.rankings import EvaluationRows
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.metrics import coverage

_ROWS_AT_ONCE = 4096  # whose item vectors are in memory


@dataclass(frozen=True, eq=False)
class ListMetrics:
    """What the metrics of lists know of the items and the rows.

    Attributes:
      count_I: int, the items' popularity.
      targets: every row's items to be found, at least one: its target and those of its user's later
        rows.
      histories: the items before each row's target.
      vectors_IxD: float, item vectors of the CF model; None if it has none.
    """

    count_I: np.ndarray
    targets: Ragged
    histories: Ragged
    vectors_IxD: np.ndarray | None = None

    @classmethod
    def of(
        cls, experiment: Experiment, rows: EvaluationRows, vectors_IxD: Array | None
    ) -> "ListMetrics":
        """Of the training rows, the evaluated ones and the CF model's item vectors."""
        data = experiment.data
        split, train = data.splits[rows.split], data.splits["train_sequences"]
        return cls(
            np.bincount(train.items, minlength=data.catalogue.num_items),
            later_targets(split, split.row_of(rows.position_R)),
            rows.histories,
            None if vectors_IxD is None else np.asarray(vectors_IxD),
        )

    def of_rows(
        self, items_RxM: np.ndarray, cutoffs: Sequence[int]
    ) -> dict[str, np.ma.MaskedArray]:
        """{'recall@K' | 'novelty@K' | 'popularity@K' | 'diversity@K': float64 [R]} of lists.

        Lists hold items, -1 where there are no more; the mean is over those that are there. A list
        of none is masked, and for diversity one of a single item.

        recall: the share of a row's `targets`, each counted once, that are listed. novelty: mean
        self-information in bits, -log2 of an item's share of the training interactions, each item
        given one more (Zhou et al., PNAS 2010; Castells et al., Recommender Systems Handbook 2015).
        popularity: mean popularity (ARP: Yin et al., VLDB 2012). diversity: one minus the mean
        cosine of the item vectors of all pairs (Ziegler et al., WWW 2005; Smyth and McClave, ICCBR
        2001).
        """
        share_I = (self.count_I + 1) / (self.count_I.sum() + len(self.count_I))
        is_target_RxM, targets_R = _among(items_RxM, self.targets, len(self.count_I))
        found = {
            "recall": np.ma.asarray(np.cumsum(is_target_RxM, axis=1) / targets_R[:, None]),
            "novelty": _means(-np.log2(share_I), items_RxM),
            "popularity": self._popularity(items_RxM),
        }
        if self.vectors_IxD is not None:
            spread = partial(_diversity, self.vectors_IxD)
            spread_RxM = map_batches(spread, items_RxM, batch_size=_ROWS_AT_ONCE)
            found["diversity"] = np.ma.masked_array(spread_RxM, np.isnan(spread_RxM))
        last = items_RxM.shape[1] - 1
        at = {
            f"{name}@{k}": v_RxM[:, min(k - 1, last)]
            for name, v_RxM in found.items()
            for k in cutoffs
        }
        return {name: value_R for name, value_R in at.items() if not np.all(value_R.mask)}

    def of_all(self, items_RxM: np.ndarray, cutoffs: Sequence[int]) -> dict[str, float]:
        """{'coverage@K' | 'gini@K' | 'popularity lift@K': value} of all lists together.

        coverage: the share of the items that are in anybody's list. gini: the Gini index of how
        often each item of the catalogue is listed, 0 if all as often (both as in RecBole 1.2).
        popularity lift: how much more popular the lists are than the histories, as a share of the
        latter; means over rows of means over items (Abdollahpouri et al., RMSE 2019). A metric
        without a list, or without a history, is left out.
        """
        found: dict[str, float] = {}
        popularity_RxM = self._popularity(items_RxM)
        before_R = self._history_popularity()
        for k in cutoffs:
            first_n = items_RxM[:, :k][items_RxM[:, :k] >= 0]
            if not first_n.size:
                continue
            times_I = np.sort(np.bincount(first_n, minlength=len(self.count_I)))
            items = len(times_I)
            place_I = 2 * np.arange(1, items + 1) - items - 1
            found[f"coverage@{k}"] = coverage(items_RxM[:, :k], items)
            found[f"gini@{k}"] = float(place_I @ times_I) / (items * first_n.size)
            if before_R.size and before_R.mean() > 0:
                listed = float(popularity_RxM[:, :k][:, -1].mean())
                found[f"popularity lift@{k}"] = listed / float(before_R.mean()) - 1
        return found

    def _popularity(self, items_RxM: np.ndarray) -> np.ma.MaskedArray:
        """float64 [R, M]: the mean of the first 1, 2, .. M places; masked for an empty list."""
        return _means(self.count_I.astype(np.float64), items_RxM)

    def _history_popularity(self) -> np.ndarray:
        """The mean popularity of every history that is not empty."""
        row_n = self.histories.row_of(np.arange(self.histories.values.size))
        lengths_R = self.histories.lengths
        sum_R = np.bincount(row_n, self.count_I[self.histories.values], len(lengths_R))
        return sum_R[lengths_R > 0] / lengths_R[lengths_R > 0]


def later_targets(split: ItemSequences, row_R: np.ndarray) -> Ragged:
    """Of rows of a split: their target and those of their user's later rows in it, by time.

    Of rows of one time, or of unknown times, the later are those that follow in the split.
    """
    order = np.lexsort((split.timestamps[split.last_positions], split.user))
    place_of_row = np.argsort(order)
    end_of_place = np.searchsorted(split.user[order], split.user[order], side="right")
    start_R = place_of_row[row_R]
    length_R = end_of_place[start_R] - start_R
    target_n = split.items[split.last_positions][order][ranges(start_R, length_R)]
    return Ragged.from_lengths(target_n, length_R)


def _means(value_I: np.ndarray, items_RxM: np.ndarray) -> np.ma.MaskedArray:
    """float64 [R, M]: the items' mean value over the first 1, 2, .. M places; masked if empty."""
    there_RxM = items_RxM >= 0
    listed_RxM = np.cumsum(there_RxM, axis=1)
    sum_RxM = np.cumsum(np.where(there_RxM, value_I[items_RxM], 0.0), axis=1)
    return np.ma.masked_array(sum_RxM / np.maximum(listed_RxM, 1), listed_RxM == 0)


def _among(items_RxM: np.ndarray, targets: Ragged, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each place holds one of its row's targets, bool [R, M]; how many there are, [R]."""
    row_n = targets.row_of(np.arange(targets.values.size))
    keys = np.unique(row_n * num_items + targets.values)
    row_Rx1 = np.arange(len(items_RxM))[:, None]
    is_target_RxM = np.isin(row_Rx1 * num_items + items_RxM, keys) & (items_RxM >= 0)
    return is_target_RxM, np.bincount(keys // num_items, minlength=len(items_RxM))


def _diversity(vectors_IxD: np.ndarray, items_RxM: np.ndarray) -> np.ndarray:
    """float64 [R, M]: that of the first 1, 2, .. M places; NaN where they hold fewer than two."""
    vector_RxMxD = vectors_IxD[items_RxM].astype(np.float64)
    norm_RxM = np.linalg.norm(vector_RxMxD, axis=-1)
    scale_RxM = np.where((items_RxM >= 0) & (norm_RxM > 0), 1 / np.maximum(norm_RxM, 1e-30), 0.0)
    unit_RxMxD = vector_RxMxD * scale_RxM[..., None]
    sum_RxMxD, own_RxM = np.cumsum(unit_RxMxD, axis=1), np.cumsum(scale_RxM > 0, axis=1)
    count_RxM = np.cumsum(items_RxM >= 0, axis=1)
    pairs_RxM = count_RxM * (count_RxM - 1.0)
    cosines_RxM = np.sum(sum_RxMxD**2, axis=-1) - own_RxM
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs_RxM > 0, 1 - cosines_RxM / pairs_RxM, np.nan)
