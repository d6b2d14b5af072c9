"""Makes the goldens of Gemma 3 270M with PyTorch and SentencePiece, without JAX.

    python tests/goldens/make_gemma_golden.py gemma-3-270m-q4_k_m.gguf ml-100k.item

Needs torch==2.13.0, transformers==5.23.0, gguf, sentencepiece and numpy. Writes here:
  gemma3_tokens.json  encodings of texts by SentencePiece itself, over the vocabulary in the file,
                      and the SHA-256 of those of the lines of MovieLens' items (`digest`)
  gemma3_logits.npz   what transformers' Gemma 3 computes on the dequantised weights, at a few
                      positions of a few prompts: the highest logits and some of the others
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from make_decoder_golden import FOLDER, PROMPTS, TEXTS

MORE_TEXTS = (
    "Movies one person watched, in order:\n",
    "tabs\t\tand   three spaces, <b>bold</b> [multimodal]",
    "aaaaaaa -- ======= 𝔹 籙",
    "<eos> <start_of_turn>user",
)
LONG = "".join(f" {text}\n" for text in (*TEXTS, *PROMPTS)) * 4  # beyond the sliding window of 512
HIGHEST, OTHERS = 20, 200
# config.json of google/gemma-3-270m; what is missing has transformers' defaults.
CONFIG = {
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
NAMES = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
USER_DEFINED = 4


def digest(encodings: Iterable[Iterable[int]]) -> str:
    """SHA-256 (hex) of encodings, in order."""
    text = json.dumps([list(map(int, ids)) for ids in encodings])
    return hashlib.sha256(text.encode()).hexdigest()


def sentencepiece_of(reader):
    """SentencePiece's processor of the vocabulary in a GGUF file."""
    from sentencepiece import SentencePieceProcessor
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    def field(name):
        return reader.fields[f"tokenizer.ggml.{name}"].contents()

    model = protobuf.ModelProto()
    for token, score, kind in zip(*map(field, ("tokens", "scores", "token_type")), strict=True):
        # llama.cpp's converter writes the spaces of these as spaces.
        piece = token.replace(" ", "▁") if kind == USER_DEFINED else token
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback = protobuf.TrainerSpec.BPE, True
    for short, long in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        setattr(trainer, f"{short}_id", field(f"{long}_token_id"))
        setattr(trainer, f"{short}_piece", f"<{short}>")
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.escape_whitespaces = "identity", True
    normalizer.add_dummy_prefix = field("add_space_prefix")
    normalizer.remove_extra_whitespaces = False
    return SentencePieceProcessor(model_proto=model.SerializeToString())


def gemma_model(reader):
    """transformers' PyTorch Gemma 3 with the dequantised weights of a GGUF file."""
    import gguf
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    model = Gemma3ForCausalLM(Gemma3TextConfig(**CONFIG)).eval()
    state = {}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if "norm" in tensor.name:
            value = value - np.float32(1)  # llama.cpp's converter adds it
        first, *layer_and_name, _ = tensor.name.split(".")
        if layer_and_name:
            layer, name = layer_and_name
            state[f"model.layers.{layer}.{NAMES[name]}.weight"] = torch.tensor(value)
        else:
            state[f"model.{TOP_NAMES[first]}.weight"] = torch.tensor(value)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def logits_golden(model, rows: list[list[int]]) -> dict[str, np.ndarray]:
    """tokens [N, S] int32, lengths [N], positions [N, P], of which ids [N, P, K] and logits."""
    import torch

    generator = np.random.default_rng(0)
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    positions, ids, values = [], [], []
    for row, row_tokens in zip(tokens, rows, strict=True):
        row[: len(row_tokens)] = row_tokens
        with torch.no_grad():
            logits_SxV = model(torch.tensor([row_tokens])).logits[0].numpy()
        at = np.unique(np.linspace(0, len(row_tokens) - 1, 6).astype(np.int32))[-4:]
        highest = np.argsort(-logits_SxV[at])[:, :HIGHEST]
        others = generator.integers(0, CONFIG["vocab_size"], (len(at), OTHERS))
        positions.append(at)
        ids.append(np.concatenate([highest, others], axis=1))
        values.append(np.take_along_axis(logits_SxV[at], ids[-1], axis=1))
    return {
        "tokens": tokens,
        "lengths": np.array(list(map(len, rows)), np.int32),
        "positions": np.stack(positions),
        "ids": np.stack(ids).astype(np.int32),
        "logits": np.stack(values),
    }


def main(path: str, movielens: str) -> None:
    """Writes the two goldens."""
    import gguf

    reader = gguf.GGUFReader(path)
    processor = sentencepiece_of(reader)
    lines = Path(movielens).read_text("utf-8").splitlines()[1:]
    document = {
        "texts": {text: processor.encode(text) for text in (*TEXTS, *MORE_TEXTS, LONG)},
        "movielens": digest(processor.encode(line) for line in lines),
    }
    text = json.dumps(document, ensure_ascii=False)
    (FOLDER / "gemma3_tokens.json").write_text(text + "\n", encoding="utf-8")
    bos = reader.fields["tokenizer.ggml.bos_token_id"].contents()
    rows = [[bos, *processor.encode(prompt)] for prompt in (*PROMPTS, LONG)]
    golden = logits_golden(gemma_model(reader), rows)
    np.savez_compressed(FOLDER / "gemma3_logits.npz", **golden)


if __name__ == "__main__":
    main(*sys.argv[1:])
