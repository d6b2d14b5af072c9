"""Wide beams over short ids: milliseconds from prompts on the host to lists on the host.

    python launch/benchmarks/wide_beams.py --attention=xla,cudnn             # on a GPU
    python launch/benchmarks/wide_beams.py --architecture=smollm2-135m --layers=2 --cases=1x64x8

The LLM has random weights of an architecture, items are random semantic ids (catalogues.py), all
programs are compiled before the clock starts. A case is users x tokens of a prompt x beams. Prompts
and search are also timed alone; what is left of the whole is the host's. The last columns compare
the lists with those of the first --attention: the share of equal places, and the largest difference
of scores there.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from catalogues import semantic_ids
from measuring import share_the_gpu

from tca4rec_jax.core.collaborative_tokenizer import DENSE
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.engine import BatchedSearch
from tca4rec_jax.decoding.search_programs import (
    SearchProgram,
    TextBatch,
    Users,
    read_prompts,
    search_batch,
)
from tca4rec_jax.distributed.sharding import make_mesh, shard_batch
from tca4rec_jax.launching import start
from tca4rec_jax.llm.architectures import architecture
from tca4rec_jax.llm.config import DecoderOptions
from tca4rec_jax.llm.decoder import Decoder, init_params
from tca4rec_jax.reporting import show, show_table, write_results

_ARCHITECTURE = flags.DEFINE_string("architecture", "qwen3-1.7b", "Of the random weights.")
_LAYERS = flags.DEFINE_integer("layers", 0, "The first so many layers; 0: all.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Of the LLM.")
_ATTENTION = flags.DEFINE_list("attention", ["xla"], "llm.attention, one after the other.")
_CASES = flags.DEFINE_list("cases", ["1x1000x256", "8x5000x256"], "Users x tokens x beams.")
_ITEMS = flags.DEFINE_integer("items", 100_000, "Of the catalogue.")
_LEVELS = flags.DEFINE_integer("levels", 3, "Tokens of an id.")
_CODES = flags.DEFINE_integer("codes", 256, "Codes of a level.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed calls, of which the median counts.")
_TRACE = flags.DEFINE_string("trace", None, "A folder for profiles of one call each.")
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file for the numbers.")


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Of calls that end when their results are there."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return 1e3 * float(np.median(seconds))


def programs(decoder: Decoder, trie: ItemTrie, case: tuple[int, int, int]) -> tuple[Callable, ...]:
    """(() -> prompts read from the host, prompts -> (leaves, scores)) of a case."""
    users, tokens, beams = case
    search = BatchedSearch(
        trie, SearchConfig(beams), mesh=make_mesh(), batch_size=users, buckets=[tokens]
    )
    graph, state = search.put(decoder)
    program = SearchProgram(search.mesh, graph, search.config)
    no_temperatures, weights = np.zeros(0, np.float32), jax.tree.map(np.float32, ScoreWeights())
    drawn = np.random.default_rng(0).integers(0, decoder.config.vocab_size, (users, tokens))
    texts = TextBatch(drawn.astype(np.int32), np.full(users, tokens, np.int32))

    def read():
        here = shard_batch(search.mesh, texts, "prompts")
        args = state, here, None, search.trie, no_temperatures
        return read_prompts(*args, program=program, capacity=tokens)[0]

    def find(prompts):
        args = state, prompts, Users(), DENSE, search.trie, weights
        return search_batch(*args, program=program)

    return read, find


def measure(decoder: Decoder, trie: ItemTrie, case: tuple[int, int, int]) -> tuple[dict, tuple]:
    """The numbers of a case, and its (leaves, scores)."""
    read, find = programs(decoder, trie, case)
    began = time.perf_counter()
    prompts = jax.block_until_ready(read())
    found = jax.device_get(find(prompts))
    compiled = time.perf_counter() - began
    numbers = {
        "ms": median_ms(lambda: jax.device_get(find(read())), _REPEATS.value),
        "of prompts": median_ms(read, _REPEATS.value),
        "of search": median_ms(lambda: find(prompts), _REPEATS.value),
        "compiled in s": compiled,
    }
    if _TRACE.value:
        name = "x".join(map(str, case)) + f"-{decoder.options.attention}"
        with jax.profiler.trace(str(Path(_TRACE.value) / name)):
            jax.device_get(find(read()))
    return numbers, found


def agreement(found: tuple, first: tuple) -> dict[str, float]:
    """How lists compare with others of the same prompts."""
    same = found[0] == first[0]
    apart = np.abs(found[1] - first[1])[same].max(initial=0.0)
    return {"places": float(same.mean()), "scores apart": float(apart)}


def main(argv):
    del argv
    share_the_gpu()
    start(cublas=True)  # as launch/recommend.py
    config = architecture(_ARCHITECTURE.value)
    config = config.first_layers(_LAYERS.value or config.num_layers)
    params = init_params(config, jax.random.key(0), jax.numpy.dtype(_DTYPE.value))
    ids = semantic_ids(_ITEMS.value, _LEVELS.value, _CODES.value, seed=0)
    trie, rows = ItemTrie.build(ids), {}
    for name in _CASES.value:
        users, tokens, beams = map(int, name.split("x"))
        first = None
        for attention in _ATTENTION.value:
            decoder = Decoder(config, params, options=DecoderOptions(attention=attention))
            numbers, found = measure(decoder, trie, (users, tokens, beams))
            first = first or found
            rows[f"{name}, {attention}"] = numbers | agreement(found, first)
            show(f"{name}, {attention}: {rows[f'{name}, {attention}']}")
    kind = jax.devices()[0].device_kind
    show_table(rows, title=f"{_ARCHITECTURE.value}, {_DTYPE.value}, {kind}", digits=2)
    if _OUTPUT.value:
        write_results(Path(_OUTPUT.value), rows)


if __name__ == "__main__":
    app.run(main)
