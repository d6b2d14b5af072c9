"""Small files of weights and states, mutants of them, and what the readers make of the mutants.

    python tests/mutated_files.py 1000 7     # so many mutants of each kind, seed; for a long search

A mutant has bytes flipped, numbers enlarged, fields swapped, or is cut; its length never grows, so
that what an array should hold lies where it lay in the original.
"""

import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tca4rec_jax.cf.checkpoint import load_model, save_model
from tca4rec_jax.cf.models.sasrec import SASRecConfig
from tca4rec_jax.cf.pytorch_sasrec import read_sasrec, read_state_dict
from tca4rec_jax.decoding.results import read_cache
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import read_json, read_npz, write_npz
from tca4rec_jax.llm.checkpoints.export import read_peft_adapter, write_peft_adapter
from tca4rec_jax.llm.checkpoints.hugging_face import param_paths
from tca4rec_jax.llm.checkpoints.loading import load_weights
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.families import config_fields
from tca4rec_jax.llm.lora import LoRAConfig, adapter_shapes
from tca4rec_jax.llm.tokenizer import load_tokenizer
from tca4rec_jax.provenance import Provenance

CHECKPOINT = Path(__file__).parent / "goldens" / "pytorch_sasrec.pt"
SASREC = SASRecConfig(num_items=11, history_length=5, units=8, blocks=2, heads=1)
DECODER = DecoderConfig(
    12, 8, 12, 2, 2, 1, 4, family="qwen2", biases=("q_proj", "k_proj", "v_proj")
)  # fmt: skip
SECONDS, BYTES = 2.0, 1 << 30  # that a mutant may take
NUMBERS = (0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
VALUES = ("0", "-1", "1e400", "NaN", "null", "[]", '"x"', "1.5", "true", str(2**40), "9" * 30)


class Kind(NamedTuple):
    """A kind of file."""

    file: str  # its name in the folder
    write: Callable[[Path], None]  # the folder's files
    read: Callable[[Path], dict[str, np.ndarray]]  # of the folder or file; raises UserError
    arrays: bool = True  # whether the file holds the bytes of the arrays


def random_params() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = DECODER.parameter_shapes
    return {path: generator.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def stored(params: dict) -> dict[str, np.ndarray]:
    """Parameters as Hugging Face stores them."""
    tensors = {}
    for name, (path, layer) in param_paths(DECODER).items():
        if path not in params:  # a head that the config says is tied
            continue
        value = np.asarray(params[path] if layer is None else params[path][layer])
        matrix = path.endswith("_proj") or path == "lm_head"
        tensors[name] = np.ascontiguousarray(value.T if matrix else value)
    return tensors


def write_hugging_face(folder: Path) -> None:
    tensors = stored(random_params())
    save_file(tensors, folder / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_fields(DECODER)))


def write_gguf(folder: Path) -> None:
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "qwen2")
    writer.add_block_count(DECODER.num_layers)
    writer.add_context_length(DECODER.max_positions)
    writer.add_embedding_length(DECODER.hidden_size)
    writer.add_feed_forward_length(DECODER.intermediate_size)
    writer.add_head_count(DECODER.num_heads)
    writer.add_head_count_kv(DECODER.num_kv_heads)
    writer.add_key_length(DECODER.head_dim)
    writer.add_layer_norm_rms_eps(DECODER.rms_norm_eps)
    writer.add_rope_freq_base(DECODER.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*"abcdefghij", "ab", "<eos>"])
    writer.add_token_types([1] * 11 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(11)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, DECODER.num_layers)
    for name, value in stored(random_params()).items():
        module, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(module)}.{kind}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_sentencepiece(folder: Path) -> None:
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "gemma3")
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<bos>", "<0x61>", "▁", *"abcd", "ab", "▁ab", "\n", "  "]
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 6, *[1] * 7, 4, 4])
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_weights(path: Path) -> dict[str, np.ndarray]:
    return stored(load_weights(path)[1])


def write_adapter(folder: Path) -> None:
    lora, generator = LoRAConfig(rank=2), np.random.default_rng(0)
    adapters = {
        name: {part: generator.normal(size=shape) for part, shape in parts.items()}
        for name, parts in adapter_shapes(DECODER, lora).items()
    }
    write_peft_adapter(folder / "adapter", DECODER, lora, adapters, base_model="base")
    for file in (folder / "adapter").iterdir():
        file.rename(folder / file.name)
    (folder / "adapter").rmdir()


def read_adapter(folder: Path) -> dict[str, np.ndarray]:
    _, adapters = read_peft_adapter(folder, DECODER)
    return {
        f"{projection} {part} {layer}": np.ascontiguousarray(np.asarray(matrix).T)
        for projection, parts in adapters.items()
        for part, matrices in parts.items()
        for layer, matrix in enumerate(matrices)
    }


def write_tokenizer(folder: Path) -> None:
    vocabulary = {letter: number for number, letter in enumerate("abcdefgh")}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="h").save_pretrained(folder)


def read_tokenizer(path: Path) -> dict[str, np.ndarray]:
    load_tokenizer(path)
    return {}


def write_torch(folder: Path) -> None:
    shutil.copy(CHECKPOINT, folder / "a.pth")
    tensors = read_state_dict(CHECKPOINT)
    save_file({name: value.copy() for name, value in tensors.items()}, folder / "a.safetensors")
    made_from = Provenance("CF model", "launch/train_cf.py", {"a": 1})
    save_model(folder / "a.npz", "sasrec", read_sasrec(CHECKPOINT, SASREC), made_from)


def read_cf(path: Path) -> dict[str, np.ndarray]:
    jax.block_until_ready(jax.tree.leaves(load_model(path)[1].items()))
    arrays = read_npz(path, remedy="")
    return {name: array for name, array in arrays.items() if name != "config"}


def read_torch(path: Path) -> dict[str, np.ndarray]:
    read_sasrec(path, SASREC)
    return read_state_dict(path)


def read_fields(path: Path) -> dict[str, np.ndarray]:
    read_json(path)
    return {}


def write_lists(folder: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {"items": generator.integers(0, 9, (4, 5)), "scores": generator.random((4, 5))}
    write_npz(folder / "lists.npz", identity="abc", **arrays)


def read_lists(path: Path) -> dict[str, np.ndarray]:
    arrays = read_cache(path, "abc", ["items", "scores"])
    if not arrays:
        raise UserError(f"{path} is made anew")
    return arrays


WEIGHTS, INDEX, GGUF = "model-1.safetensors", "model.safetensors.index.json", "model.gguf"
KINDS = {
    "GGUF": Kind(GGUF, write_gguf, read_weights),
    "GGUF tokenizer": Kind(GGUF, write_gguf, read_tokenizer),
    "SentencePiece in GGUF": Kind(GGUF, write_sentencepiece, read_tokenizer),
    "safetensors": Kind(WEIGHTS, write_hugging_face, lambda path: read_weights(path.parent)),
    "index": Kind(INDEX, write_hugging_face, lambda path: read_weights(path.parent), False),
    "config": Kind("config.json", write_hugging_face, lambda p: read_weights(p.parent), False),
    "tokenizer": Kind("tokenizer.json", write_tokenizer, lambda p: read_tokenizer(p.parent), False),
    "adapter": Kind("adapter_model.safetensors", write_adapter, lambda p: read_adapter(p.parent)),
    "adapter config": Kind(
        "adapter_config.json", write_adapter, lambda path: read_adapter(path.parent), False
    ),
    "PyTorch": Kind("a.pth", write_torch, read_torch),
    "PyTorch's safetensors": Kind("a.safetensors", write_torch, read_torch),
    "CF checkpoint": Kind("a.npz", write_torch, read_cf),
    "lists": Kind("lists.npz", write_lists, read_lists),
    "JSON": Kind("config.json", write_hugging_face, read_fields, False),
}


def mutate(content: bytes, arrays: list[range], choose: random.Random) -> bytes:
    """One mutation, mostly outside of the bytes of arrays."""
    outside = sorted({*range(len(content))} - {at for part in arrays for at in part})
    places = outside if choose.random() < 0.9 else range(len(content))
    at, other = sorted((choose.choice(places), choose.choice(places)))
    fields = [one.span() for one in re.finditer(rb'[\d.]+|"[^"]*"|true|false|null', content)]
    how = choose.choice(["flip", "byte", "number", "swap", "cut", "value"])
    mutant = bytearray(content)
    if how == "value" and content.startswith(b"{"):
        start, stop = choose.choice(fields)
        mutant[start:stop] = choose.choice(VALUES).encode()
        return bytes(mutant)
    if how == "number":
        width = choose.choice([4, 8])
        mutant[at : at + width] = (choose.choice(NUMBERS) % 256**width).to_bytes(width, "little")
    elif how == "swap" and at + 8 <= other <= len(content) - 8:
        mutant[at : at + 8], mutant[other : other + 8] = (
            mutant[other : other + 8],
            mutant[at : at + 8],
        )
    elif how == "cut":
        del mutant[at:]
    elif how == "byte":
        mutant[at] = choose.randrange(256)
    else:
        mutant[at] ^= 1 << choose.randrange(8)
    return bytes(mutant[: len(content)])


def problems(name: str, count: int, seed: int) -> Iterator[str]:
    """What is wrong with the reading of `count` mutants of a kind."""
    kind, choose = KINDS[name], random.Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        kind.write(Path(folder))
        path = Path(folder, kind.file)
        content, original = path.read_bytes(), kind.read(path)
        places = {}
        for array, values in original.items() if kind.arrays else ():
            start = content.index(data := values.tobytes())
            places[array] = slice(start, start + len(data))
        ranges = [range(place.start, place.stop) for place in places.values()]
        for number in range(count):
            mutant = mutate(content, ranges, choose)
            path.write_bytes(mutant)
            began, what = time.monotonic(), f"{name} {number}"
            try:
                arrays = kind.read(path)
            except UserError as error:
                if "\n" in str(error) or folder not in str(error):
                    yield f"{what}: {error}"
            except BaseException:
                yield f"{what}: {traceback.format_exc()}"
            else:
                for array, values in arrays.items():
                    expected = original[array].tobytes(), original[array].shape
                    data = mutant[places[array]] if array in places else expected[0]
                    if (values.tobytes(), values.shape) != (data, expected[1]):
                        yield f"{what}: {array} is read as other numbers"
            if (seconds := time.monotonic() - began) > SECONDS:
                yield f"{what}: takes {seconds:.1f} s"


def read_all(count: int, seed: int, report: str) -> None:
    """Writes to a file what is wrong with mutants of all kinds, read in bounded memory."""
    found = [one for name in KINDS for one in problems(name, 0, seed)]  # so all code is loaded
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    found += [one for name in KINDS for one in problems(name, count, seed)]
    Path(report).write_text("\n".join(found))


if __name__ == "__main__":
    read_all(int(sys.argv[1]), int(sys.argv[2]), "/dev/stdout")
