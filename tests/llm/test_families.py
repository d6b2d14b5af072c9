"""Every family against transformers' PyTorch models and PEFT, whose results are in the goldens.

Where PyTorch is installed the same comparisons run live as well, with weights of another seed.
"""

import dataclasses
import functools
import importlib.util
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import make_decoder_golden as goldens
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load

from tca4rec_jax.llm.checkpoints.export import (
    read_peft_adapter,
    write_hugging_face,
    write_peft_adapter,
)
from tca4rec_jax.llm.checkpoints.loading import load_weights
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.kv_cache import scatter_cache
from tca4rec_jax.llm.lora import LoRAConfig, merge_adapters

WHOLE, CUT = np.array([13, 13]), np.array(goldens.LENGTHS)
GOLDEN, LIVE = None, 11
HAS_TORCH = all(map(importlib.util.find_spec, ("torch", "peft")))
needs_torch = pytest.mark.skipif(
    not HAS_TORCH, reason="PyTorch and PEFT, test-only oracles, are not installed"
)
# Dozens of programs that run once: compiled quickly, not for speed.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Case(NamedTuple):
    """A model of the goldens: what PyTorch made of it, and the model read from its files."""

    golden: dict[str, np.ndarray]
    config: DecoderConfig
    params: dict[str, jax.Array]
    lora: LoRAConfig
    adapters: dict[str, dict[str, jax.Array]]

    @property
    def decoder(self):
        return Decoder(self.config, self.params)

    @property
    def adapted(self):
        return Decoder(self.config, self.params, lora=self.lora, adapters=self.adapters)


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param((name, GOLDEN), id=f"{name}-golden") for name in goldens.MODELS),
        *(
            pytest.param((name, LIVE), id=f"{name}-live", marks=needs_torch)
            for name in goldens.MODELS
        ),
    ],
)
def case(request, tmp_path_factory):
    name, seed = request.param
    golden = goldens.read_model(name) if seed is GOLDEN else goldens.tiny_model(name, seed)
    folder = tmp_path_factory.mktemp(name)
    goldens.write_files(folder, golden)
    config, params = load_weights(folder)
    return Case(golden, config, params, *read_peft_adapter(folder, config))


@jit
def logits_of(decoder, tokens, lengths):
    return decoder.head()(decoder.hidden(tokens, lengths))


def assert_close(values, expected, tolerance=1e-4):
    """Within a tolerance relative to the largest expected value."""
    np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_logits(case):
    tokens = case.golden["tokens"]
    assert_close(logits_of(case.decoder, tokens, WHOLE), case.golden["logits"])


def test_right_padding_here_equals_left_padding_there(case):
    tokens = case.golden["tokens"].copy()
    tokens[1, CUT[1] :] = 28
    logits = np.asarray(logits_of(case.decoder, tokens, CUT))
    for row, length in enumerate(CUT):
        expected = case.golden["left_padded_logits"][row, -length:]
        assert_close(logits[row, :length], expected)


def test_cache_token_by_token(case):
    """Prompts of 5 and 3 tokens, then the rest one by one, in two beams that share the prompt."""
    decoder, tokens = case.decoder, case.golden["tokens"]
    lengths = np.array([5, 3])
    _, prompt = jit(Decoder.prefill)(decoder, tokens[:, :5], lengths[:, None] - 1)
    cache = decoder.init_beam_cache(2, 2, 32)

    @jit
    def extend(tokens, cache):
        ones, every = jnp.ones((2, 2), int), jnp.arange(4)
        hidden, new = decoder.extend(tokens, ones, prompt, lengths, cache, every, 2)
        return hidden, scatter_cache(cache, new)

    for step in range(8):
        now = tokens[np.arange(2), lengths + step]
        hidden, cache = extend(np.tile(now[:, None, None], (1, 2, 1)), cache)
        logits = np.asarray(decoder.head()(hidden)).reshape(2, 2, -1)
        for row in range(2):
            expected = case.golden["cached_logits"][row, lengths[row] + step]
            assert_close(logits[row], np.tile(expected, (2, 1)))


def test_adapters_and_their_gradients(case, tmp_path):
    """Logits with the adapters unmerged, and the gradient of the mean loss of the rows cut."""
    tokens = jnp.asarray(case.golden["tokens"])
    graph, adapters, base = nnx.split(case.adapted, nnx.LoRAParam, ...)
    supervised = np.arange(12)[None, :] < CUT[:, None] - 1

    def loss(adapters):
        decoder = nnx.merge(graph, adapters, base)
        logits = decoder.head()(decoder.hidden(tokens, WHOLE))
        log_p = jax.nn.log_softmax(logits[:, :-1])
        log_p = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[:, :, 0]
        return -jnp.mean(log_p, where=supervised), logits

    gradients, logits = jit(jax.grad(loss, has_aux=True))(adapters)
    assert_close(logits, case.golden["lora_logits"])
    gradients = nnx.to_pure_dict(gradients)["adapters"]
    write_peft_adapter(tmp_path / "gradients", case.config, case.lora, gradients, base_model="")
    ours = load((tmp_path / "gradients" / "adapter_model.safetensors").read_bytes())
    expected = load(case.golden["gradients.safetensors"].tobytes())
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert_close(ours[name], value, 1e-3)


def test_merged_adapters(case):
    merged = Decoder(case.config, merge_adapters(case.params, case.adapters, case.lora))
    logits = logits_of(merged, case.golden["tokens"], WHOLE)
    assert_close(logits, case.golden["merged_logits"])


def test_what_is_written_comes_back_bit_for_bit(case, tmp_path, tokenizer):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    write_hugging_face(model, case.config, case.params, tokenizer, dtype="float32")
    write_peft_adapter(adapter, case.config, case.lora, case.adapters, base_model="")
    for path in (model / "model.safetensors", adapter / "adapter_model.safetensors"):
        written, expected = load(path.read_bytes()), load(case.golden[path.name].tobytes())
        assert set(written) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(written[name], value, err_msg=name)
    config, params = load_weights(model)
    assert config == case.config
    jax.tree.map(np.testing.assert_array_equal, params, case.params)


def test_a_gemma_without_query_pre_attn_scalar_comes_back(tmp_path, tokenizer):
    """None is written as the head_dim that it means; absent from a file it is the family's 256."""
    golden = goldens.read_model("gemma3")
    goldens.write_files(tmp_path, golden)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["query_pre_attn_scalar"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config, params = load_weights(tmp_path)
    for scalar, written in ((config.query_pre_attn_scalar, 256), (None, config.head_dim)):
        config = dataclasses.replace(config, query_pre_attn_scalar=scalar)
        folder = tmp_path / str(scalar)
        write_hugging_face(folder, config, params, tokenizer, dtype="float32")
        assert json.loads((folder / "config.json").read_text())["query_pre_attn_scalar"] == written
        expected, again = (
            logits_of(decoder, golden["tokens"], WHOLE)
            for decoder in (Decoder(config, params), Decoder(*load_weights(folder)))
        )
        np.testing.assert_array_equal(again, expected)


@needs_torch
def test_transformers_and_peft_open_what_is_written(case, tmp_path, tokenizer):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def open_checkpoint(name):
        model, loading = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(loading.values())
        return model.eval()

    config, params, adapters, lora = case.config, case.params, case.adapters, case.lora
    merged = merge_adapters(params, adapters, lora)
    write_hugging_face(tmp_path / "base", config, params, tokenizer, dtype="float32")
    write_hugging_face(tmp_path / "merged", config, merged, tokenizer, dtype="float32")
    write_peft_adapter(tmp_path / "adapter", config, lora, adapters, base_model="base")
    upper = dataclasses.replace(lora, first_layer=1)
    write_peft_adapter(tmp_path / "upper", config, upper, adapters, base_model="base")
    adapted, in_upper_layers = (
        PeftModel.from_pretrained(open_checkpoint("base"), tmp_path / name).eval()
        for name in ("adapter", "upper")
    )
    assert not any(
        "layers.0." in name for name, _ in in_upper_layers.named_parameters() if "lora" in name
    )
    tokens = case.golden["tokens"]
    for model, decoder in (
        (adapted, case.adapted),
        (open_checkpoint("merged"), case.adapted),
        (in_upper_layers, Decoder(config, params, lora=upper, adapters=adapters)),
    ):
        with torch.no_grad():
            theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
        assert_close(theirs, logits_of(decoder, tokens, WHOLE))
