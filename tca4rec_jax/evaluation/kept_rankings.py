"""The ranks that a table was made of, kept beside it: what tables are compared by.

Axis letters: R rows, L models.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import COMMAND, NLL
from tca4rec_jax.evaluation.rankings import EvaluationRows, ModelRanking
from tca4rec_jax.fileio import read_npz, write_npz
from tca4rec_jax.metrics import metric_differences
from tca4rec_jax.provenance import Provenance

FILE = "rankings.npz"
_SAME = {
    "rows": "rows",
    "candidates": "candidates",
    "titles": "items or their titles",
    "compared.allowed items": "items that may be recommended (allow, deny, history, title length)",
}
"""What has to be the same of tables that are compared: the input's name, and in words."""
_SAME_TITLES = {"evaluation.text_match": "way to compare titles (evaluation.text_match)"}
"""What else, if hits are by title."""


class Ranks(NamedTuple):
    """What a comparison takes of a model."""

    rank_R: np.ndarray  # int32, 0-based rank of the target, -1 if it is not ranked
    title_rank_R: np.ndarray  # int32, the same among titles
    nll_R: np.ndarray  # float32, at the model's best temperature; NaN if it has none

    @classmethod
    def of(cls, ranking: ModelRanking, temperatures: tuple[float, ...]) -> "Ranks":
        """Of a ranking, its likelihoods at these temperatures."""
        best = ranking.best_nll(temperatures)
        nll_R = np.full(len(ranking.rank_R), np.nan, np.float32) if best is None else best[1]
        return cls(ranking.rank_R, ranking.title_rank_R, nll_R)

    def differences(
        self, baseline: "Ranks", cutoffs: Sequence[int], hits: str
    ) -> dict[str, np.ndarray]:
        """Of each row, paired, from a baseline's: {'hr@K' | 'ndcg@K' | NLL, if both have one: [R]}.

        `hits` is as evaluation.hits. Raises ValueError for another number of rows.
        """
        pair = hit_ranks(self, hits), hit_ranks(baseline, hits)
        found = {name: one for k in cutoffs for name, one in metric_differences(*pair, k).items()}
        nll_R = self.nll_R - baseline.nll_R
        return found if np.isnan(nll_R).any() else found | {NLL: nll_R}


def hit_ranks(ranks: Ranks | ModelRanking, hits: str) -> np.ndarray:
    """int [R]: the ranks that count, by evaluation.hits."""
    return ranks.rank_R if hits == "item" else ranks.title_rank_R


@dataclasses.dataclass(frozen=True, eq=False)
class KeptRankings:
    """The models of one table on its rows, by label."""

    folder: Path
    made_from: Provenance
    user_R: np.ndarray  # int32
    target_R: np.ndarray  # int32
    models: Mapping[str, Ranks]

    @classmethod
    def of(
        cls,
        folder: Path,
        made_from: Provenance,
        rows: EvaluationRows,
        rankings: Mapping[str, ModelRanking],
        temperatures: tuple[float, ...],
    ) -> "KeptRankings":
        """Of an evaluation."""
        models = {label: Ranks.of(one, temperatures) for label, one in rankings.items()}
        return cls(folder, made_from, rows.sequences.user, rows.target_R, models)

    def write(self) -> None:
        """Writes rankings.npz into the folder."""
        columns = Ranks(*map(np.stack, zip(*self.models.values(), strict=True)))._asdict()
        write_npz(
            self.folder / FILE,
            provenance=self.made_from.to_json(),
            labels=np.array(list(self.models)),
            user_R=self.user_R,
            target_R=self.target_R,
            **columns,
        )

    @classmethod
    def read(cls, folder: Path) -> "KeptRankings":
        """Raises UserError for a folder without rankings.npz, or a damaged one."""
        path = folder / FILE
        if not path.is_file():
            raise UserError(
                f"{folder} has no {FILE}: give a work directory, or a folder results/NAME in one, "
                f"in which {COMMAND} has ranked"
            )
        saved = read_npz(path, remedy=f"make it anew with {COMMAND}")
        if missing := {"provenance", "labels", "user_R", "target_R", *Ranks._fields} - {*saved}:
            raise UserError(f"{path} lacks {sorted(missing)}: make it anew with {COMMAND}")
        made_from = Provenance.from_json(str(saved["provenance"]), path)
        columns = zip(*(saved[name] for name in Ranks._fields), strict=True)
        models = dict(zip(saved["labels"].tolist(), map(Ranks._make, columns), strict=True))
        return cls(folder, made_from, saved["user_R"], saved["target_R"], models)

    @property
    def longest(self) -> int:
        """The K up to which the lists of its models go."""
        return self.made_from.inputs["evaluation.cutoffs"][-1]

    def check_same_rows(self, other: "KeptRankings", hits: str = "item") -> None:
        """Raises UserError, with what differs, unless another table ranks the same for each row.

        `hits`, as evaluation.hits, are what will be compared.
        """
        now, own = other.made_from.inputs, self.made_from.inputs
        same = _SAME | (_SAME_TITLES if hits == "title" else {})
        found = [words for name, words in same.items() if own.get(name) != now.get(name)]
        if not found:
            return
        more = f" ({self._first_difference(other)})" if found[0] == "rows" else ""
        raise UserError(
            f"{self.folder} and {other.folder} cannot be compared, they have not the same "
            f"{', nor the same '.join(found)}{more}: evaluate both alike"
        )

    def _first_difference(self, other: "KeptRankings") -> str:
        """Of the rows."""
        if len(self.target_R) != len(other.target_R):
            return f"{len(self.target_R)} and {len(other.target_R)} of them"
        differ_R = (self.user_R != other.user_R) | (self.target_R != other.target_R)
        if not differ_R.any():
            return "of the same users and targets, with other histories or times"
        row = int(np.argmax(differ_R))
        one, two = (f"user {t.user_R[row]}, item {t.target_R[row]}" for t in (self, other))
        return f"row {row} is {one} here and {two} there"
