"""Constrained decoding: ours against transformers' generate, and what the trie costs.

    python launch/benchmarks/decoding.py --part=generate --data=FOLDER  # needs torch
    python launch/benchmarks/decoding.py --part=trie               # 10 thousand to 1 million items

generate: FOLDER is a data set in the published layout (item.csv, test*.csv ..). An LLM (SmolLM2, or
with --architecture random weights for the tokens of --weights) is exported and loaded by both
sides, which get the same prompts of the same users, taken from the test rows with a seed.
transformers runs `generate` with `prefix_allowed_tokens_fn` on a dictionary trie,
several users in a batch; ours runs `BatchedSearch`: 'after_softmax' with the rules of 'huggingface'
must return the same items (identical but for scores within 1e-4 of each other) with the same
scores; 'before_softmax' (with the rules of 'exact') scores otherwise. 'after_softmax' with the
rules of 'exact' searches otherwise, several times longer, and runs if it is named:
--only='"ours, after_softmax, exact rules"'. On a GPU both compute there (--dtype=bfloat16 compares
speeds alone). Each has a process of its own and they take turns, a batch of ours at a time, so that
a machine that is faster at one time than at another is so for all of them; loading and compiling (a
first pass) are not timed. Ours has the environment of launch/quickstart.sh (huge pages).

trie: the same search (before_softmax, guidance off) with SmolLM2, and with a language model that
costs nothing, on titles that branch as MovieLens's do and on random semantic ids; the second is the
trie's part: children gathered, masked and scored, beams chosen. Milliseconds are per step (a call
of the LLM), for all users of the batch on one device.
"""

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from absl import app, flags
from catalogues import movielens_titles, sample_titles, semantic_ids
from measuring import QUICKSTART_MALLOC, Contestant, share_the_gpu
from train_step_inputs import random_weights

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.downloads import fetch_file
from tca4rec_jax.data.item_tokens import tokenise_items
from tca4rec_jax.data.prompts import prompts
from tca4rec_jax.data.published import read_published
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.launching import start
from tca4rec_jax.llm.kv_cache import BeamCache, KVCache, NewTokens, append_tokens, init_paths, pack
from tca4rec_jax.llm.tokenizer import load_tokenizer, text_encoder
from tca4rec_jax.reporting import show_table, write_results

_PART = flags.DEFINE_enum("part", "generate", ["generate", "trie"], "What is measured.")
_DATA = flags.DEFINE_string("data", None, "A folder in the published layout.")
_USERS = flags.DEFINE_integer("users", 64, "Test rows, sampled.")
_BEAMS = flags.DEFINE_integer("beams", 10, "Beams, and length of the lists.")
_BATCH = flags.DEFINE_integer("batch", 16, "Users in one of our batches.")
_THEIR_BATCH = flags.DEFINE_integer("their_batch", 4, "Users in one of transformers' batches.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the LLM.")
_PREFIX = flags.DEFINE_string("prefix", "Products one person bought, in order:\n", "Of a prompt.")
_WEIGHTS = flags.DEFINE_string("weights", "smollm2-135m-instruct", "A folder, file or name.")
_ARCHITECTURE = flags.DEFINE_string("architecture", "", "Random weights of this architecture.")
_ONLY = flags.DEFINE_list("only", [], "Contestants, quoted; default: all but exact rules.")
_ITEMS = flags.DEFINE_list("items", "10000,100000,1000000", "Sizes of the catalogues.")
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file for the numbers.")
_CASE = flags.DEFINE_string("case", None, "Internal: what this process measures, as JSON.")

THEIRS = "transformers"
OURS = {  # (mask, rules)
    "ours, after_softmax": ("after_softmax", "huggingface"),
    "ours, before_softmax": ("before_softmax", "exact"),
    "ours, after_softmax, exact rules": ("after_softmax", "exact"),
}
CONTESTANTS = (THEIRS, "ours, after_softmax", "ours, before_softmax")
TOLERANCE = 1e-4


def write_inputs(folder: Path) -> None:
    """Exports the LLM; tokenises titles and prompts."""
    import jax.numpy as jnp

    from tca4rec_jax.llm.checkpoints.export import write_hugging_face
    from tca4rec_jax.llm.checkpoints.loading import load_weights

    path = Path(_WEIGHTS.value)
    path = path if path.exists() else fetch_file(_WEIGHTS.value)
    tokenizer = load_tokenizer(path)
    if _ARCHITECTURE.value:
        architecture, params = random_weights(_ARCHITECTURE.value)
    else:
        architecture, params = load_weights(path, jnp.float32)
    write_hugging_face(folder / "llm", architecture, params, tokenizer, dtype="float32")
    data = read_published(_DATA.value, max_title_length=100)
    encoder = text_encoder(tokenizer, "known")
    template = PromptTemplate((_PREFIX.value + "{history}\n{target}",))
    items = tokenise_items(data.catalogue.columns, encoder, template)
    rows = np.random.default_rng(0).choice(len(data.splits["test"]), _USERS.value, replace=False)
    history_RxH, _ = data.splits["test"].take(np.sort(rows)).histories_and_targets(10)
    prompt = prompts(items, history_RxH, architecture.max_positions).tokens
    tokens = prompt.lengths
    print(f"{len(rows)} users, prompts of {tokens.mean():.0f} tokens ({tokens.max()} at most)")
    for name, ragged in (("titles", items.written), ("prompts", prompt)):
        np.savez(folder / f"{name}.npz", values=ragged.values, offsets=ragged.offsets)


def read_ragged(path: Path) -> Ragged:
    """What `write_inputs` wrote."""
    with np.load(path) as file:
        return Ragged(file["values"], file["offsets"])


def users_of_round(prompt: Ragged, number: int) -> np.ndarray:
    """The users of a round, of similar prompt lengths: one of our batches."""
    order = np.argsort(-prompt.lengths, kind="stable")
    return order[number * _BATCH.value :][: _BATCH.value]


def ours(folder: Path, case: str):
    """users -> (leaves, scores), compiled."""
    import jax

    from tca4rec_jax.batching import bucket_lengths
    from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
    from tca4rec_jax.decoding.engine import BatchedSearch, SearchRows
    from tca4rec_jax.distributed.sharding import make_mesh
    from tca4rec_jax.llm.checkpoints.loading import load_weights
    from tca4rec_jax.llm.decoder import Decoder

    start(cublas=True)  # as launch/recommend.py
    jax.config.update("jax_default_matmul_precision", "float32")  # as PyTorch has it on a GPU
    mask, rules = OURS[case]
    titles, prompt = read_ragged(folder / "titles.npz"), read_ragged(folder / "prompts.npz")
    decoder = Decoder(*load_weights(folder / "llm", jax.numpy.dtype(_DTYPE.value)))
    search = BatchedSearch(
        ItemTrie.build(titles),
        SearchConfig(_BEAMS.value, mask, rules),
        mesh=make_mesh(),
        batch_size=_BATCH.value,
        buckets=bucket_lengths(prompt.lengths, 3).tolist(),
    )
    weights = ScoreWeights(length_penalty=float(mask == "after_softmax"))

    def recommend(rows):
        found = search.recommend(decoder, SearchRows(prompt.take(rows)), weights, progress=None)
        return found.leaves_RxM, found.scores_RxM

    for number in range(rounds(prompt)):
        recommend(users_of_round(prompt, number))
    return recommend


def rounds(prompt: Ragged) -> int:
    return -(-len(prompt) // _BATCH.value)


def theirs(folder: Path):
    """users -> (leaves, scores)."""
    from decoding_pytorch import Generate

    titles, prompt = read_ragged(folder / "titles.npz"), read_ragged(folder / "prompts.npz")
    generate = Generate(folder / "llm", titles, dtype=_DTYPE.value, beams=_BEAMS.value)

    def recommend(rows):
        size = _THEIR_BATCH.value
        found = [generate(prompt.take(rows[i : i + size])) for i in range(0, len(rows), size)]
        return tuple(map(np.concatenate, zip(*found, strict=True)))

    generate(prompt.take(users_of_round(prompt, 0)[:1]))  # warms up
    return recommend


def take_turns(folder: Path, case: str) -> None:
    """Runs in a contestant's process: a round of users for every line, answered with JSON."""
    recommend = theirs(folder) if case == THEIRS else ours(folder, case)
    prompt = read_ragged(folder / "prompts.npz")
    print("ready", flush=True)
    for line in sys.stdin:
        rows = users_of_round(prompt, int(line))
        began = time.perf_counter()
        leaves_RxM, scores_RxM = recommend(rows)
        seconds = time.perf_counter() - began
        answer = {
            "users": len(rows),
            "seconds": seconds,
            "leaves": leaves_RxM.tolist(),
            "scores": scores_RxM.tolist(),
        }
        print(json.dumps(answer), flush=True)


def differing_users(ours, theirs) -> int:
    """Users whose lists differ by more than ties, or whose scores differ by more than TOLERANCE."""
    differing = 0
    for a, b, a_score, b_score in zip(
        ours["leaves"], theirs["leaves"], ours["scores"], theirs["scores"], strict=True
    ):
        same_scores = np.allclose(a_score, b_score, rtol=0, atol=TOLERANCE)
        score_of = dict(zip(b.tolist(), b_score.tolist(), strict=True))
        # A title that only one side has must tie with the last of the list.
        same_items = all(
            abs(score_of.get(leaf, b_score[-1]) - score) <= TOLERANCE
            for leaf, score in zip(a.tolist(), a_score.tolist(), strict=True)
        )
        differing += not (same_scores and same_items and len(set(a.tolist())) == len(a))
    return differing


def compare_generate() -> dict:
    if not _DATA.value:
        raise app.UsageError("--part=generate needs --data, a folder in the published layout")
    share_the_gpu()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name))
        prompt = read_ragged(Path(name) / "prompts.npz")
        same = [f"--{flag.name}={flag.value}" for flag in (_BEAMS, _BATCH, _THEIR_BATCH, _DTYPE)]
        contestants = {
            case: Contestant(
                __file__,
                {"folder": name, "case": case},
                same,
                environment={} if case == THEIRS else QUICKSTART_MALLOC,
            )
            for case in _ONLY.value or CONTESTANTS
        }
        for number in range(rounds(prompt)):
            for case, one in contestants.items():
                if one.failure is None and one.step(number):
                    took = one.steps[-1]["seconds"] / one.steps[-1]["users"]
                    print(f"{case}, round {number}: {took:.3f} s per user")
        for one in contestants.values():
            one.end()

    def of_rounds(case: str, field: str) -> list:
        return [step[field] for step in contestants[case].steps]

    for case, one in contestants.items():
        if one.failure:
            print(f"{case} is left out: {one.failure}")
            continue
        seconds = np.array(of_rounds(case, "seconds"))
        results[case] = {"s per user": float(seconds.sum() / sum(of_rounds(case, "users")))}
        if THEIRS in contestants and contestants[THEIRS].failure is None:
            theirs_took = np.array(of_rounds(THEIRS, "seconds"))
            results[case]["times transformers"] = float(np.median(theirs_took / seconds))
            results[case]["of all rounds"] = float(theirs_took.sum() / seconds.sum())
    if {THEIRS, "ours, after_softmax"} <= set(results):
        found, expected = (
            {field: np.concatenate(of_rounds(case, field)) for field in ("leaves", "scores")}
            for case in ("ours, after_softmax", THEIRS)
        )
        gap = np.abs(found["scores"] - expected["scores"]).max()
        results["ours, after_softmax"] |= {
            "users": len(found["leaves"]),
            "users that differ": differing_users(found, expected),
            "largest difference of scores": f"{gap:.1e}",
        }
    return results


class FreeModel:
    """A language model that costs nothing: its hidden state is a row of a small table."""

    def __init__(self, vocabulary: int):
        import jax

        self.table_VxD = jax.random.normal(jax.random.key(0), (vocabulary, 8))
        self.head_DxV = jax.random.normal(jax.random.key(1), (8, vocabulary))

    def extend(self, tokens, count_BxM, prompt, prompt_lengths, beams, kept_Tp, per_user):
        import jax.numpy as jnp

        _, paths = append_tokens(beams.paths, count_BxM, tokens.shape[2])
        nothing = jnp.zeros((1, len(tokens), 0, 1, 1))
        new = NewTokens(KVCache(nothing, nothing), jnp.zeros((len(tokens), 0), int), paths)
        return self.table_VxD[pack(tokens, kept_Tp)], new

    def head(self, tokens_U=None):
        head = self.head_DxV if tokens_U is None else self.head_DxV[:, tokens_U]
        return lambda hidden_D: hidden_D @ head

    def init_beam_cache(self, batch: int, beams: int, capacity: int):
        import jax.numpy as jnp

        nothing = jnp.zeros((batch, 1, 1, capacity, 1))
        return BeamCache(KVCache(nothing, nothing), init_paths(batch, beams, capacity))


def measure_trie() -> dict:
    """Times of a step with SmolLM2 and with the model that costs nothing, by catalogue."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from tca4rec_jax.decoding.advance_beams import Prompts
    from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig, beam_search
    from tca4rec_jax.decoding.search_programs import prefill_prompts
    from tca4rec_jax.llm.checkpoints.loading import load_weights
    from tca4rec_jax.llm.decoder import Decoder

    start()
    config, weights = SearchConfig(_BEAMS.value), ScoreWeights()
    decoder = Decoder(*load_weights(fetch_file(_WEIGHTS.value), jnp.float32))
    vocabulary = decoder.config.vocab_size
    graph, state = nnx.split(decoder)
    users = max(1, _BATCH.value // jax.device_count())  # one device's share
    tokens_BxS = np.random.default_rng(0).integers(0, vocabulary, (users, 128), np.int32)
    lengths_B = jnp.full(users, 128)
    _, prompts_read = jax.jit(
        lambda s: prefill_prompts(nnx.merge(graph, s), tokens_BxS, lengths_B)
    )(state)
    real, results = movielens_titles(), {}
    catalogues = [("titles", n, partial(sample_titles, real, n, seed=0)) for n in sizes()]
    for levels, codes in ((4, 256), (8, 2048)):
        name = f"{levels} levels of {codes}"
        catalogues += [(name, n, partial(semantic_ids, n, levels, codes, seed=0)) for n in sizes()]
    for name, count, make in catalogues:
        trie = config.device_trie(ItemTrie.build(make()))
        free_hidden = jax.random.normal(jax.random.key(2), (users, 1, 8))

        @jax.jit
        def with_llm(state, prompts, trie):
            return beam_search(nnx.merge(graph, state), prompts, trie, weights, config)

        @jax.jit
        def without(hidden, trie):
            prompts = Prompts(hidden, (), lengths_B)
            return beam_search(FreeModel(vocabulary), prompts, trie, weights, config)

        llm_ms = milliseconds_per_call(partial(with_llm, state, prompts_read, trie))
        trie_ms = milliseconds_per_call(partial(without, free_hidden, trie))
        row = {"items": count, "ms per step": llm_ms, "of the trie": trie_ms}
        results[f"{name}, {count:,} items"] = row | {"share": trie_ms / llm_ms}
        print(f"{name}, {count} items: {llm_ms:.1f} ms per step, {trie_ms:.2f} of the trie")
    return results


def sizes() -> list[int]:
    return [int(value) for value in _ITEMS.value]


def milliseconds_per_call(search, repeats: int = 5) -> float:
    calls, seconds = max(int(search().calls), 1), []
    for _ in range(repeats):
        began = time.perf_counter()
        search().calls.block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 1e3 * float(np.median(seconds)) / calls


def main(argv):
    del argv
    if _CASE.value:
        case = json.loads(_CASE.value)
        take_turns(Path(case["folder"]), case["case"])
        return
    results = compare_generate() if _PART.value == "generate" else measure_trie()
    if not results:
        sys.exit("nothing was measured")
    title = "Constrained decoding" if _PART.value == "generate" else "The trie in a step"
    show_table(results, title=title, digits=3)
    if _OUTPUT.value:
        write_results(Path(_OUTPUT.value), results)
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    app.run(main)
