"""Interactions sorted by time and by user, on disk where they are too many for memory.

DuckDB sorts them: its memory is bounded, and what exceeds it goes to the folder of the result.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from tca4rec_jax.data.interactions import Interactions
from tca4rec_jax.data.signals import stopped_by_signals
from tca4rec_jax.data.windows import Histories
from tca4rec_jax.errors import UserError, one_line
from tca4rec_jax.fileio import check_room

_MEMORY, _THREADS, _BATCH = "1GB", 4, 1 << 20
ELSEWHERE = "take a --workdir elsewhere"


def sort_by_user(
    interactions: Interactions, folder: Path, seed: int = 0, ties: str = "shuffled"
) -> Histories:
    """The interactions by user and time, in files of a new folder; and their order in time.

    In time, interactions at one moment stand in an order drawn from `seed`: users rate in bursts
    that share a timestamp; if these were ordered by item id, that would tell the next item. The
    order in which the file held them has no effect. Without times they stay as given.

    With ties 'numbered' those of equal time stand in the order of their users and items, which are
    numbered as they first occur in the order of times, users and items: the published order.

    Raises UserError if the disk of the folder lacks room, before the sort if for the files alone.
    """
    columns = {name: getattr(interactions, name) for name in ("user", "item", "timestamp")}
    if interactions.rating is not None:
        columns["rating"] = interactions.rating
    dtypes = {name: column.dtype for name, column in columns.items()}
    dtypes["place"] = index_type(len(columns["user"]))
    num_bytes = len(columns["user"]) * sum(dtype.itemsize for dtype in dtypes.values())
    check_room(folder.parent, num_bytes, "the sorted interactions", ELSEWHERE)
    names = ", ".join(f'"{name}"' for name in columns)
    with _database(folder) as database:
        database.register("given", pa.table(columns))
        if interactions.has_times:
            _canonical(database, names)
            order = (
                _NUMBERED if ties == "numbered" else _drawn(database, len(columns["user"]), seed)
            )
            query = f"CREATE TABLE ordered AS SELECT {names} FROM canonical {order}"
            database.execute(query)
            database.execute("DROP TABLE canonical")
        else:
            database.execute("CREATE TABLE ordered AS FROM given")
        by_user = f'SELECT {names}, rowid AS place FROM ordered ORDER BY "user", rowid'
        _save(database.sql(by_user), folder, dtypes, len(columns["user"]))
    return Histories(folder)


_NUMBERED = """
    JOIN (SELECT "user", min(rowid) AS first_of_user FROM canonical GROUP BY ALL) USING ("user")
    JOIN (SELECT item, min(rowid) AS first_of_item FROM canonical GROUP BY ALL) USING (item)
    ORDER BY timestamp, first_of_user, first_of_item, canonical.rowid
"""


@contextmanager
def _database(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    folder.mkdir()
    spilled = folder / "spilled"
    limits: dict[str, Any] = {
        "memory_limit": _MEMORY,
        "threads": _THREADS,
        "temp_directory": str(spilled),
    }
    try:
        with stopped_by_signals(), duckdb.connect(":memory:", config=limits) as database:
            yield database
    except duckdb.OperationalError as error:
        raise UserError(
            f"{folder.parent}: the interactions cannot be sorted there: {one_line(error, 200)}: "
            f"make room in memory ({_MEMORY}) and on its disk, or {ELSEWHERE}"
        ) from error


def _canonical(database: duckdb.DuckDBPyConnection, names: str) -> None:
    """By time, user and item; what is equal in all three keeps its order."""
    database.execute(
        f"CREATE TABLE canonical AS SELECT {names} FROM (SELECT *, row_number() OVER () AS n FROM "
        'given) ORDER BY timestamp, "user", item, n'
    )


def _drawn(database: duckdb.DuckDBPyConnection, count: int, seed: int) -> str:
    """What orders `canonical` by time and, at one moment, as a shuffle of all of it has them."""
    database.register("shuffled", pa.table({"shuffled": shuffled(count, seed)}))
    return "POSITIONAL JOIN shuffled ORDER BY timestamp, shuffled"


def shuffled(count: int, seed: int) -> np.ndarray:
    """Int [count], where a shuffle drawn from `seed` puts each."""
    drawn_n = np.random.default_rng(seed).permutation(np.arange(count, dtype=index_type(count)))
    place_n = np.empty_like(drawn_n)
    place_n[drawn_n] = np.arange(count, dtype=drawn_n.dtype)
    return place_n


def index_type(count: int) -> np.dtype:
    """Of the places of so many interactions."""
    return np.dtype(np.int32 if count < 2**31 else np.int64)


def _save(
    rows: duckdb.DuckDBPyRelation, folder: Path, dtypes: dict[str, np.dtype], count: int
) -> None:
    """The columns of a query as .npy files, a batch at a time."""
    with ExitStack() as stack:
        files = {}
        for name, dtype in dtypes.items():
            files[name] = stack.enter_context((folder / f"{name}.npy").open("wb"))
            header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(files[name], header)
        for batch in rows.to_arrow_reader(_BATCH):
            for name, dtype in dtypes.items():
                files[name].write(batch[name].to_numpy().astype(dtype, copy=False).data)
