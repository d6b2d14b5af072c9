"""A tiny Gemma 3 as a GGUF file, as llama.cpp's converter writes one, with SentencePiece's letters.

Two layers: the first sees a few tokens back, the second all.
"""

import string
from pathlib import Path

import gguf
import jax
import numpy as np

from tca4rec_jax.llm.checkpoints.hugging_face import is_transposed, param_paths
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import init_params
from tca4rec_jax.llm.families import GEMMA, gemma_blocks

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "▁", *string.ascii_lowercase]
CONFIG = DecoderConfig(
    len(WORDS), 64, 64, 2, 4, 2, 16, max_positions=64, tie_embeddings=True, qk_norm=True,
    sliding_window=6, full_layers=(1,), local_rope_theta=500.0, family=GEMMA,
    **gemma_blocks(64, 16.0),
)  # fmt: skip


def write_gemma(path: Path) -> None:
    """Writes the file, with random weights."""
    writer = gguf.GGUFWriter(str(path), "gemma3")
    writer.add_block_count(CONFIG.num_layers)
    writer.add_context_length(CONFIG.max_positions)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_key_length(CONFIG.head_dim)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_rope_freq_base_swa(CONFIG.local_rope_theta)
    writer.add_sliding_window(CONFIG.sliding_window)
    writer.add_sliding_window_pattern(2)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([-float(number) for number in range(len(WORDS))])
    writer.add_token_types([3, 3, 3, 2, 3, *[1] * (len(WORDS) - 5)])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, CONFIG.num_layers)
    params = init_params(CONFIG, jax.random.key(0))
    for name, (param, layer) in param_paths(CONFIG).items():
        value = np.asarray(params[param] if layer is None else params[param][layer])
        value = value.T if is_transposed(param) else value
        value = value + np.float32(param.endswith("_norm"))  # their offset
        module, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(module)}.{kind}", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
