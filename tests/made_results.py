"""A made work directory of experiments, whose effects are known: nothing is trained.

Each row has a latent score for its target; the rank and the NLL follow from it. What a setup adds
to the score of every row is `gain`; users, seeds and rows differ by chance, the same way for all
setups that share them.
"""

import dataclasses
import functools
import itertools
import json

import numpy as np

from tca4rec_jax.data import tfds_rec
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData
from tca4rec_jax.experiments.measures import AGREEMENT, FLUENCY
from tca4rec_jax.experiments.results import CF, FILE, POPULAR, Cell, Line, RowRanks
from tca4rec_jax.fileio import fingerprint
from tca4rec_jax.intervals import Name
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.training.validation import NLL as VALIDATED

ITEMS, USERS, PLACES = 300, 300, 10
ALPHAS, BETAS, GUIDANCES = (0.05, 0.5), (0.5, 2.0), (1.0,)
TEACHERS = {"popularity": 0.1, "sasrec": 0.8, "ease": 0.9}
"""What following each CF model without reserve would gain."""


def gain(cell: Cell) -> float:
    """What a setup adds to the score of the target, known by construction."""
    if cell.recommender == POPULAR:
        return -0.2
    if cell.recommender == CF:
        return TEACHERS[cell.cf] + 0.3
    base = {"titles": 0.0, "ids": 0.1}[cell.recommender] + 0.1 * np.log(cell.steps / 250)
    strength = TEACHERS.get(cell.cf, 0.0)
    alpha, guidance = cell.alpha or 0.0, cell.guidance or 0.0
    beta = 1.0 if cell.beta is None else cell.beta
    fit = np.exp(-(np.log(beta) ** 2))
    return base + fit * strength * alpha * (1.6 - alpha) + guidance * (0.9 * strength + 0.1)


def cells(
    data=("movielens",),
    recommenders=("titles", "ids"),
    seeds=(0, 1, 2),
    alphas=ALPHAS,
    betas=BETAS,
    guidances=GUIDANCES,
):
    """A grid: alpha and guidance over CF models, two budgets of titles, beta with one CF model."""
    found = []
    for name in data:
        found += [Cell(name, POPULAR), *(Cell(name, CF, cf, 0) for cf in TEACHERS)]
        of_titles = ("titles", 250), ("titles", 1000), ("ids", 250)
        for (recommender, steps), seed in itertools.product(of_titles, seeds):
            if recommender not in recommenders:
                continue
            run = {"seed": seed, "steps": steps, "softmax": "children", "tau": 1.0}
            plain = Cell(name, recommender, alpha=0.0, guidance=0.0, **run)
            found.append(plain)
            for cf in TEACHERS:
                own = {"cf": cf, "cf_seed": 0, "beta": 1.0, "form": "cross_entropy"}
                aligned = dataclasses.replace(plain, **own, alpha=0.5)
                found += [dataclasses.replace(aligned, alpha=alpha) for alpha in alphas]
                if steps == 250:
                    found += [dataclasses.replace(aligned, guidance=one) for one in guidances]
                if (recommender, steps, cf) == ("titles", 250, "sasrec"):
                    found += [dataclasses.replace(aligned, beta=beta) for beta in betas]
    return found


def is_chosen(cell):
    """Whether a cell is ranked on the test split: alpha = 0 and 0.5, guidance 1, beta 1."""
    chosen = {"alpha": (None, 0.0, 0.5), "guidance": (None, 0.0, 1.0), "beta": (None, 1.0)}
    return all(getattr(cell, name) in values for name, values in chosen.items())


def make_results(
    workdir,
    made=None,
    *,
    seed_noise=0.03,
    gain=gain,
    splits=("validation", "test"),
    tested=is_chosen,
):
    """Writes results.jsonl, ranks and rows of cells below a work directory."""
    made = made or cells()
    for folder in ("rows", "ranks"):
        (workdir / folder).mkdir()
    lines = []
    for split in splits:
        for data in {cell.data for cell in made}:
            np.savez(workdir / "rows" / f"{data}-{split}.npz", **_facts(data, split))
        of_split = [cell for cell in made if split == "validation" or tested(cell)]
        lines += [_line(workdir, cell, split, seed_noise, gain) for cell in of_split]
    text = "".join(line.to_json() + "\n" for line in lines)
    (workdir / FILE).write_text(text)


def _rng(*of: Name) -> np.random.Generator:
    return np.random.default_rng(int(fingerprint(list(map(str, of)))[:12], 16))


@functools.cache
def _facts(data, split):
    """The rows of a split: one or two a user; half of the targets are popular."""
    rng = _rng("rows", data, split)
    user_R = np.sort(rng.integers(0, USERS, 2 * USERS if split == "test" else USERS))
    count_I = np.round(1000 / np.arange(1, ITEMS + 1)).astype(int)
    target_R = np.minimum(rng.exponential(ITEMS / 4, len(user_R)).astype(int), ITEMS - 1)
    history_R = rng.integers(2, 60, len(user_R))
    return {
        "user_R": user_R.astype(np.int32),
        "target_R": target_R.astype(np.int32),
        "position_R": np.cumsum(history_R + 1) - 1,
        "history_R": history_R,
        "count_I": count_I,
    }


def _line(workdir, cell, split, seed_noise, gain):
    facts = _facts(cell.data, split)
    user_R, target_R = facts["user_R"], facts["target_R"]
    rows = len(user_R)
    of_user = _rng("users", cell.data).normal(size=USERS)[user_R]
    of_row = _rng("row", cell.data, split).normal(size=rows)
    of_cell = _rng("cell", cell, split).normal(size=rows)
    of_seed = seed_noise * _rng("seed", cell).normal()
    score_R = gain(cell) + 0.5 * of_user + 0.5 * of_row + 0.5 * of_cell + of_seed
    nll_R = (6.5 - score_R).astype(np.float32)
    rank_R = np.minimum(np.exp(3.2 - 1.3 * score_R), ITEMS - 1).astype(np.int32)
    lists = np.argsort(
        _rng("list", cell, split).random((rows, ITEMS)) ** 2 * np.arange(1, ITEMS + 1)
    )
    items_RxM = lists[:, :PLACES].astype(np.int32)
    if cell.is_llm:
        rank_R[rank_R >= PLACES] = -1  # which lists no more
    inside = np.flatnonzero((rank_R >= 0) & (rank_R < PLACES))
    items_RxM[items_RxM == target_R[:, None]] = ITEMS - 1
    items_RxM[inside, rank_R[inside]] = target_R[inside]
    if cell.guidance:
        nll_R[:] = np.nan
    one = nll_R[:, None], items_RxM, facts["position_R"], np.ones(1)
    ranks = RowRanks(user_R, target_R, rank_R, *one)
    key = fingerprint([dataclasses.asdict(cell), split])
    np.savez(workdir / "ranks" / f"{key}.npz", **ranks._asdict())
    return Line(
        key=key,
        cell=cell,
        split=split,
        rows=rows,
        users=len(np.unique(user_R)),
        metrics=ranks.metrics((1, 3, 5, 10)) | _measured(cell),
        ranks=f"ranks/{key}.npz",
        seconds={"train": float(cell.steps or 0), "evaluate": 60.0},
        core_seconds=2.0 * ((cell.steps or 0) + 60),
        machine="made: 1 x cpu",
        provenance=dataclasses.asdict(Provenance("made cell", "this file", {})),
        validations=_validations(cell, gain),
        run=_run(cell) if cell.is_llm else "",
    )


def _run(cell):
    """Guidances share a run."""
    return f"{cell.data}/llm/{fingerprint(dataclasses.asdict(cell) | {'guidance': None})[:8]}"


def make_data(workdir, data="movielens", split="test"):
    """Writes the data set whose rows are those of a split; its titles are hostile."""
    facts, rng = _facts(data, split), _rng("items", data)
    items = rng.integers(0, ITEMS, facts["position_R"][-1] + 1).astype(np.int32)
    items[facts["position_R"]] = facts["target_R"]
    offsets = np.concatenate([[0], facts["position_R"] + 1])
    rows = ItemSequences(facts["user_R"], items, offsets, np.zeros(len(items), np.int64))
    titles = tuple(f"<b>Film {number} & co</b>" for number in range(ITEMS))
    catalogue = Catalogue(tuple(map(str, range(ITEMS))), titles)
    folder = workdir / data / "data"
    folder.mkdir(parents=True)
    tfds_rec.write(RecData(catalogue, dict.fromkeys(SPLITS, rows), None), folder)
    Provenance("data set", "this file", {"data.history_length": 12}).save(folder)


def make_logs(workdir, lines, steps=50):
    """Writes the logs of the runs of lines: a loss, and the validations of the line."""
    for line in lines:
        if line.run:
            rng, folder = _rng("log", line.run), workdir / line.run
            folder.mkdir(parents=True, exist_ok=True)
            log = [
                {"step": step, "loss": 3 - step / steps + 0.1 * rng.normal()}
                for step in range(steps)
            ]
            log += [
                {"step": int(step), f"validation/{VALIDATED}": of[VALIDATED]}
                for step, of in line.validations.items()
            ]
            text = "".join(json.dumps(one) + "\n" for one in log)
            (folder / "log.jsonl").write_text(text)


def _measured(cell):
    follows = (cell.alpha or 0.0) + (cell.guidance or 0.0)
    agreement = {}
    for cf, strength in TEACHERS.items():
        near = strength + follows * (cf == cell.cf)
        agreement[cf] = {
            "cf rank of the first": 80 / (1 + 5 * near),
            "cf rank of the list": 90 / (1 + 3 * near),
            **dict.fromkeys(("first of both", "overlap", "kendall tau"), min(0.1 + 0.2 * near, 1)),
        }
    if not cell.is_llm or cell.guidance:
        return {AGREEMENT: agreement}
    alpha = cell.alpha or 0.0
    fluency = {
        "rows": 128,
        "perplexity": 20 + 60 * alpha**2,
        "written titles": 0.8 - 0.3 * alpha,
        "nll by decision": [
            3.5 - TEACHERS.get(cell.cf, 0) * alpha,
            1.5 - 0.2 * alpha,
            0.8,
            0.3 + 0.05 * alpha,
        ],
        "rows by decision": [128, 120, 60, 9],
    }
    return {AGREEMENT: agreement, FLUENCY: fluency}


def _validations(cell, gain):
    if not cell.is_llm:
        return {}
    gained = gain(dataclasses.replace(cell, guidance=0.0))
    at = [round(cell.steps * part) for part in (0.2, 0.4, 0.6, 0.8, 1.0)]
    return {
        str(step): {
            VALIDATED: 6.5 - gained * step / cell.steps + 2 * np.exp(-6 * step / cell.steps)
        }
        for step in at
    }
