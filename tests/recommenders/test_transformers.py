"""What is exported of recommenders with new tokens or a projector, in PyTorch (where it is)."""

import importlib.util
import re

import jax
import numpy as np
import pytest
from flax import nnx
from recommenders.kinds import experiment_of, make_workdir_of
from tiny_workdir import make_workdir

from tca4rec_jax.llm.checkpoints.export import export_decoder
from tca4rec_jax.recommenders.vectors import describe_vectors
from tca4rec_jax.train import load_batches, train

needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs PyTorch")


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ids, new rows", "from scratch, ids", "tca features"])
def test_transformers_has_the_logits_of_a_merged_export(kind, tmp_path, monkeypatch):
    """With a projector by the lines of the README.md that lies beside it."""
    import torch
    from transformers import AutoModelForCausalLM

    (tmp_path / "tiny").mkdir()
    make_workdir(tmp_path / "tiny")
    make_workdir_of(kind, tmp_path / "tiny", tmp_path / "workdir")
    experiment, folder = experiment_of(kind, tmp_path / "workdir", "whole"), tmp_path / "merged"
    train(experiment)
    decoder, batch = experiment.trained_decoder("whole"), load_batches(experiment)(0)
    given = {"kind": "merged", "dtype": "float32", "base_model": ""}
    given["vectors"] = describe_vectors(experiment)
    export_decoder(folder, decoder, experiment.tokenizer, **given)
    llm, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    monkeypatch.chdir(folder)  # where the lines find the projector
    ours_BxSxV = nnx.jit(logits)(decoder, batch)
    for row, length in enumerate(batch.length_B.tolist()):
        lines, names = "llm(tokens)", {"llm": llm}
        names["tokens"] = torch.tensor(batch.tokens_BxS[row : row + 1, :length]).long()
        if batch.soft is not None:
            lines = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.S)[1]
            carried = batch.soft.position_BxL[row] < length
            names["vectors"] = torch.tensor(batch.soft.vector_BxLxC[row][carried])
        *before, last = lines.splitlines()
        exec("\n".join([*before, f"found = {last}"]), names)
        theirs = names["found"].logits[0].detach().numpy()
        np.testing.assert_allclose(theirs, ours_BxSxV[row, :length], atol=1e-4)


def logits(decoder, batch):
    hidden_BxSxD = decoder.hidden(batch.tokens_BxS, batch.length_B, soft=batch.soft)
    return jax.vmap(decoder.head(None))(hidden_BxSxD)
