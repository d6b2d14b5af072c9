"""Runs of a tiny LLM: every weight trained, stopped, gone on; adapters on quantised weights."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import ModelCard
from tiny_workdir import ITEMS, make_config, make_workdir, stopped_and_gone_on

from tca4rec_jax.cf.logits_export import export_npy, export_stores
from tca4rec_jax.cf.logits_import import import_logits
from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.data.dataset import load
from tca4rec_jax.data.item_tokens import ItemTokens
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.evaluate import evaluate_run
from tca4rec_jax.evaluation.model_card import evaluated, model_card
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.llm.checkpoints.export import export_decoder
from tca4rec_jax.llm.checkpoints.loading import load_weights
from tca4rec_jax.recommenders import RECOMMENDERS
from tca4rec_jax.train import train


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    make_workdir(path)
    return path


def losses(run):
    return [line["loss"] for line in read_json_lines(run.directory / "log.jsonl")]


def test_an_adaptive_tau_goes_on_where_it_was(workdir, monkeypatch):
    """With an alpha that rises, batches by tokens, in micro-batches."""
    configs = [make_config(workdir, name) for name in ("adaptive", "adaptive_stopped")]
    for config in configs:
        config.objective.update(alpha=0.0, alpha_last=0.5)
        config.objective.update(softmax="children", temperature="adaptive", scale_by_tau=True)
        config.objective.update(mean_over="decisions", tau=1.5, tau_weight=0.5, eta=0.9)
        config.objective.tau_bounds = (0.01, 5.0)
        config.training.update(tokens_per_batch=260, micro_batches=2)
    expected = train(whole := Experiment(configs[0], workdir))
    run, state = stopped_and_gone_on(configs[1], workdir, monkeypatch)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    logs = [read_json_lines(one.directory / "log.jsonl") for one in (whole, run)]
    taus, again = ([line["tau"] for line in log] for log in logs)
    assert taus == again
    assert taus[0] == 1.5
    assert len({*taus}) == len(taus)  # it moves in every step


@pytest.mark.slow
def test_full_fine_tuning_goes_on_is_evaluated_and_exported(workdir, monkeypatch, tmp_path):
    configs = [make_config(workdir, name, train="full") for name in ("whole", "stopped")]
    for config in configs:
        config.optimizer.moments = "factored"
    whole = Experiment(configs[0], workdir)
    expected = train(whole)

    run, state = stopped_and_gone_on(config, workdir, monkeypatch)
    assert losses(run) == losses(whole)
    jax.tree.map(np.testing.assert_array_equal, state, expected)

    evaluate_run(config, workdir)
    results = json.loads((workdir / "results.json").read_text())["models"]
    untrained, trained = (
        results[name]["nll per title"]["temperature 1"]["mean"] for name in ("untrained", "trained")
    )
    assert trained < untrained
    made_from = run.check_run("stopped").made_from
    found = evaluated(workdir, "stopped", made_from, run.run_step("stopped"))
    about = {"base_model": None, "items": ITEMS, "load": "", "catalogue": True}
    card = ModelCard(model_card("merged", "stopped", made_from, found, **about))
    assert str(workdir) not in card.content
    by_item = found.results["models"]["trained"]["by item"]
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == {
        name: pytest.approx(value["mean"], abs=1e-4) for name, value in by_item.items()
    }
    assert evaluated(workdir, "stopped", made_from, 1) is None

    export_decoder(
        tmp_path / "merged",
        run.trained_decoder(config.run),
        run.tokenizer,
        kind="merged",
        dtype="float32",
        base_model="",
    )
    architecture, params = load_weights(tmp_path / "merged")
    assert architecture == run.decoder.config
    trained = nnx.to_flat_state(state.params)
    assert len(trained) == len(params)
    for path, value in trained:
        np.testing.assert_array_equal(params["/".join(path)], value[...])


def test_adapters_on_quantised_weights_are_trained_and_recommend(workdir):
    """On two devices that hold half of every matrix's codes each."""
    config = make_config(workdir, "nf4", quantise="nf4")
    config.mesh.fsdp = 2
    run = Experiment(config, workdir)
    before, _ = run.decoder.arrays()
    state = train(run)
    assert any(
        np.any(value[...]) for path, value in nnx.to_flat_state(state.params) if path[-1] == "b"
    )
    decoder = run.inference_decoder("nf4")
    after, adapters = decoder.arrays()
    assert adapters
    assert after["layers/q_proj"].dtype == np.uint8
    jax.tree.map(np.testing.assert_array_equal, after, before)
    found = Recommender.load(workdir, "nf4").recommend([["0", "3"], ["5"]], k=2)
    assert [len(items) for items in found] == [2, 2]
    config.lora.alpha *= 2
    with pytest.raises(ValueError, match=r"llm/nf4: .* lora.alpha was 16.0, is 32.0"):
        Experiment(config, workdir).trained_decoder("nf4")
    (workdir / "llm" / "blocked").write_text("")
    with pytest.raises(ValueError, match=r"llm/blocked cannot be written to, "):
        train(Experiment(make_config(workdir, "blocked"), workdir))
    with pytest.raises(ValueError, match="llm.quantise is 'nf4', but quantised weights cannot"):
        Experiment(make_config(workdir, "x", quantise="nf4", train="full"), workdir).initial_state()


def write_codes(catalogue, tokenizer, config):
    """Items as codes of two tokens and an end; no title is read."""
    code = tokenizer.convert_tokens_to_ids
    values = [[code("abc"[i // 4]), code("defg"[i % 4]), code("z")] for i in range(ITEMS)]
    nothing = Ragged.from_lengths(np.zeros(0, np.int32), np.array([0]))
    codes = Ragged.from_lengths(np.ravel(values).astype(np.int32), np.full(ITEMS, 3))
    before = Ragged.from_lengths(np.array([code("q")], np.int32), np.array([1]))
    return ItemTokens(codes, codes, before, nothing, nothing.values)


def test_another_recommender_is_a_choice_of_its_own_and_a_name(workdir, monkeypatch):
    codes = dataclasses.replace(RECOMMENDERS["generative"], write_items=write_codes)
    config = make_config(workdir, "codes")
    config.recommender.name = "codes"
    with pytest.raises(UserError, match="recommender.name is 'codes': expected one of 'gen"):
        train(Experiment(config, workdir))
    monkeypatch.setitem(RECOMMENDERS, "codes", codes)
    experiment = Experiment(config, workdir)
    train(experiment)
    assert experiment.trie.num_leaves == ITEMS
    assert len(losses(experiment)) == 5
    found = Recommender.load(workdir, "codes").recommend(["0", "3"], k=ITEMS)
    assert len({one.item_id for one in found}) == ITEMS
    config.recommender.name = "generative"
    with pytest.raises(UserError, match="recommender.name was 'codes', is 'generative'"):
        train(Experiment(config, workdir))


def test_imported_logits_train_to_the_same_parameters(workdir, tmp_path):
    """SASRec's logits as it stores them, multiplied out, and by way of a .npy file."""
    data, split, own = load(workdir / "data"), "train_sequences", str(tmp_path / "own")
    sasrec = make_config(workdir, "own").cf
    sasrec.update(model="sasrec", max_epochs=2, logits=own)
    sasrec.sasrec.units = 8
    run_cf(sasrec, data, tmp_path, history_length=4)
    whole = {"weights": [1.0], "temperatures": [1.0], "dtype": "float32", "top_k": 0}
    export_stores(str(tmp_path / "dense"), [own], data, [split], dense=True, **whole)
    export_npy(tmp_path, [own], data, [split])
    place = tmp_path / "imported" / split
    import_logits(tmp_path / f"{split}.npy", place, data.splits[split], data.catalogue, name="mine")

    def trained(name, logits):
        config = make_config(workdir, name)
        if name == "own":  # the others are not by launch/train_cf.py
            config.cf = sasrec
        config.cf.logits, config.objective.alpha = logits, 0.9
        state = train(Experiment(config, workdir))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]

    dense, imported, factorised = (
        trained(name, str(tmp_path / name)) for name in ("dense", "imported", "own")
    )
    for a, b, c in zip(dense, imported, factorised, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-4)
    other = trained("popularity", "")
    assert not all(np.allclose(a, b, atol=1e-3) for a, b in zip(dense, other, strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training.buckets": (8,)}, "the largest of training.buckets is 8"),
        ({"cf.logits": "absent"}, "there are no CF logits"),
        ({"training.batch_size": 3, "mesh.data": 2}, "training.batch_size is 3"),
        ({"training.micro_batches": 3}, "training.batch_size is 4, .* training.micro_batches=3"),
        ({"training.tokens_per_batch": 127}, "training.tokens_per_batch is 127: .* at least 128"),
        ({"training.keep_checkpoints": 0}, "training.keep_checkpoints is 0: expected at least 1"),
        ({"seed": -1}, "seed is -1: expected 0 to"),
        ({"optimizer.clip": -1.0}, "optimizer.clip is -1.0: expected at least 0"),
        (
            {"prompt.max_tokens": 65, "training.buckets": (128,)},
            "prompt.max_tokens is 65: expected at most 64",
        ),
        ({"optimizer.moments": "factored"}, "optimizer.moments is 'factored', but the matrices"),
        ({"lora.first_layer": 2}, "lora.first_layer is 2: expected at most 1"),
        ({"lora.targets": "query"}, "lora.targets is 'query': expected to match"),
        ({"training.buckets": (8,), "lora.first_layer": 1}, "the largest of training.buckets"),
    ],
)
def test_what_needs_no_weights_is_refused_before_they_are_read(
    workdir, monkeypatch, fields, message
):
    monkeypatch.setattr("tca4rec_jax.llm.sources.load_weights", None)  # not to be called
    config = make_config(workdir, "refused")
    config.training.cache_hidden_states = True
    config.update_from_flattened_dict(fields)
    with pytest.raises((UserError, FileNotFoundError), match=message):
        train(Experiment(config, workdir))


def test_tokens_beyond_the_vocabulary_are_refused_before_weights_are_read(
    workdir, tmp_path, monkeypatch
):
    """Titles end with a 'z', token 27."""
    shutil.copytree(workdir / "model", tmp_path / "model")
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields | {"vocab_size": 10}))
    monkeypatch.setattr("tca4rec_jax.llm.sources.load_weights", None)  # not to be called
    config = make_config(workdir, "small", weights=str(tmp_path / "model"))
    config.evaluation.variants = (("untrained", "", 0.0),)
    beyond = r"item '0' has token 27, but the LLM's vocabulary is 10 tokens"
    for use in (
        lambda: train(Experiment(config, workdir)),
        lambda: evaluate_run(config, workdir, name="small"),
        lambda: Recommender(Experiment(config, workdir), "").recommend(["0"]),
    ):
        with pytest.raises(UserError, match=beyond):
            use()
