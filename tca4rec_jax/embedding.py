"""The LLM's embeddings of items: its last hidden states over their texts, pooled.

LC-Rec (arXiv 2311.09049) and LETTER (arXiv 2405.07314) make semantic ids of such vectors, LLM2Rec
(arXiv 2506.21579) puts them into CF models. data/item_vectors.py says where they lie, and reads
them.

Axes: core/__init__.py.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from tca4rec_jax.batching import bucket_lengths
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.item_tokens import TextEncoder
from tca4rec_jax.data.item_vectors import EMBED_ITEMS, PARTS, VECTORS, embeddings_folder
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.templates import check_fields_of, parse
from tca4rec_jax.decoding.embedder import Embedder, ItemTexts
from tca4rec_jax.distributed import sharding
from tca4rec_jax.distributed.multihost import (
    barrier,
    broadcast_from_main,
    check_processes_agree,
    is_main_process,
    only_writing_job,
)
from tca4rec_jax.errors import ItemError, UserError, items_named
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import atomic_path, check_room, remove
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.tokenizer import text_encoder
from tca4rec_jax.provenance import FILE, Provenance
from tca4rec_jax.terminal import Progress
from tca4rec_jax.training.run_inputs import llm_inputs

_PART_ROWS = 512  # items of one file of the parts


def embed_items(experiment: Experiment, run: str = "") -> Path:
    """Writes the embeddings of all items by the pretrained LLM, or by that of a run.

    Returns the file. An interrupted call goes on from its parts, a complete one is found; what was
    made from other inputs is replaced. All processes of a job call this alike.

    Raises UserError for an embedding.text as `item_texts`, a batch that does not divide over the
    mesh, a file in its place that it has not written, and a disk without room; as
    `Experiment.check_run`; FloatingPointError, naming an item, for states that are not finite.
    """
    config, catalogue = experiment.config.embedding, experiment.data.catalogue
    folder, mesh = embeddings_folder(experiment.workdir), experiment.mesh
    sharding.check_batch_size(mesh, config.batch_size, "embedding.batch_size", "prompts")
    longest = min(config.max_tokens, experiment.source.architecture.max_positions)
    prompt = experiment.config.prompt
    encoder = text_encoder(experiment.source.tokenizer, prompt.bos, prompt.bos_token)
    with items_named(catalogue.item_ids):
        texts = tokenise(item_texts(config.text, catalogue), encoder, longest)
    made_from = Provenance("item embeddings", EMBED_ITEMS, _inputs(experiment, run))
    check_processes_agree(made_from.fingerprint, "item texts or LLM")
    with only_writing_job(folder):
        parts = _Parts(folder, np.argsort(-texts.tokens.lengths, kind="stable"))
        if missing := parts.begin(made_from):
            # As it came: the ids that prompts may show are made of what is written here.
            decoder = experiment.inference_decoder(run) if run else Decoder(*experiment.pretrained)
            num_bytes = 8 * catalogue.num_items * decoder.config.hidden_size
            check_room(folder, num_bytes, f"embeddings of {catalogue.num_items} items")
            embedder = Embedder(decoder, mesh, config.pooling, config.batch_size)
            buckets = bucket_lengths(texts.tokens.lengths, config.buckets)
            _fill(parts, missing, partial(embedder.embed, texts, buckets), catalogue)
        parts.join()
    return folder / VECTORS


def item_texts(template: str, catalogue: Catalogue) -> list[str]:
    """The texts of all items, by a template with fields such as {title}.

    Raises UserError for a template without a field, or with one that items do not have.
    """
    parts, columns = parse(template, "embedding.text"), catalogue.columns
    check_fields_of(parts, tuple(columns), "embedding.text")
    if not any(field for _, field in parts):
        raise UserError(f"embedding.text has {template!r}: expected a field, such as {{title}}")
    rows = zip(*columns.values(), strict=True)
    return [template.format(**dict(zip(columns, row, strict=True))) for row in rows]


def tokenise(texts: Sequence[str], encoder: TextEncoder, longest: int) -> ItemTexts:
    """The tokens of texts, cut to the `longest`, which a warning says.

    Raises UserError for a text without tokens.
    """
    tokens, control = list(map(encoder.first, texts)), {*encoder.control.values()}
    length_I = np.array(list(map(len, tokens)))
    begin_I = np.array([bool(ids) and ids[0] in control for ids in tokens], np.int32)
    if (length_I <= begin_I).any():
        item = int(np.argmax(length_I <= begin_I))
        why = f": the tokenizer makes no tokens of its text {texts[item]!r}"
        raise ItemError("item ", item, why)
    if cut := np.count_nonzero(length_I > longest):
        logging.warning(
            "The texts of %d items are cut at %d tokens (embedding.max_tokens): the longest has %d",
            *(cut, longest, length_I.max()),
        )
    values = np.concatenate([np.array(ids[:longest], np.int32) for ids in tokens])
    return ItemTexts(Ragged.from_lengths(values, np.minimum(length_I, longest)), begin_I)


def _inputs(experiment: Experiment, run: str) -> dict[str, Any]:
    config = experiment.config
    inputs = llm_inputs(config, experiment.source.identity) | {
        "tokenizer": experiment.source.tokenizer_identity,
        "catalogue": experiment.data.catalogue.content_hash(),
        "prompt.bos": config.prompt.bos,
        "prompt.bos_token": config.prompt.bos_token or None,
        "embedding": {name: config.embedding[name] for name in ("text", "pooling", "max_tokens")},
    }
    if run:
        made_from = experiment.check_run(run).made_from.fingerprint
        inputs |= {"run.made_from": made_from, "run.step": experiment.run_step(run)}
    return inputs


def _fill(
    parts: "_Parts",
    missing: Sequence[int],
    embed: Callable[[np.ndarray], Iterator[np.ndarray]],
    catalogue: Catalogue,
) -> None:
    """Embeds and writes the parts that are missing."""
    total = catalogue.num_items
    done = total - sum(parts.rows[number].size for number in missing)
    with Progress("Embedding", total, "items", done) as progress:
        for number in missing:
            found = []
            for vectors_BxD in embed(parts.rows[number]):
                found.append(vectors_BxD)
                progress.advance(len(vectors_BxD))
            vectors_RxD = np.concatenate(found)
            broken_R = ~np.isfinite(vectors_RxD).all(axis=1)
            if broken_R.any():
                item = catalogue.item_ids[parts.rows[number][np.argmax(broken_R)]]
                raise FloatingPointError(
                    f"item {item!r}: the LLM's hidden states are not finite: its weights hold NaN "
                    "or infinities, or are too large for llm.dtype, or the text has a token that "
                    "is not in its vocabulary"
                )
            parts.write(number, vectors_RxD)


class _Parts:
    """The folder of the embeddings: files of some items each, then one of all."""

    def __init__(self, folder: Path, order_I: np.ndarray):
        """`order_I` are the items as they are embedded."""
        self._folder, self._order_I = folder, order_I
        starts = range(_PART_ROWS, len(order_I), _PART_ROWS)
        self.rows = np.split(order_I, starts)  # of each part

    def begin(self, made_from: Provenance) -> list[int]:
        """The parts that are missing; collective. Those of other inputs are deleted.

        Raises UserError for embeddings that do not say what they were made from.
        """
        file = self._folder / VECTORS

        def missing() -> bytes:
            if (self._folder / FILE).is_file():
                stale = bool(Provenance.load(self._folder).differences(made_from.inputs))
            elif stale := file.exists():
                raise UserError(f"{file} was not written by {EMBED_ITEMS}: move it elsewhere")
            if stale:
                remove(file)
                remove(self._path(0).parent)
            if file.exists():
                return bytes(len(self.rows))
            made_from.save(self._folder)
            return bytes(not self._path(number).is_file() for number in range(len(self.rows)))

        return np.flatnonzero(bytearray(broadcast_from_main(missing, len(self.rows)))).tolist()

    def write(self, number: int, vectors_RxD: np.ndarray) -> None:
        """Writes a part, in the main process."""
        if is_main_process():
            with atomic_path(self._path(number)) as temporary, temporary.open("wb") as file:
                np.save(file, vectors_RxD)

    def join(self) -> None:
        """Makes one file of all parts, unless there is one; collective."""
        if is_main_process() and not (self._folder / VECTORS).exists():
            parts = [np.load(self._path(number)) for number in range(len(self.rows))]
            vectors_IxD = np.concatenate(parts)
            vectors_IxD[self._order_I] = vectors_IxD.copy()
            with atomic_path(self._folder / VECTORS) as temporary, temporary.open("wb") as file:
                np.save(file, vectors_IxD)
        if is_main_process():
            remove(self._path(0).parent)
        barrier("item embeddings")

    def _path(self, number: int) -> Path:
        return self._folder / PARTS / f"{number:06d}.npy"
