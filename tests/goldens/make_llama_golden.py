"""Makes the goldens of the decoder and the tokenizer with PyTorch and plain Python, without JAX.

    python tests/goldens/make_llama_golden.py SmolLM2-135M-Instruct.Q4_1.gguf

Needs torch==2.13.0, transformers==5.23.0, gguf, regex and numpy. Writes, beside itself:
  tiny_llama.npz      weights, tokens and logits of two random Llamas (grouped-query attention with
                      tied embeddings; multi-head with a separate head), transformers' PyTorch Llama
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


def tiny_llama(seed: int, *, kv_heads: int, tied: bool) -> dict[str, np.ndarray]:
    """Weights (Hugging Face names), tokens [2, 13] and logits [2, 13, V] of a random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Default weights are so small that attention hardly matters.
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
        tokens = torch.randint(0, config.vocab_size, (2, 13))
        logits = model(tokens).logits
    golden = {f"weights/{name}": value.numpy() for name, value in model.state_dict().items()}
    if tied:
        golden.pop("weights/lm_head.weight", None)
    return golden | {"tokens": tokens.numpy().astype(np.int32), "logits": logits.numpy()}


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


def main(path: str) -> None:
    """Writes the three golden files."""
    golden = {}
    for name, options in (
        ("grouped", {"kv_heads": 2, "tied": True}),
        ("untied", {"kv_heads": 4, "tied": False}),
    ):
        values = tiny_llama(0, **options)
        golden |= {f"{name}/{key}": value for key, value in values.items()}
    np.savez_compressed(FOLDER / "tiny_llama.npz", **golden)
    top5, encodings = smollm2_goldens(path)
    for name, document in (("smollm2_top5", top5), ("smollm2_tokens", encodings)):
        text = json.dumps(document, ensure_ascii=False, indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
