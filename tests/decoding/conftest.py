"""Lets the tests of this folder import what lies beside them; a tiny experiment."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.cf.checkpoint import save_model
from tca4rec_jax.cf.models.popularity import Popularity, PopularityConfig
from tca4rec_jax.cf.settings import model_inputs
from tca4rec_jax.config import default_config
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.item_tokens import ItemTokens
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.distributed.sharding import make_mesh
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.provenance import Provenance

sys.path.insert(0, str(Path(__file__).parent))
import oracle
from tiny_catalogue import BOUGHT, IDS, SEQUENCES, TITLES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An experiment whose parts are tiny and already made."""
    config = default_config()
    config.decoding.beams = 4
    config.inference.batch_size = 2
    config.inference.buckets = 1
    config.data.history_length = 3
    config.decoding.exclude_history = False
    workdir = tmp_path_factory.mktemp("run")
    cf_model = Popularity(PopularityConfig(len(IDS)), rngs=nnx.Rngs(0))
    times = np.zeros(len(BOUGHT), np.int64)
    offsets = np.array([0, len(BOUGHT)])
    cf_model.fit_statistics(ItemSequences(np.array([0]), np.array(BOUGHT), offsets, times))
    config.cf.model = "popularity"
    catalogue = Catalogue(tuple(IDS), tuple(TITLES))
    inputs = {"cf": model_inputs(config.cf, workdir), "catalogue": catalogue.content_hash()}
    made_from = Provenance("CF model", "launch/train_cf.py", inputs)
    save_model(workdir / "cf" / "checkpoint.npz", "popularity", cf_model, made_from)
    flat = np.concatenate(SEQUENCES).astype(np.int32)
    titles = Ragged.from_lengths(flat, [len(title) for title in SEQUENCES])
    first, none = (Ragged.from_lengths(np.full(n, 5, np.int32), np.array([n])) for n in (1, 0))
    experiment = Experiment(config, workdir)
    vars(experiment).update(
        data=SimpleNamespace(catalogue=catalogue),
        items=ItemTokens(titles, titles, first, none, none.values),
        trie=ItemTrie.build(SEQUENCES),
        mesh=make_mesh(2),
        inference_decoder=lambda name: oracle.tiny_decoder(),
        check_run=lambda name, guided: None,
        inference_inputs={"weights": "digest"},
        run_step=lambda name: 5,
    )
    for name in ("any", "other"):
        Provenance("LLM run", "", {"name": name}).save(workdir / "llm" / name)
    return experiment
