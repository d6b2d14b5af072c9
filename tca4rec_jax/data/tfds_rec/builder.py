"""One TFDS data set of item sequences, kept in ArrayRecord files; TensorFlow is not needed.

An example is a row: {'user': int32, 'items': int32 [length], 'timestamps': int64 [length]}, and
with ratings 'liked': int32 [length], 1 or 0. The catalogue lies in the data set's metadata.
Examples keep the order of the rows, so example r of a split is row r of its ItemSequences.

The formats that people download are configs of the builder, each with a version, a homepage and
whom to cite; data of other sources have no config.
"""

import contextlib
import itertools
import multiprocessing
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tensorflow_datasets.core.splits import SplitDict
from tensorflow_datasets.proto import tf_example_pb2

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.raw import FORMATS
from tca4rec_jax.data.records import write_shard
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData, SplitReader
from tca4rec_jax.data.windows import MadeData, RowSource, even_parts
from tca4rec_jax.errors import UserError
from tca4rec_jax.terminal import Progress

_READ_AT_ONCE = 8192
_CODES = {"user": "i", "items": "i", "timestamps": "q", "liked": "b"}  # of arrays: int32, .., int8
_ITEMS_OF_A_SHARD = 1 << 23  # about 100 MB
_MOST_WORKERS = 16  # each holds 0.2 GB


class RecSequences(FileReaderBuilder):
    """Builder of the data set `rec_sequences`; its config is None or one of `builder_config`.

    TFDS' own writers encode a row at a time, and hold or copy all of them; here a shard is written
    at once by `write_shard`, several of them by processes of their own, or by another `write`: the
    bytes of each of the shards in turn.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, data: RecData | MadeData, write: "WriteShards | None" = None, **kwargs):
        self._data, self._write = data, write or _written
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "user": np.int32,
            "items": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "timestamps": tfds.features.Tensor(shape=(None,), dtype=np.int64),
        }
        if self._data.splits[SPLITS[0]].rated:
            features["liked"] = tfds.features.Tensor(shape=(None,), dtype=np.int32)
        metadata: dict[str, Any] = {
            "item_ids": list(self._data.catalogue.item_ids),
            "titles": list(self._data.catalogue.titles),
            "user_ids": list(self._data.user_ids or ()),
        }
        if self._data.catalogue.attributes:
            metadata["attributes"] = dict(self._data.catalogue.attributes)
        form = FORMATS[self.builder_config.name] if self.builder_config else None
        source = {"homepage": form.homepage, "citation": form.citation} if form else {}
        return self.dataset_info_from_configs(
            description="Rows of items, oldest first, and the catalogue they index.",
            **source,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(metadata),
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager, download_config=None):
        del dl_manager, download_config  # nothing to download
        shards = {name: self._shards(name) for name in SPLITS}
        sizes = self._write([*itertools.chain(*shards.values())])
        infos = []
        for name, of_split in shards.items():
            rows, size = [len(shard.rows) for shard in of_split], 0
            with Progress(f"Writing {name}", sum(rows), "rows") as progress:
                for count, written in zip(rows, sizes, strict=False):
                    size += written
                    progress.advance(count)
            template = self._get_filename_template(split_name=name)
            infos.append(tfds.core.SplitInfo(name, rows, size, template))
        self.info.set_splits(SplitDict(infos))

    def _shards(self, split: str) -> list["Shard"]:
        """The files of a split, which share its rows evenly."""
        rows = self._data.splits[split]
        bounds = even_parts(rows, _ITEMS_OF_A_SHARD)
        paths = self._get_filename_template(split_name=split).sharded_filepaths(len(bounds))
        return [
            Shard(rows.between(*bound), Path(path))
            for bound, path in zip(bounds, paths, strict=True)
        ]


class Shard(NamedTuple):
    """Rows and the file for them."""

    rows: RowSource
    path: Path


WriteShards = Callable[[Sequence[Shard]], Iterator[int]]


def _written(shards: Sequence[Shard]) -> Iterator[int]:
    """Writes the shards, with processes of their own if a split has several; the size of each."""
    workers = min(len(os.sched_getaffinity(0)), len(shards), _MOST_WORKERS)
    if workers == 1 or len(shards) == len(SPLITS):
        yield from itertools.starmap(write_shard, shards)
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(write_shard, *zip(*shards, strict=True))


def builder_config(source: str) -> tfds.core.BuilderConfig | None:
    """The config of a format in raw.FORMATS; None for another source."""
    if source not in FORMATS:
        return None
    form = FORMATS[source]
    return tfds.core.BuilderConfig(name=source, version=form.version, description=form.description)


def write(
    data: RecData | MadeData,
    data_dir: str | os.PathLike,
    source: str = "files",
    write_shards: WriteShards | None = None,
) -> None:
    """Writes the data set below data_dir, as rec_sequences/1.0.0; of a format in raw.FORMATS as
    rec_sequences/FORMAT/VERSION."""
    files = {"data_dir": str(data_dir), "file_format": "array_record"}
    with _quiet():
        config = builder_config(source)
        RecSequences(data=data, write=write_shards, config=config, **files).download_and_prepare()


def read(data_dir: str | os.PathLike) -> RecData:
    """The data that `write` wrote; a split is read when it is first asked for.

    Raises FileNotFoundError if there is no such data set, UserError if it or a split is damaged.
    """
    builder = _open(data_dir)
    metadata = builder.info.metadata
    attributes = metadata.get("attributes", {})
    catalogue = Catalogue(
        tuple(metadata["item_ids"]),
        tuple(metadata["titles"]),
        {name: tuple(texts) for name, texts in attributes.items()},
    )
    user_ids = tuple(metadata["user_ids"]) if "user_ids" in metadata else None
    return RecData(catalogue, SplitReader(partial(_read_split, builder), catalogue), user_ids)


def _open(data_dir: str | os.PathLike) -> tfds.core.DatasetBuilder:
    found = sorted(Path(data_dir, "rec_sequences").rglob("dataset_info.json"))
    if not found:
        raise FileNotFoundError(f"{data_dir} holds no prepared data set (run prepare_data first)")
    folder = found[0].parent
    try:
        with _quiet():
            return tfds.builder_from_directory(str(folder))
    except Exception as error:  # whatever TFDS raises for damaged JSON
        raise UserError(f"{folder} is damaged: {error}; delete it and prepare again") from error


def _read_split(builder: tfds.core.DatasetBuilder, name: str) -> ItemSequences:
    """All rows of a split. The records are parsed directly, which is 5 times faster than TFDS."""
    try:
        records = builder.as_data_source(name).data_source
        columns = {name: array(_CODES[name]) for name in _CODES if name in builder.info.features}
        offsets = array("q", [0])
        rows = range(len(records))
        for start in rows[::_READ_AT_ONCE]:
            for record in records.__getitems__(rows[start : start + _READ_AT_ONCE]):
                feature = tf_example_pb2.Example.FromString(record).features.feature
                for column, values in columns.items():
                    values.extend(feature[column].int64_list.value)
                offsets.append(len(columns["items"]))
        user_R, item_n, time_n, *liked = map(np.asarray, columns.values())
        flags = liked[0].astype(bool) if liked else None
        return ItemSequences(user_R, item_n, np.asarray(offsets), time_n, flags)
    except Exception as error:  # ArrayRecord, protobuf and TFDS each have errors of their own
        raise UserError(
            f"the split {name!r} in {builder.data_path} is damaged: {error}; delete the folder "
            "and prepare the data again"
        ) from error


@contextlib.contextmanager
def _quiet():
    """Without TFDS's progress bars and log lines: they tell of downloads, and there are none."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()
