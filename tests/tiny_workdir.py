"""A work directory with a tiny LLM: data, CF logits, weights, and a config that fits them."""

import string

import jax
import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.config import default_config
from tca4rec_jax.data.dataset import load, prepare
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.llm.checkpoints.export import write_hugging_face
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import init_params
from tca4rec_jax.train import train
from tca4rec_jax.training.log import TrainingLog

ITEMS = 12
CHAT = "s{{ messages[0]['content'] | trim }}<|end|>{% if add_generation_prompt %}a{% endif %}"


def make_workdir(path, titles=None):
    """Data, the logits of popularity, and a random Llama with a tokenizer of letters."""
    rng = np.random.default_rng(0)
    pd.DataFrame(
        {
            "user": np.repeat(np.arange(40), 8),
            "item": rng.integers(0, ITEMS, 320),
            "timestamp": np.arange(320),
        }
    ).to_csv(path / "interactions.csv", index=False)
    titles = titles or [
        f"{string.ascii_lowercase[item]}{string.ascii_lowercase[item % 3]}" for item in range(ITEMS)
    ]
    brands = [string.ascii_lowercase[-1 - item % 4] for item in range(ITEMS)]
    items = {"item": range(ITEMS), "title": titles, "brand": brands}
    pd.DataFrame(items).to_csv(path / "items.csv", index=False)
    letters = models.BPE(
        vocab={c: i for i, c in enumerate("\x00Ġ" + string.ascii_lowercase + '".')}, merges=[]
    )
    tokenizer = Tokenizer(letters)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|reserved|>"])
    architecture = DecoderConfig(32, 64, 64, 2, 4, 2, 16, max_positions=64)
    write_hugging_face(
        path / "model",
        architecture,
        init_params(architecture, jax.random.key(0)),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT),
        dtype="float32",
    )
    config = make_config(path, "any")
    prepare(config.data, path / "data")
    run_cf(config.cf, load(path / "data"), path, history_length=4)


def make_config(workdir, name, **llm):
    config = default_config()
    config.run = name
    config.data.source = "files"
    config.data.interactions = str(workdir / "interactions.csv")
    config.data.catalogue = str(workdir / "items.csv")
    config.data.history_length = 4
    config.cf.model = "popularity"
    config.llm.weights = str(workdir / "model")
    config.llm.update(llm)
    config.prompt.update({"templates": ("q{history}z{target}",), "separator": "z", "end": "z"})
    config.prompt.max_tokens = 32
    config.training.update({"steps": 5, "batch_size": 4, "buckets": (32,), "checkpoint_every": 2})
    config.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 1})
    config.decoding.beams = 3
    config.evaluation.update({"rows": 4, "examples": 1, "cutoffs": (1, 3)})
    config.inference.update({"batch_size": 4, "buckets": 1})
    config.evaluation.variants = (("untrained", "", 0.0), ("trained", name, 0.0))
    return config


def stopped_and_gone_on(config, workdir, monkeypatch):
    """(the experiment, its last state) of a run that was stopped after three steps."""
    run, write = Experiment(config, workdir), TrainingLog.write

    def write_or_stop(log, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        return write(log, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLog, "write", write_or_stop)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert len(read_json_lines(run.directory / "log.jsonl")) == 3
    run = Experiment(config, workdir)
    return run, train(run)
