"""How long the preparation of made interactions takes, and how much memory.

    python launch/benchmarks/data.py --interactions=2000000 --users=200000 --items=50000
    python launch/benchmarks/data.py --interactions=2000000 --source=amazon_2018 --folder=/tmp/made

The interactions are made in parts, so that any number of them fits: users and items with long
tails, five years of seconds ('files', a Parquet table) or of days ('amazon_2018', .json.gz, as
reviews have them). The preparation runs in a process of its own, with the default fields of
config.data but those in --data. What was made is deleted, unless --keep.
"""

import gzip
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from absl import app, flags
from measuring import memory_mb, run_alone

_INTERACTIONS = flags.DEFINE_integer("interactions", 2_000_000, "How many.", lower_bound=1)
_USERS = flags.DEFINE_integer("users", 50_000, "Among so many users.", lower_bound=1)
_ITEMS = flags.DEFINE_integer("items", 10_000, "Among so many items.", lower_bound=1)
_SOURCE = flags.DEFINE_enum("source", "files", ["files", "amazon_2018"], "The layout.")
_FOLDER = flags.DEFINE_string("folder", None, "A new folder for all of it; temporary by default.")
_DATA = flags.DEFINE_string("data", "{}", "Fields of config.data, in JSON.")
_BEAM = flags.DEFINE_string("beam_runner", None, "Make the rows with Apache Beam.")
_KEEP = flags.DEFINE_bool("keep", False, "Keep the files and the prepared data.")
_CASE = flags.DEFINE_string("case", None, "Of a process that is measured.")

_PART = 1 << 20
_DAY, _FIRST, _DAYS = 86_400, 1_300_000_000 // 86_400 * 86_400, 5 * 365


def parts(
    interactions: int, users: int, items: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Users, items and seconds, int64 [at most _PART] each."""
    rng = np.random.default_rng(seed)
    for start in range(0, interactions, _PART):
        u_3xn = rng.random((3, min(_PART, interactions - start)))
        yield (
            (users * u_3xn[0] ** 1.5).astype(np.int64),
            (items * u_3xn[1] ** 2.5).astype(np.int64),
            _FIRST + (_DAYS * _DAY * u_3xn[2]).astype(np.int64),
        )


def write_table(folder: Path, interactions: int, users: int, items: int) -> dict[str, str]:
    """A Parquet table of interactions and one of items; data.* of them."""
    path = folder / "interactions.parquet"
    names = ("user", "item", "timestamp")
    with pyarrow.parquet.ParquetWriter(path, pa.schema([(n, pa.int64()) for n in names])) as file:
        for part in parts(interactions, users, items):
            file.write_table(pa.table(dict(zip(names, part, strict=True))))
    catalogue = {"item": [*map(str, range(items))], "title": [f"Title {n}" for n in range(items)]}
    pyarrow.parquet.write_table(pa.table(catalogue), folder / "items.parquet")
    return {"interactions": str(path), "catalogue": str(folder / "items.parquet")}


def write_reviews(folder: Path, interactions: int, users: int, items: int) -> dict[str, str]:
    """Reviews and metadata as Amazon 2018 has them; data.* of them."""
    reviews, meta = folder / "Made.json.gz", folder / "meta_Made.json.gz"
    text = "What a reviewer writes about a thing: " * 16
    row = (
        '{"overall": %d.0, "verified": true, "reviewerID": "A%013d", "asin": "B%09d", '
        f'"reviewText": "{text}", "unixReviewTime": %d}}\n'
    )
    with gzip.open(reviews, "wt", compresslevel=1) as file:
        for user_n, item_n, time_n in parts(interactions, users, items):
            day_n = time_n // _DAY * _DAY
            columns = (one.tolist() for one in (user_n % 5 + 1, user_n, item_n, day_n))
            file.writelines(row % values for values in zip(*columns, strict=True))
    with gzip.open(meta, "wt", compresslevel=1) as file:
        file.writelines(
            json.dumps({"asin": f"B{n:09}", "title": f"Title {n}", "brand": f"Brand {n % 99}"})
            + "\n"
            for n in range(items)
        )
    return {"interactions": str(reviews), "catalogue": str(meta)}


def measured(case: dict) -> dict:
    """What the preparation of `case` costs this process and the workers that it starts."""
    from tca4rec_jax.data.dataset import prepare

    start = time.perf_counter()
    beam = [f"--runner={case['beam']}"] if case["beam"] else None
    prepare(case["data"], case["data_dir"], beam)
    wall = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "seconds": round(wall, 1),
        "cpu_seconds": round(sum(one.ru_utime + one.ru_stime for one in used), 1),
        "peak_gb": round(memory_mb("VmHWM") / 1e3, 2),
        "peak_of_a_worker_gb": round(used[1].ru_maxrss / 1e6, 2),
    }


def main(_):
    if _CASE.value:
        print(json.dumps(measured(json.loads(_CASE.value))))
        return
    folder = Path(_FOLDER.value or tempfile.mkdtemp())
    if _FOLDER.value:
        if folder.exists():  # it is deleted in the end
            sys.exit(f"data: --folder={folder} exists already: name a new one")
        folder.mkdir(parents=True)
    sizes = _INTERACTIONS.value, _USERS.value, _ITEMS.value
    try:
        write = write_reviews if _SOURCE.value == "amazon_2018" else write_table
        data = {"source": _SOURCE.value} | write(folder, *sizes) | json.loads(_DATA.value)
        case = {"data": data, "data_dir": str(folder / "data"), "beam": _BEAM.value}
        found = run_alone(__file__, case, "the preparation", pages_reused=False)
        names = ("interactions", "users", "items")
        print(json.dumps(dict(zip(names, sizes, strict=True)) | {"data": data} | (found or {})))
        sys.exit(found is None)
    finally:
        if not _KEEP.value:
            shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
