"""CF models against plain PyTorch renderings of their papers; what their store and ranking take.

    python launch/benchmarks/cf.py --config=configs/quickstart.py --workdir=runs/x     # accuracy
    python launch/benchmarks/cf.py --what=speed --published=data/Office_Products
    python launch/benchmarks/cf.py --what=store
    python launch/benchmarks/cf.py --what=ranking

accuracy: every model and its rendering are trained on the data in WORKDIR/data with the same loss,
  width, batch, early stopping (validation NDCG@10, patience 10) and seeds, ranked over the whole
  catalogue; NDCG@10 of the test rows. BPR-MF and LightGCN are compared where users are known, as in
  their papers: of each training user's items the last is the test, the one before it the
  validation, ranked by the user's own vector among the items he had not had. EASE's rendering is
  its closed form in NumPy.
speed: seconds per epoch of SASRec on the rows of a published data set, which both hold in memory:
  the same batches, sizes and loss (one target per row, binary cross-entropy); no validation.
store: writing and reading dense and factorised logits of 10,000 rows and 27,008 items.
ranking: CPU seconds, compilation included, and peak memory of the process while 1,024 rows of
  factorised logits rank 100,000 items: as an evaluation does it, and as a CF model's own report.

PyTorch is needed for accuracy and speed only; the renderings are in cf_pytorch.py.
"""

import dataclasses
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from measuring import memory_mb, restart_peak

from tca4rec_jax.cf.logits_format import Origin
from tca4rec_jax.cf.logits_store import open_store
from tca4rec_jax.cf.logits_writer import write_store
from tca4rec_jax.cf.models.registry import MODELS
from tca4rec_jax.cf.scoring import host_items, score_rows
from tca4rec_jax.cf.trainer import FitConfig, evaluate, fit
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.dataset import load
from tca4rec_jax.data.published import read_published
from tca4rec_jax.data.sequences import ItemSequences, RecData
from tca4rec_jax.evaluation.rankings import full_ranking
from tca4rec_jax.launching import CONFIG, WORKDIR, start
from tca4rec_jax.metrics import ndcg
from tca4rec_jax.reporting import show_table, write_results

WHATS = ["accuracy", "speed", "store", "ranking"]
_WHAT = flags.DEFINE_enum("what", WHATS[0], WHATS, "What is measured.")
_MODELS = flags.DEFINE_list(
    "models", ["sasrec", "gru4rec", "caser", "bert4rec", "bpr_mf", "lightgcn", "ease"], "Which."
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Trainings of each.")
_EPOCHS = flags.DEFINE_integer("epochs", 40, "At most; for speed the timed ones.")
_PUBLISHED = flags.DEFINE_string("published", "", "Folder of a published data set, for speed.")
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file for the numbers.")

BY_USER = ("bpr_mf", "lightgcn")
PATIENCE = 10


@dataclasses.dataclass(frozen=True)
class Task:
    """What a rendering gets.

    Attributes:
      architecture: the config of our module.
      training: how both are trained.
      train, validation: see fit.fit.
      test: rows that the best epoch's model is judged on.
    """

    architecture: object
    training: FitConfig
    train: ItemSequences
    validation: ItemSequences
    test: ItemSequences


def task_of(name: str, data: RecData, seed: int) -> Task:
    """The task of a model on MovieLens or any other data."""
    kind, train = MODELS[name], data.splits["train_sequences"]
    validation, test = data.splits["validation"], data.splits["test"]
    sizes = {"num_items": data.catalogue.num_items, "history_length": 10}
    if name in BY_USER:
        test = train.take(train.lengths > 3)
        validation = _without_last(test)
        train = _without_last(validation)
        sizes["num_users"] = len(train)
    given = {"units": 64, "dropout": 0.3, "blocks": 2, "layers": 2, "heads": 1}
    names = {field.name for field in dataclasses.fields(kind.config)}
    fields = {key: value for key, value in given.items() if key in names}
    own = dataclasses.asdict(kind.training) if kind.training else {}
    epochs = {"max_epochs": _EPOCHS.value, "patience": PATIENCE, "seed": seed}
    config = kind.config(**sizes, **fields)
    return Task(config, FitConfig(**own, **epochs), train, validation, test)


def _without_last(sequences: ItemSequences) -> ItemSequences:
    last = np.zeros(len(sequences.items), bool)
    last[sequences.last_positions] = True
    offsets = np.concatenate([[0], np.cumsum(sequences.lengths - 1)])
    return ItemSequences(
        sequences.user, sequences.items[~last], offsets, sequences.timestamps[~last]
    )


def known_users_ndcg(model: nnx.Module, rows: ItemSequences) -> dict[str, float]:
    """NDCG@10 of the users' last items among those they had not had before."""
    seen_RxS, target_R = rows.histories_and_targets(int(rows.lengths.max()) - 1)
    vector_UxD = np.asarray(model.vectors()[0])
    scores = score_rows(vector_UxD, host_items(model), target_R, seen_RxS)
    return {"ndcg@10": float(ndcg(scores.rank, 10).mean())}


def ours(name: str, task: Task) -> tuple[float, float]:
    """(NDCG@10 of the test rows, seconds)."""
    began = time.perf_counter()
    ranked = known_users_ndcg if name in BY_USER else evaluate
    model = MODELS[name].module(task.architecture, rngs=nnx.Rngs(task.training.seed))
    model.fit_statistics(task.train)
    if MODELS[name].training is not None:
        model = fit(model, task.train, task.validation, task.training, evaluate=ranked).model
    return ranked(model, task.test)["ndcg@10"], time.perf_counter() - began


def accuracy() -> dict:
    """{model: {column: value}}; see the module's docstring."""
    from cf_pytorch import rendering  # needs torch

    data = load(Path(WORKDIR.value) / "data")
    table = {}
    for name in _MODELS.value:
        runs = {"ours": [], "PyTorch": []}
        times = {"ours": [], "PyTorch": []}
        for seed in range(1 if name == "ease" else _SEEDS.value):
            task = task_of(name, data, seed)
            for label, run in (("ours", ours), ("PyTorch", rendering)):
                value, seconds = run(name, task)
                runs[label].append(value)
                times[label].append(seconds)
                print(
                    f"{name} {label} seed {seed}: NDCG@10 {value:.4f}, {seconds:.0f} s", flush=True
                )
        means = {label: float(np.mean(values)) for label, values in runs.items()}
        table[MODELS[name].label] = {
            **{f"{label}, NDCG@10": mean for label, mean in means.items()},
            "ratio": means["ours"] / means["PyTorch"],
            **{
                f"{label}, seeds": " ".join(f"{v:.4f}" for v in values)
                for label, values in runs.items()
            },
            **{f"{label}, s": f"{np.mean(values):.0f}" for label, values in times.items()},
        }
        if _OUTPUT.value:  # a model takes minutes: what is done is kept
            write_results(Path(_OUTPUT.value), table)
    return table


def speed() -> dict:
    """Seconds per epoch of SASRec in the published settings, on the clock and of the processor."""
    from cf_pytorch import sasrec_epochs

    data = read_published(_PUBLISHED.value)
    kind, train = MODELS["sasrec"], data.splits["train"]
    architecture = kind.config(data.catalogue.num_items, 10, dropout=0.5)
    training = FitConfig(loss="bce", targets="last", max_epochs=_EPOCHS.value, patience=10**6)
    few = data.splits["validation"].take(np.arange(1))  # the timing is of training alone
    model = kind.module(architecture, rngs=nnx.Rngs(0))
    timed = partial(fit, model, train, few, evaluate=lambda *_: {"ndcg@10": 0.0})
    timed(dataclasses.replace(training, max_epochs=1))  # compiles
    began = time.process_time()
    record = timed(training).epochs
    processor = {"ours": time.process_time() - began}
    clock = {"ours": np.diff([0.0, *(epoch["seconds"] for epoch in record)])}
    clock["PyTorch"], processor["PyTorch"] = sasrec_epochs(
        Task(architecture, training, train, few, few)
    )
    table = {
        name: {
            "median, s": float(np.median(seconds)),
            "fastest, s": float(np.min(seconds)),
            "processor, s": processor[name] / _EPOCHS.value,
        }
        for name, seconds in clock.items()
    }
    table["PyTorch / ours"] = {
        column: value / table["ours"][column] for column, value in table["PyTorch"].items()
    }
    return table


def store() -> dict:
    """Sizes, seconds and bit-equality of stores of 10,000 rows and 27,008 items."""
    num_rows, num_items, width = 10_000, 27_008, 64
    rng = np.random.default_rng(0)
    catalogue = Catalogue(*(tuple(str(item) for item in range(num_items)) for _ in range(2)))
    rows = ItemSequences(
        np.arange(num_rows),
        rng.integers(0, num_items, num_rows),
        np.arange(num_rows + 1),
        np.full(num_rows, -1),
    )
    logits = rng.standard_normal((num_rows, num_items), np.float32)
    factorised = {
        "vectors": rng.standard_normal((num_rows, width), np.float32),
        "item_table": rng.standard_normal((num_items, width), np.float32),
    }
    cases = {
        "dense float32": ({"logits": logits}, "float32", 0),
        "dense bfloat16": ({"logits": logits}, "bfloat16", 0),
        "top 100, float32": ({"logits": logits}, "float32", 100),
        "factorised float32": (factorised, "float32", 0),
    }
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, (arrays, dtype, top_k) in cases.items():
            table[label] = _store_case(
                Path(folder) / "store", rows, catalogue, arrays, dtype=dtype, top_k=top_k
            )
    return table


def _store_case(path, rows, catalogue, arrays, *, dtype, top_k) -> dict:
    began = time.perf_counter()
    write_store(path, rows, catalogue, **arrays, origin=Origin("random"), dtype=dtype, top_k=top_k)
    written = time.perf_counter()
    opened = open_store(path, rows, catalogue)
    ready = time.perf_counter()
    given, *shared = (
        array.astype(jax.numpy.dtype(dtype)).astype(np.float32) for array in arrays.values()
    )
    equal = all(
        np.array_equal(opened.read(np.arange(start, start + 1000)), given[start : start + 1000])
        for start in range(0, len(given), 1000)
    )
    equal &= all(np.array_equal(opened.item_table, table) for table in shared)
    rng, batches = np.random.default_rng(1), []
    for _ in range(30):  # batches of 16 rows in random order
        chosen = rng.choice(len(given), 16, replace=False)
        start = time.perf_counter()
        opened.read(chosen)
        batches.append(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "MB": size / 1e6,
        "written, s": written - began,
        "opened and checked, s": ready - written,
        "bit-equal": "-" if top_k else str(equal),
        "16 random rows, ms": 1e3 * float(np.median(batches)),
        "slowest, ms": 1e3 * float(np.max(batches)),
    }


def ranking() -> dict:
    """CPU seconds and peak memory of two rankings of 1,024 rows over 100,000 items."""
    num_rows, num_items, width = 1024, 100_000, 64
    rng = np.random.default_rng(0)
    vector_RxD = rng.standard_normal((num_rows, width), np.float32)
    items = CFItems(rng.standard_normal((num_items, width), np.float32) / 8)
    title_I = rng.permutation(np.arange(num_items) * 9 // 10)  # a tenth shares its title
    target_R = rng.integers(0, num_items, num_rows)
    cases = {
        "full_ranking": (full_ranking, (title_I, target_R, (0.5, 1.0, 2.0, 4.0))),
        "score_rows": (score_rows, (target_R,)),
    }
    table = {}
    for label, (function, rest) in cases.items():
        restart_peak()
        began = time.process_time()
        function(vector_RxD, items, *rest)
        table[label] = {
            "CPU seconds": time.process_time() - began,
            "peak GB": memory_mb("VmHWM") / 1e3,
        }
    return table


def main(argv):
    del argv
    start()
    measured = dict(zip(WHATS, (accuracy, speed, store, ranking), strict=True))
    table = measured[_WHAT.value]()
    digits = 4 if _WHAT.value == "accuracy" else 3
    show_table(table, title=_WHAT.value, digits=digits)
    if _OUTPUT.value:
        write_results(Path(_OUTPUT.value), table)


if __name__ == "__main__":
    del CONFIG  # the flag is accepted: the data are those of the config's workdir
    app.run(main)
