"""Catalogues of any size for the benchmarks: titles that branch as real ones do, semantic ids."""

from pathlib import Path

import numpy as np
import pandas as pd

from tca4rec_jax.data.downloads import fetch, fetch_file
from tca4rec_jax.data.item_tokens import tokenise_items
from tca4rec_jax.data.movielens import read_movielens
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.llm.tokenizer import load_tokenizer, text_encoder


def movielens_titles() -> Ragged:
    """The MovieLens-100K titles as SmolLM2 tokens, the end token included (int32)."""
    catalogue, _ = read_movielens(fetch("movielens-100k"), max_title_length=100)
    encoder = text_encoder(load_tokenizer(fetch_file("smollm2-135m-instruct")), "never")
    return tokenise_items(catalogue.columns, encoder, PromptTemplate()).written


def sample_titles(real: Ragged, count: int, seed: int) -> Ragged:
    """`count` titles of a Markov chain over the real titles' tokens (each ends with their end)."""
    end, last = int(real.values[-1]), real.offsets[1:] - 1
    follows = np.ones(real.values.size, bool)
    follows[last] = False
    before = np.where(follows)[0]
    order = before[np.argsort(real.values[before], kind="stable")]
    successors = real.values[order + 1]
    token, start, number = np.unique(real.values[order], return_index=True, return_counts=True)
    rng = np.random.default_rng(seed)
    columns = [rng.choice(real.values[real.offsets[:-1]], count)]
    longest = int(real.lengths.max())
    while (columns[-1] != end).any() and len(columns) < longest - 1:
        place = np.searchsorted(token, np.where(columns[-1] == end, token[0], columns[-1]))
        drawn = successors[start[place] + (rng.random(count) * number[place]).astype(np.int64)]
        columns.append(np.where(columns[-1] == end, end, drawn))
    columns.append(np.full(count, end, np.int32))
    tokens = np.stack(columns, axis=1).astype(np.int32)
    lengths = (tokens == end).argmax(axis=1) + 1
    return Ragged.from_lengths(tokens[np.arange(tokens.shape[1]) < lengths[:, None]], lengths)


def semantic_ids(count: int, levels: int, codes: int, seed: int) -> Ragged:
    """`count` distinct random ids of `levels` tokens; level l has the tokens l * codes and up."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((0, levels), np.int32)
    while len(ids) < count:
        more = rng.integers(0, codes, (count, levels), dtype=np.int32)
        ids = np.unique(np.concatenate([ids, more]), axis=0)
    ids = rng.permutation(ids)[:count] + codes * np.arange(levels, dtype=np.int32)
    return Ragged.from_lengths(ids.ravel(), np.full(count, levels))


def write_tables(folder: Path, items: int, users: int, seed: int = 0) -> None:
    """interactions.csv and items.csv, as `data.source=files` reads them, of made users.

    A user has 20 items of one group of 100, the first of a group more often; titles are those of
    `sample_titles`.
    """
    titles, rng = sample_titles(movielens_titles(), items, seed), np.random.default_rng(seed)
    tokenizer = load_tokenizer(fetch_file("smollm2-135m-instruct"))
    rows = np.split(titles.values, titles.offsets[1:-1])
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    item_I = np.arange(items)
    titled = [text.strip() or str(item) for item, text in zip(item_I, texts, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"item": item_I, "title": titled}).to_csv(folder / "items.csv", index=False)
    group_Ux1 = rng.integers(0, -(-items // 100), (users, 1))
    place_UxN = (100 * rng.random((users, 20)) ** 2).astype(np.int64)
    item_UxN = np.minimum(100 * group_Ux1 + place_UxN, items - 1)
    time_UxN = rng.integers(0, 1 << 20, (users, 1)) + np.arange(20)
    columns = {"user": np.repeat(np.arange(users), 20), "item": item_UxN.ravel()}
    columns["timestamp"] = time_UxN.ravel()
    pd.DataFrame(columns).to_csv(folder / "interactions.csv", index=False)
