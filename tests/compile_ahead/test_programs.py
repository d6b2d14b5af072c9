"""The programs of a config, compiled for this machine's CPU; and for a TPU where libtpu is."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from forked import Script
from jax.sharding import PartitionSpec

from tca4rec_jax.compile_ahead import estimate, report
from tca4rec_jax.compile_ahead.catalogue import ID_TOKENS, IDS, CatalogueSizes
from tca4rec_jax.compile_ahead.estimate import compile_for
from tca4rec_jax.compile_ahead.hlo import arrays
from tca4rec_jax.compile_ahead.programs import PROGRAMS, AbstractExperiment, stored_dtype
from tca4rec_jax.compile_ahead.targets import COMPILERS, Target
from tca4rec_jax.config import build, published_config
from tca4rec_jax.core import losses
from tca4rec_jax.core.collaborative_tokenizer import project
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.decoding.beam_search import SearchConfig
from tca4rec_jax.distributed import sharded_projection
from tca4rec_jax.distributed.sharded_search import put_trie, search_shards
from tca4rec_jax.llm import architectures
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.from_scratch import FromScratch
from tca4rec_jax.llm.quantisation import quantise
from tca4rec_jax.llm.sources import RandomLLM
from tca4rec_jax.training import step

ROOT = Path(__file__).parents[2]


def experiment(config, target, items=10_000):
    return AbstractExperiment(config, target=Target.parse(target), num_items=items)


def test_a_catalogues_sizes_have_the_form_of_a_real_ones():
    trie = ItemTrie.build([[5, 7, 0], [5, 9, 3, 0], [8, 0]])
    sizes = CatalogueSizes(items=1000, vocabulary=512)
    ours, real = sizes.trie(), DeviceTrie.of(trie.compress())
    ours = dataclasses.replace(ours, sizes=real.sizes)
    assert jax.tree.structure(ours) == jax.tree.structure(real)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(real), strict=True):
        assert (a.dtype, a.ndim) == (b.dtype, b.ndim)


def test_a_catalogues_sizes_are_near_those_measured():
    """Office_Products and Toys_and_Games with SmolLM2's tokens: nodes, root children, choices."""
    for items, nodes, children, choices in ((9913, 13081, 1075, 2873), (20669, 26241, 1498, 4734)):
        sizes = CatalogueSizes(items, 49152)
        assert sum(sizes.levels) == pytest.approx(nodes, rel=0.06)
        assert sizes.levels[1] == pytest.approx(children, rel=0.03)
        assert sizes.choices == pytest.approx(choices, rel=0.03)
    assert CatalogueSizes(100_000_000, 128256).levels[1] <= 128256


def test_sizes_of_ids_are_near_those_measured():
    """Four levels of 256 for Beauty, and for 3,000 of its items."""
    for items, nodes, children, choices in ((12101, 14712, 197, 933), (3000, 3443, 166, 711)):
        sizes = CatalogueSizes(items, 2048, IDS)
        assert sum(sizes.levels) == pytest.approx(nodes, rel=0.07)
        assert sizes.levels[1] == pytest.approx(children, rel=0.03)
        assert sizes.choices == pytest.approx(choices, rel=0.03)


@pytest.mark.parametrize("weights", ["tiny", "random"])
def test_programs_of_ids_have_new_rows_or_a_vocabulary_of_their_own(tiny_config, weights):
    tiny_config.prompt.update(item="{id}", separator="", end="", templates=("{history}{target}",))
    tiny_config.llm.update(weights=weights, train="full" if weights == "random" else "lora")
    tiny_config.training.targets = "all"
    programs = experiment(tiny_config, "cpu-2", 100)
    rows = programs.initial_state()[1].params.get("new_rows")
    if weights == "random":
        assert rows is None
        settings = build(FromScratch, tiny_config.llm.random)
        tokens = tuple(f"<a_{code}>" for code in range(ID_TOKENS))
        assert programs.architecture == RandomLLM(settings, tokens, 0).architecture
    else:
        assert rows["tables"]["embedding"].shape == (ID_TOKENS, 32)
        assert programs.sizes.vocabulary == 512 + ID_TOKENS
    for program in ("train", "search"):
        assert compile_for(PROGRAMS[program](programs), program, programs.target).fits


def test_a_projector_of_the_users_vectors_has_their_width(tiny_config, tmp_path):
    tiny_config.prompt.update(item="{title}{vector}", end="", templates=("{history}{target}",))
    np.save(tmp_path / "own.npy", np.ones((3, 5), np.float32))
    tiny_config.projector.update(vectors=str(tmp_path / "own.npy"), width=7)
    programs = experiment(tiny_config, "cpu-1", 100)
    assert programs.soft_tokens(1) == (1, 5)
    leaves = jax.tree.leaves(programs.initial_state()[1].params["projector"])
    assert (5, 7) in [leaf.shape for leaf in leaves]


def test_the_memory_and_the_products_of_a_step_are_those_of_its_arrays(tiny_config):
    tiny_config.llm.remat = "none"
    programs = experiment(tiny_config, "cpu-2", 100)
    found = compile_for(PROGRAMS["train"](programs), "train", programs.target)
    weights = 4 * sum(map(math.prod, programs.architecture.parameter_shapes.values()))
    assert programs.weight_bytes == weights + 4 * programs.trained_parameters
    batch = 4 // 2 * 4 * (96 + 1 + 3 * 72 + 64 + 1 + 5 * 16)
    used = ["item_order", "ordered_leaf", "leaf", "parent", "child_start", "child_count", "token"]
    trie = [getattr(programs.sizes.trie(), name) for name in used]
    # Weights, adapters and their moments, a device's half of the batch, CF items, trie, scalars.
    expected = weights + 3 * 4 * programs.trained_parameters + batch
    expected += sum(leaf.size * leaf.dtype.itemsize for leaf in trie)
    expected += 4 * 64 * programs.sizes.items
    assert found.memory.arguments == pytest.approx(expected, abs=64)
    assert found.needed == sum(found.memory)
    assert found.fits
    useful = programs.useful_flops / 2
    # The adapters' products, the causal blocks' corners and the logits made again come on top.
    assert useful < found.work.flops < 2 * useful
    assert {one.kind for one in found.work.collectives} == {"all-reduce"}
    assert not found.work.host_transfers
    assert found.work.unknown_loops == 0


def bytes_of_a_device(tree):
    sizes = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes)


def test_moments_have_the_bytes_of_their_names(tiny_config):
    tiny_config.llm.update(architecture="llama-3.2-1b", train="full")
    tiny_config.mesh.fsdp = 2
    for moments, expected in (("float32", 8), ("bfloat16", 6), ("factored", 2)):
        tiny_config.optimizer.moments = moments
        state = experiment(tiny_config, "cpu-2").initial_state()[1]
        weights = bytes_of_a_device(state.params) / 4
        assert bytes_of_a_device(state.optimizer) == pytest.approx(weights * expected, rel=0.005)


def test_a_budget_is_planned_for_the_bucket_with_the_most_tokens(tiny_config):
    tiny_config.training.update(buckets=(64, 96), batch_size=4, tokens_per_batch=600)
    planned = experiment(tiny_config, "cpu", 100)
    assert planned.batch_shape[:2] == (8, 64)  # 512 tokens, and 4 x 96 are 384
    assert planned.longest == 96
    assert planned.useful_flops > 0


def test_micro_batches_take_less_memory(tiny_config):
    tiny_config.training.update(batch_size=4, tokens_per_batch=16 * 96)
    sizes = []
    for micro_batches in (1, 4):
        tiny_config.training.micro_batches = micro_batches
        programs = experiment(tiny_config, "cpu", 100)
        assert programs.batch_shape.rows == 16
        found = compile_for(PROGRAMS["train"](programs), "train", programs.target)
        sizes.append(found.memory.temporaries)
    assert sizes[1] < 0.5 * sizes[0]


def test_every_program_of_full_fine_tuning_on_a_split_mesh(tiny_config):
    tiny_config.mesh.fsdp = 2
    tiny_config.llm.train = "full"
    tiny_config.llm.dtype = "bfloat16"
    programs = experiment(tiny_config, "cpu-2", 100)
    found = [compile_for(PROGRAMS[name](programs), name, programs.target) for name in PROGRAMS]
    assert [one.program for one in found if one.fits] == list(PROGRAMS)
    train, prefill, search, guided = found
    # Half of the float32 weights and moments in training, of bfloat16 weights in the others.
    assert train.memory.arguments > 3 * prefill.memory.arguments
    assert "all-gather" in train.collectives
    assert search.work.unknown_loops > 0
    assert guided.memory.arguments > search.memory.arguments
    text = json.dumps(report.as_json(found, programs))
    assert json.loads(text)["fits"] is True
    assert [report.row(one)[""] for one in found] == ["fits"] * len(PROGRAMS)


def test_grounding_is_planned_with_the_titles_it_compares(tiny_config):
    tiny_config.decoding.find = "grounding"
    programs = experiment(tiny_config, "cpu-2", 100)
    titles = programs.sizes.trie().sizes.num_leaves
    (args, _), width = PROGRAMS["search"](programs).args_info, programs.architecture.hidden_size
    assert (titles, width) in {leaf.shape for leaf in jax.tree.leaves(args)}


@pytest.mark.parametrize("devices", [1, 2])
def test_yes_or_no_is_planned_as_a_choice_of_two_answers(tiny_config, devices):
    """Whatever the catalogue's size: the tries and CF logits are those of a run."""
    tiny_config.recommender.name = "answer"
    tiny_config.prompt.templates = ("{user}{history} {item}{vector}?{target}",)
    tiny_config.decoding.beams = 20
    tiny_config.mesh.tensor = devices
    programs = experiment(tiny_config, f"cpu-{devices}", 1_000_000)
    assert programs.batch_shape[2:] == (8, 1, 8)
    assert programs.soft_tokens(4) == (2, 64)
    found = [compile_for(PROGRAMS[name](programs), name, programs.target) for name in PROGRAMS]
    assert all(one.memory.arguments < 4e6 for one in found)
    assert "two answers" in report.heading(programs)[0]
    refused = dataclasses.replace(found[2], memory=None, work=None)
    assert "decoding.beams" not in report.advice(refused, programs)
    lowered = PROGRAMS["guided_search"](programs)
    shapes = [leaf.shape for leaf in jax.tree.leaves(lowered.args_info)]
    assert (4, 2) in shapes  # the calibrated logits of the answers
    assert max(map(max, filter(None, shapes))) < 1000
    assert jax.tree.leaves(lowered.out_info)[0].shape[:2] == (4, 2)

    trie, parts = ItemTrie.build([[0], [1]]), search_shards(programs.mesh)
    searched = build(SearchConfig, tiny_config.decoding)
    run = put_trie(programs.mesh, searched.device_trie(trie, parts))
    planned = programs.sizes.trie(score_edges=searched.vocabulary, parts=parts)
    assert planned.sizes == run.sizes
    assert [one.shape for one in jax.tree.leaves(planned)] == [
        one.shape for one in jax.tree.leaves(run)
    ]


def test_quantised_weights_are_planned_as_they_are_stored(tiny_config):
    floats = experiment(tiny_config, "cpu", 100)
    quantised = tiny_config.copy_and_resolve_references()
    quantised.llm.quantise = "int8"
    programs = experiment(quantised, "cpu", 100)
    matrices = sum(i * o for i, o in floats.architecture.projection_shapes.values())
    outputs = sum(o for _, o in floats.architecture.projection_shapes.values())
    layers = floats.architecture.num_layers
    assert floats.weight_bytes - programs.weight_bytes == layers * (3 * matrices - 4 * outputs)
    assert programs.parameters == floats.parameters
    kind, codes = "int8", jax.ShapeDtypeStruct((64, 32), np.float32)
    stored = jax.eval_shape(lambda weight: quantise(kind, weight), codes)
    for path, real in zip(("layers/q_proj", "layers/q_proj_scale"), stored, strict=True):
        assert stored_dtype(programs.architecture, path, np.dtype(np.float32)) == real.dtype
    PROGRAMS["train"](programs)  # the decoder takes them


def test_what_does_not_fit_says_what_to_change(tiny_config, monkeypatch):
    programs = experiment(tiny_config, "cpu", 100)
    monkeypatch.setattr(estimate, "_host_memory", lambda: 2e5)
    found = compile_for(PROGRAMS["prefill"](programs), "prefill", programs.target)
    assert not found.fits
    assert "inference.batch_size" in report.advice(found, programs)
    assert "mesh.tensor" in report.advice(found, programs)
    refused = dataclasses.replace(found, program="train", memory=None, work=None)
    assert "llm.remat=full" in report.advice(refused, programs)
    assert "optimizer.moments" not in report.advice(refused, programs)
    tiny_config.llm.train = "full"
    assert "optimizer.moments=factored" in report.advice(refused, programs)
    assert report.row(refused)["arguments GiB"] is None
    assert report.as_json([refused], programs)["fits"] is False


def test_bad_input_is_an_error(tiny_config):
    tiny_config.mesh.tensor = 3
    with pytest.raises(ValueError, match="mesh"):
        PROGRAMS["train"](experiment(tiny_config, "cpu-2"))
    tiny_config.mesh.tensor = 1
    tiny_config.training.batch_size = 3
    with pytest.raises(ValueError, match="training.batch_size"):
        PROGRAMS["train"](experiment(tiny_config, "cpu-2"))
    tiny_config.llm.architecture = "gpt-2"
    with pytest.raises(ValueError, match="llm.architecture"):
        PROGRAMS["train"](experiment(tiny_config, "cpu"))


def test_the_script_prints_a_verdict_and_writes_json(tmp_path):
    command = [
        f"{ROOT}/launch/compile_ahead.py", "--programs=train", "--compare=plain",
        f"--config={ROOT}/configs/quickstart.py:debug", f"--json={tmp_path / 'x.json'}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command, "--target=cpu"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cpu: fits" in done.stdout
    assert "against plain next-token prediction" in done.stdout
    (found,) = json.loads((tmp_path / "x.json").read_text())["targets"]
    assert found["programs"]["train"]["memory"]["arguments"] > 1e8
    done = Script([*command, "--target=v9-1"], {}).completed()
    assert done.returncode == 2
    assert "'v9-1'" in done.stderr


def logits_in_collectives(work, vocabulary, hidden, items, shards):
    """Collectives of arrays with a vocabulary axis that are no weights, or with an items axis."""
    found = []
    for one in work.collectives:
        for dimensions in (array.dimensions for array in arrays(one.type)):
            is_weight = {hidden, hidden // shards} & set(dimensions)
            if {vocabulary, vocabulary // shards} & set(dimensions) and not is_weight:
                found.append(one)
            if {items, items // shards} & set(dimensions):
                found.append(one)
    return found


def gather_vocabulary_logits(monkeypatch):
    loss_as_it_is = losses.vocabulary_loss

    def loss(head, *arguments):
        def gathered_head(hidden_NxD):
            return jax.lax.with_sharding_constraint(head(hidden_NxD), PartitionSpec())

        return loss_as_it_is(gathered_head, *arguments)

    monkeypatch.setattr(losses, "vocabulary_loss", loss)


def gather_cf_logits(monkeypatch):
    def gathered(cf_PxD, items, pair_K, node_K, *rest, axis_name):
        shard_PxI = cf_PxD @ items.table_IxD.T
        logits_PxI = jax.lax.all_gather(shard_PxI, axis_name, axis=1, tiled=True)
        log_p = project(cf_PxD, items, pair_K, node_K, *rest, axis_name=axis_name)
        return log_p + logits_PxI[pair_K, node_K][:, None]

    monkeypatch.setattr(sharded_projection, "project", gathered)


def call_the_host(monkeypatch):
    loss_as_it_is = losses.vocabulary_loss

    def loss(head, hidden_NxD, *arguments):
        jax.debug.callback(lambda total: None, hidden_NxD.sum())
        return loss_as_it_is(head, hidden_NxD, *arguments)

    monkeypatch.setattr(losses, "vocabulary_loss", loss)


CHANGES = {
    "vocabulary logits": gather_vocabulary_logits,
    "CF logits": gather_cf_logits,
    "host": call_the_host,
}


def what_must_not_be(estimate, programs) -> set[str]:
    """Of CHANGES, what a compiled training step does."""
    work = estimate.work
    sizes, shards = programs.architecture, programs.mesh.shape["tensor"]
    vocabulary, items = (
        logits_in_collectives(work, sizes.vocab_size, sizes.hidden_size, 0, shards),
        logits_in_collectives(work, 0, sizes.hidden_size, programs.sizes.items, shards),
    )
    found = {"vocabulary logits": vocabulary, "CF logits": items, "host": work.host_transfers}
    return {name for name, there in found.items() if there}


def test_gathered_logits_and_calls_of_the_host_are_found(tiny_config, monkeypatch):
    """In a step that is made to do so, and not in the one that is trained."""
    monkeypatch.setattr(step, "_train_step", step._train_step.__wrapped__)  # as it is changed
    tiny_config.mesh.tensor = 2
    programs = experiment(tiny_config, "cpu-2", 1000)
    found = compile_for(PROGRAMS["train"](programs), "train", programs.target)
    assert what_must_not_be(found, programs) == set()
    for change in CHANGES.values():
        change(monkeypatch)
    found = compile_for(PROGRAMS["train"](programs), "train", programs.target)
    assert what_must_not_be(found, programs) == set(CHANGES)


@pytest.mark.slow
@pytest.mark.skipif(
    not (COMPILERS / "tpu").is_dir(), reason="libtpu is missing; launch/compile_ahead.py names it"
)
def test_a_training_step_for_v5e_16_gathers_no_logits_and_stays_on_the_device(monkeypatch):
    """Small widths, two layers; weights over fsdp, vocabulary and items over tensor."""
    small = DecoderConfig(32768, 640, 1024, 2, 8, 4, 64, max_positions=128)
    monkeypatch.setitem(architectures.ARCHITECTURES, "small", small)
    config = published_config("small", "chips=16,mesh.fsdp=4", tensor={16: 4})
    config.training.buckets = (128,)
    programs = experiment(config, "v5e-16", 10_016)
    assert dict(programs.mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 4}
    found = compile_for(PROGRAMS["train"](programs), "train", programs.target)
    assert what_must_not_be(found, programs) == set()
    assert found.fits
    assert {"all-gather", "all-reduce"} <= set(found.collectives)
    assert found.work.unknown_loops == 0
    assert found.seconds["compiler"] > found.seconds["product"] > 0
    useful = programs.useful_flops / 16
    assert useful < found.work.flops < 2 * useful
    assert np.isclose(found.memory.arguments, programs.weight_bytes / 16, rtol=0.3)
