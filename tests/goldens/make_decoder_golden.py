"""Makes the goldens of the decoder and the tokenizer with PyTorch and plain Python, without JAX.

    python tests/goldens/make_decoder_golden.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs torch==2.13.0, transformers==5.23.0, peft==0.21.2, gguf, regex and numpy. Writes here:
  families.npz        a tiny random model of every family: its files, tokens, and what transformers'
                      PyTorch model and PEFT make of them (see `tiny_model`)
  smollm2_top5.json   the five likeliest next tokens of three prompts, same code, real weights
  smollm2_tokens.json encodings of titles by a byte-level BPE written from its definition
"""

import json
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
PROMPTS = (
    "The capital of France is",
    "My favourite film is Star Wars: Episode",
    "Toy Story (1995), GoldenEye (1995), Four Rooms",
)
TEXTS = (
    "Toy Story (1995)",
    " The Usual Suspects (1995)",
    "12 Angry Men",
    "2001: A Space Odyssey",
    "Cité des enfants perdus, La (City of Lost Children)",
    "Les Misérables — l'été où j'ai 100% ½",
    "It's they'll I'd we've  two  spaces\n\nand lines \t",
    "Übermensch 東京物語 🎬 №9",
    "<|im_start|>user\nHello<|im_end|>",
    "HP 61XL Ink/Toner (CH563WN), 3-Pack & more...",
    "",
)


SIZES = {
    "vocab_size": 29,  # the tokens stop at 26: padded
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # In which the four pairs of a head of 8 turn 5.1 (kept), 1.1 (blended), 0.2 and 0.05 times.
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
# Name of a model -> model_type and what differs from SIZES.
MODELS = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 8}),
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "llama_biased": (
        "llama", {"rope_parameters": LINEAR_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 6}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 20,
            "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": LINEAR_ROPE,
            },
        },
    ),
}  # fmt: skip
LENGTHS = (13, 8)
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
LORA = {"r": 2, "lora_alpha": 6.0, "lora_dropout": 0.0, "target_modules": ADAPTED}


def tiny_model(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """A random model of MODELS and what PyTorch makes of it, in float32.

    Returns:
      config.json, model.safetensors, adapter_config.json, adapter_model.safetensors: bytes of the
        files of a checkpoint (a tied head is not repeated) and of a PEFT adapter for it.
      gradients.safetensors: of the mean next-token loss of the rows cut to LENGTHS, in the adapter.
      tokens: [2, 13]; logits: [2, 13, V] of both rows whole.
      left_padded_logits: [2, 13, V], of the second row's first 8 tokens behind 5 of padding.
      cached_logits: [2, 13, V], the tokens given one by one, with a cache.
      lora_logits, merged_logits: [2, 13, V] with the adapter, and with it merged.
    """
    import torch
    from safetensors.numpy import save
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model_type, changes = MODELS[name]
    config = AutoConfig.for_model(model_type, **(SIZES | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Default weights are so small that attention hardly matters.
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
        tokens = torch.randint(0, 26, (2, 13))
        golden = {
            "config.json": _bytes(config.to_json_string().encode()),
            "tokens": tokens.numpy().astype(np.int32),
            "logits": model(tokens).logits.numpy(),
            "left_padded_logits": _left_padded_logits(model, tokens).numpy(),
            "cached_logits": _cached_logits(model, tokens).numpy(),
        }
    weights = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    golden["model.safetensors"] = _bytes(save(weights))
    return golden | _with_adapter(model, tokens)


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def _left_padded_logits(model, tokens):
    """The rows cut to LENGTHS, the shorter one behind padding."""
    import torch

    padded, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate(LENGTHS):
        padded[row, -length:] = tokens[row, :length]
        mask[row, -length:] = 1
    return model(padded, attention_mask=mask).logits


def _cached_logits(model, tokens):
    import torch

    cache, logits = None, []
    for position in range(tokens.shape[1]):
        output = model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _with_adapter(model, tokens) -> dict[str, np.ndarray]:
    """What PEFT makes of the model with a random adapter; the model is changed."""
    import tempfile

    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.numpy import save

    adapted = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM")).eval()
    trained = {key: value for key, value in adapted.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        golden = {
            name: _bytes(Path(folder, name).read_bytes())
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
    logits = adapted(tokens).logits
    losses = [
        torch.nn.functional.cross_entropy(
            logits[row, : length - 1], tokens[row, 1:length], reduction="sum"
        )
        for row, length in enumerate(LENGTHS)
    ]
    (sum(losses) / sum(length - 1 for length in LENGTHS)).backward()
    gradients = {key.replace(".default", ""): x.grad.numpy() for key, x in trained.items()}
    with torch.no_grad():
        merged = adapted.merge_and_unload()(tokens).logits
    return golden | {
        "gradients.safetensors": _bytes(save(gradients)),
        "lora_logits": logits.detach().numpy(),
        "merged_logits": merged.numpy(),
    }


def smollm2_model(reader):
    """transformers' PyTorch Llama with the dequantised weights of a GGUF file."""
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def meta(name):
        return reader.fields[name].contents()

    heads, kv_heads = (meta(f"llama.attention.head_count{s}") for s in ("", "_kv"))
    config = LlamaConfig(
        vocab_size=meta("llama.vocab_size"),
        hidden_size=meta("llama.embedding_length"),
        intermediate_size=meta("llama.feed_forward_length"),
        num_hidden_layers=meta("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": meta("llama.rope.freq_base")},
        rms_norm_eps=meta("llama.attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=True,
        max_position_embeddings=meta("llama.context_length"),
    )
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name == "token_embd.weight":
            state["model.embed_tokens.weight"] = state["lm_head.weight"] = torch.tensor(value)
            continue
        if tensor.name == "output_norm.weight":
            state["model.norm.weight"] = torch.tensor(value)
            continue
        _, layer, name, _ = tensor.name.split(".")
        if name in ("attn_q", "attn_k"):
            count = heads if name == "attn_q" else kv_heads
            rows, columns = value.shape
            pairs = value.reshape(count, rows // count // 2, 2, columns)
            value = pairs.swapaxes(1, 2).reshape(rows, columns)
        state[f"model.layers.{layer}.{names[name]}.weight"] = torch.tensor(value)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


class PlainBPE:
    """Byte-level BPE from its definition: special tokens, digits, GPT-2's words, merges by rank."""

    def __init__(self, tokens, kinds, merges):
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.letters = {byte: chr(byte) for byte in printable}
        self.letters |= {byte: chr(256 + index) for index, byte in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        import regex

        ids = []
        specials = "|".join(map(regex.escape, self.special))
        for part in regex.split(f"({specials})", text):
            if part in self.special:
                ids.append(self.ids[part])
                continue
            for piece in regex.findall(r"\p{N}|\P{N}+", part):
                for word in regex.findall(
                    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
                    piece,
                ):
                    ids += self._word(word)
        return ids

    def _word(self, word: str) -> list[int]:
        symbols = [self.letters[byte] for byte in word.encode()]
        while len(symbols) > 1:
            ranks = [
                self.ranks.get(pair, len(self.ranks))
                for pair in zip(symbols, symbols[1:], strict=False)
            ]
            best = min(ranks)
            if best == len(self.ranks):
                break
            at = ranks.index(best)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return [self.ids[symbol] for symbol in symbols]


def smollm2_goldens(path: str) -> tuple[dict, dict]:
    """The two JSON documents made from the real model's file."""
    import gguf
    import torch

    reader = gguf.GGUFReader(path)
    tokens, kinds, merges = (
        reader.fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("tokens", "token_type", "merges")
    )
    bpe = PlainBPE(tokens, kinds, merges)
    encodings = {text: bpe.encode(text) for text in TEXTS}
    model, predictions = smollm2_model(reader), []
    for prompt in PROMPTS:
        ids = bpe.encode(prompt)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        values, indices = torch.log_softmax(logits, -1).topk(5)
        predictions.append(
            {
                "prompt": prompt,
                "ids": ids,
                "top_ids": indices.tolist(),
                "log_probs": [round(value, 6) for value in values.tolist()],
            }
        )
    return {"predictions": predictions}, encodings


def read_model(name: str) -> dict[str, np.ndarray]:
    """What `tiny_model` made when the goldens were written; needs NumPy only."""
    with np.load(FOLDER / "families.npz") as golden:
        return {
            key.removeprefix(f"{name}/"): golden[key]
            for key in golden
            if key.startswith(f"{name}/")
        }


def write_files(folder: Path, golden: dict[str, np.ndarray]) -> None:
    """The files of a golden's checkpoint and adapter."""
    for name, content in golden.items():
        if content.dtype == np.uint8 and "gradients" not in name:
            (folder / name).write_bytes(content.tobytes())


def write_families() -> None:
    golden = {f"{name}/{key}": value for name in MODELS for key, value in tiny_model(name).items()}
    np.savez_compressed(FOLDER / "families.npz", **golden)


def main(path: str) -> None:
    """Writes the three golden files."""
    write_families()
    top5, encodings = smollm2_goldens(path)
    for name, document in (("smollm2_top5", top5), ("smollm2_tokens", encodings)):
        text = json.dumps(document, ensure_ascii=False, indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
