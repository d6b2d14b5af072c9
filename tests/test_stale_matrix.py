"""What an artefact was made from, changed: every reader notices before any work.

And what does not matter is in nobody's way. Each row changes one field of the config or one thing
in the work directory; the folder is a copy, so moving one is no change.
"""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from absl import logging
from tiny_workdir import ITEMS, make_config, make_workdir

from tca4rec_jax.cf.logits_format import LogitsStoreError
from tca4rec_jax.cf.logits_import import import_logits
from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.config import config_fields, config_value, score_weights
from tca4rec_jax.data.dataset import load, prepare
from tca4rec_jax.decoding.list_inputs import list_inputs
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import comparison, inputs_of
from tca4rec_jax.evaluation.evaluate import evaluate_run, sweep_guidance
from tca4rec_jax.evaluation.llm_rankings import ranking_inputs
from tca4rec_jax.evaluation.rankings import EvaluationRows
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.provenance import FILE, Provenance, StaleError
from tca4rec_jax.train import train
from tca4rec_jax.training.run_inputs import ADDED

RUN = "done"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A work directory with a trained run."""
    path = tmp_path_factory.mktemp("made")
    make_workdir(path)
    train(Experiment(make_config(path, RUN), path))
    return path


@pytest.fixture
def workdir(made, tmp_path, monkeypatch):
    """A copy of it, in which no reader may come as far as to load weights."""
    monkeypatch.setattr("tca4rec_jax.llm.sources.load_weights", None)
    return shutil.copytree(made, tmp_path / "copy")


READERS = {
    "train": train,
    "evaluate": lambda experiment: evaluate_run(experiment.config, experiment.workdir),
    "sweep": lambda experiment: sweep_guidance(experiment.config, experiment.workdir, RUN, [0]),
    "recommend": lambda experiment: Recommender(experiment, RUN),
    "export": lambda experiment: experiment.trained_decoder(RUN),
}
INFERENCE = {  # field: another value; every reader notices
    "llm.num_layers": 1,
    "llm.dtype": "bfloat16",
    "llm.quantise": "int8",
    "llm.train": "full",
    "lora.rank": 4,
    "lora.alpha": 3.0,
    "lora.targets": "q_proj",
    "lora.first_layer": 1,
    "prompt.templates": ("r{history}z{target}",),
    "prompt.item": "{title}",
    "prompt.separator": "y",
    "prompt.target": " {title}",
    "prompt.end": "y",
    "prompt.placeholder": "x",
    "prompt.bos": "never",
    "prompt.bos_token": "<|end|>",
    "prompt.bos_before_target": True,
    "prompt.tokenised": "whole",
    "prompt.chat": True,
    "prompt.max_tokens": 24,
    "data.history_length": 3,
}
TRAINING = {  # training notices; lists do not depend on it
    "llm.dropout": 0.1,
    "lora.dropout": 0.3,
    "lora.train": False,
    "objective.alpha": 0.2,
    "objective.beta": 2.0,
    "objective.tau": 2.0,
    "objective.form": "cross_entropy",
    "objective.softmax": "children",
    "objective.scale_by_tau": True,
    "objective.cf_dtype": "bfloat16",
    "training.unsupervised_end": 1,
    "objective.tau_bounds": (1.0, 2.0),
    "optimizer.learning_rate": 0.5,
    "optimizer.warmup_steps": 3,
    "optimizer.schedule": "cosine",
    "optimizer.weight_decay": 0.5,
    "optimizer.clip": 0.5,
    "optimizer.warmup_fraction": 0.5,
    "optimizer.decay_steps": 9,
    "optimizer.moments": "bfloat16",
    "optimizer.epsilon": 1e-6,
    "training.rows": 8,
    "training.targets": "last",
    "training.tasks": ("{title} {title}",),
    "training.batch_size": 8,
    "training.tokens_per_batch": 512,
    "training.rows_per_mean": 2,
    "training.buckets": (16, 32),
    "validation.every": 2,
    "validation.every_epochs": 0.5,
    "seed": 1,
}
DATA = {  # whoever reads the prepared data notices
    "data.history_length": 3,
    "data.attributes": ("brand",),
    "data.split_by": "leave_one_out",
    "data.min_history": 1,
    "data.split": (0.6, 0.2, 0.2),
    "data.seed": 1,
    "data.max_title_length": 1,
    "data.title_column": "name",
}
CF = {  # whoever reads CF logits notices
    "cf.model": "item_knn",
    "cf.dtype": "float16",
    "cf.top_k": 3,
    "cf.label_items": 3,
}
NO_MATTER = {  # nobody minds
    "mesh.fsdp": 2,
    "llm.attention": "splash",
    "llm.remat": "full",
    "llm.architecture": "qwen3-4b",
    "llm.random.num_layers": 3,
    "ids.path": "ids.json",
    "projector.width": 7,  # prompts have no placeholders
    "projector.train": False,
    "projector.curriculum": True,
    "training.checkpoint_every": 3,
    "training.keep_checkpoints": 1,
    "training.watchdog_seconds": 5.0,
    "training.profile_steps": (1, 2),
    "training.micro_batches": 2,
    "training.cache_hidden_states": True,
    "validation.patience": 3,  # it is off
    "tracking.project": "mine",
    "inference.batch_size": 2,
    "inference.checkpoint": "lowest_training_loss",
    "decoding.beams": 5,
    "evaluation.rows": 3,
    "evaluation.split": "validation",
}


def train_another(experiment):
    experiment.config.run = "another"
    return train(experiment)


READERS_OF_DATA = READERS | {
    "another run": train_another,
    "train_cf": lambda experiment: experiment.data,  # as launch/train_cf.py loads them
}
READERS_OF_LOGITS = ("another run", "evaluate", "sweep")


def changed(workdir, field, value):
    """The run's experiment with one field changed."""
    config = make_config(workdir, RUN)
    section, _, name = field.rpartition(".")
    config_value(config, section)[name] = value
    return Experiment(config, workdir)


def assert_refused(make_experiment, readers, said):
    for name in readers:
        with pytest.raises(UserError) as refused:
            READERS_OF_DATA[name](make_experiment())
        assert said in str(refused.value), name
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("field", INFERENCE)
def test_a_field_of_inference_is_noticed_by_every_reader_of_a_run(workdir, field):
    assert_refused(lambda: changed(workdir, field, INFERENCE[field]), READERS, f"{field} was ")


@pytest.mark.parametrize("field", TRAINING)
def test_a_field_of_training_is_noticed_by_training(workdir, field):
    experiment = changed(workdir, field, TRAINING[field])
    assert_refused(lambda: experiment, ["train"], f"{field} was ")
    experiment.check_run(RUN)


@pytest.mark.parametrize("field", DATA)
def test_other_settings_than_the_data_were_prepared_with_are_noticed(workdir, field):
    assert_refused(lambda: changed(workdir, field, DATA[field]), READERS_OF_DATA, f"{field} was ")


@pytest.mark.parametrize("field", CF)
def test_other_settings_than_the_cf_logits_were_made_with_are_noticed(workdir, field):
    assert_refused(lambda: changed(workdir, field, CF[field]), READERS_OF_LOGITS, f"{field} was ")


def test_a_cf_model_of_other_settings_guides_nobody(workdir):
    with pytest.raises(StaleError, match="cf.model was 'popularity', is 'item_knn'"):
        Recommender(changed(workdir, "cf.model", "item_knn"), RUN, guidance=1.0)


@pytest.mark.parametrize("field", NO_MATTER)
def test_what_does_not_matter_is_in_nobodys_way(workdir, field):
    experiment = changed(workdir, field, NO_MATTER[field])
    run = experiment.check_run(RUN, guided=True)
    assert run.made_from.differences(experiment.training_inputs) == []


def test_a_field_that_was_added_is_recorded_where_it_does_as_never_before(workdir):
    """Else a run has the inputs, and in its checkpoints the fingerprint, of one made before."""
    fields, experiment = config_fields(), changed(workdir, "seed", 0)
    assert {name: fields[name].default for name in ADDED} == ADDED
    inputs = experiment.training_inputs
    assert not ADDED.keys() & inputs.keys()
    before = Provenance("LLM run", "", inputs | {"prompt.tokenised": "whole"})
    assert before.differences(experiment.inference_inputs) == [
        "prompt.tokenised was 'whole', is None"
    ]


def test_beta_matters_to_a_guided_list(workdir):
    experiment = changed(workdir, "objective.beta", 2.0)
    experiment.check_run(RUN)
    with pytest.raises(StaleError, match="objective.beta was 1.0, is 2.0"):
        Recommender(experiment, RUN, guidance=1.0)
    experiment.config.decoding.beta = 2.0
    experiment.check_run(RUN, guided=True)


LISTS = {  # lists depend on it, whether of an evaluation or in a file
    "decoding.beams": 5,
    "decoding.mask": "after_softmax",
    "decoding.temperature": 2.0,
    "decoding.length_penalty": 1.0,
    "decoding.find": "grounding",
    "decoding.grounding_beams": 2,
    "decoding.grounding_tokens": 8,
    "decoding.exclude_history": True,
    "decoding.deny": "deny.txt",
    "decoding.beta": 2.0,
    "inference.checkpoint": "lowest_training_loss",
}
FIELDS = INFERENCE | LISTS | NO_MATTER


@pytest.mark.parametrize("field", sorted(FIELDS.keys() - {"data.history_length"}))
def test_what_lists_depend_on_is_noticed(workdir, monkeypatch, field):
    (workdir / "deny.txt").write_text("3\n")
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(Experiment, "run_step", lambda self, _: self.config.inference.checkpoint)

    def inputs(experiment):
        return list_inputs(experiment, RUN, [score_weights(experiment.config, 1.0)])

    made_from = Provenance("lists", "", inputs(Experiment(make_config(workdir, RUN), workdir)))
    found = made_from.differences(inputs(changed(workdir, field, FIELDS[field])))
    assert bool(found) == (field in INFERENCE | LISTS), found


def validation(experiment, rows):
    experiment.config.validation.every = 2
    return experiment.training_inputs


RANKS = {
    "validation": validation,
    "rankings": lambda experiment, rows: ranking_inputs(experiment, rows, RUN, []),
    "results": lambda experiment, rows: inputs_of(experiment, rows, comparison(experiment, [RUN])),
}


@pytest.mark.parametrize("kind", RANKS)
def test_how_titles_are_compared_is_noticed_where_they_are_ranked(workdir, kind):
    experiment = changed(workdir, "evaluation.text_match", False)
    rows = EvaluationRows.of(experiment)
    made_from = Provenance("ranks", "", RANKS[kind](experiment, rows))
    assert made_from.inputs.get("evaluation.text_match") is None  # as before there was this field
    experiment.config.evaluation.text_match = True
    found = made_from.differences(RANKS[kind](experiment, rows))
    assert len(found) == 1
    assert found[0].startswith("evaluation.text_match was ")


@pytest.mark.parametrize("field", sorted(LISTS.keys() - {"inference.checkpoint"}))
def test_what_lists_depend_on_is_noticed_by_a_validated_run(workdir, monkeypatch, field):
    (workdir / "deny.txt").write_text("3\n")
    monkeypatch.chdir(workdir)
    made_from = Provenance("LLM run", "", validation(changed(workdir, "validation.beams", 4), None))
    experiment = changed(workdir, field, LISTS[field])
    experiment.config.validation.beams = 4
    found = made_from.differences(validation(experiment, None))
    own = {"decoding.beams", "decoding.beta"}  # it has beams of its own, and no guidance
    assert bool(found) == (field not in own), found


def other_weights(workdir):
    path = workdir / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_tokenizer(workdir):
    path = workdir / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"q"', '"Q"'))


def other_title(workdir):
    items = pd.read_csv(workdir / "items.csv")
    items.loc[3, "title"] = "zz"
    items.to_csv(workdir / "items.csv", index=False)
    prepare_anew(workdir)


def other_interactions(workdir):
    rows = pd.read_csv(workdir / "interactions.csv")
    rows.loc[0, "item"] = (rows.loc[0, "item"] + 1) % 12
    rows.to_csv(workdir / "interactions.csv", index=False)
    prepare_anew(workdir)


def prepare_anew(workdir):
    shutil.rmtree(workdir / "data")
    config = make_config(workdir, RUN)
    prepare(config.data, workdir / "data")
    run_cf(config.cf, load(workdir / "data"), workdir, history_length=4)


def other_cf_model(workdir):
    experiment = changed(workdir, "cf.model", "item_knn")
    run_cf(experiment.config.cf, experiment.data, workdir, history_length=4)
    return experiment


@pytest.mark.parametrize(
    ("change", "readers", "said"),
    [
        (other_weights, READERS, "weights was "),
        (other_tokenizer, READERS, "tokenizer was "),
        (other_title, READERS, "catalogue was "),
        (other_interactions, ["train"], "training rows was "),
        (other_cf_model, ["train"], "CF logits was "),
    ],
)
def test_other_content_is_noticed(workdir, change, readers, said):
    experiment = change(workdir) or Experiment(make_config(workdir, RUN), workdir)
    assert_refused(lambda: Experiment(experiment.config, workdir), readers, said)


@pytest.mark.parametrize("change", [other_interactions, other_cf_model])
def test_lists_of_a_run_whose_training_data_were_replaced_say_so(workdir, change, caplog):
    experiment = change(workdir) or Experiment(make_config(workdir, RUN), workdir)
    logging.use_absl_handler()
    with caplog.at_level("WARNING", logger="absl"):
        experiment.check_run(RUN)
    assert "llm/done: since it was trained, " in caplog.text


def test_an_unfinished_run_is_taken_by_nobody_who_does_not_ask_for_it(workdir):
    path = workdir / "llm" / RUN / FILE
    record = json.loads(path.read_text())
    record["inputs"]["training.steps"] = 6
    path.write_text(json.dumps(record))
    config = make_config(workdir, RUN)
    for reader in READERS.keys() - {"train"}:
        with pytest.raises(ValueError, match=r"is unfinished, it has 5 of 6 steps: go on with"):
            READERS[reader](Experiment(config, workdir))
    config.inference.unfinished = True
    Experiment(config, workdir).check_run(RUN)


def test_a_run_without_checkpoints_or_record_is_refused(workdir):
    experiment = Experiment(make_config(workdir, RUN), workdir)
    with pytest.raises(FileNotFoundError, match="llm/other: no such run, or no checkpoint of it"):
        experiment.trained_decoder("other")
    (workdir / "llm" / RUN / FILE).unlink()
    for reader in READERS.values():
        with pytest.raises(StaleError, match="llm/done does not say what it was made from"):
            reader(experiment)


def test_evaluated_logits_of_another_cf_model_than_the_trained_ones_are_refused(workdir, tmp_path):
    data = load(workdir / "data")
    rows, place = data.splits["test"], workdir / "cf" / "logits" / "test"
    np.save(tmp_path / "mine.npy", np.zeros((len(rows), ITEMS), np.float32))
    import_logits(tmp_path / "mine.npy", place, rows, data.catalogue, name="mine")
    for reader in ("evaluate", "sweep"):
        with pytest.raises(LogitsStoreError, match="test holds .* of 'mine', .*'most popul"):
            READERS[reader](Experiment(make_config(workdir, RUN), workdir))
