"""A projector as a safetensors file: the state of the `torch.nn.Sequential` that computes it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tca4rec_jax.errors import UserError, reading
from tca4rec_jax.llm.checkpoints.hugging_face import stored_tensors
from tca4rec_jax.llm.config import check_shapes
from tca4rec_jax.llm.projector import Projector, ProjectorConfig, projector_shapes

PROJECTOR, README = "projector.safetensors", "README.md"
_TORCH = {"gelu": "torch.nn.GELU()", "relu": "torch.nn.ReLU()"}
_ACTIVATION = "activation"  # in the file's metadata

_TEXT = """# A projector of CF vectors

`{file}` maps vectors of width {inputs} to what the LLM reads in the place of the
embeddings of the placeholder, token {token} ({text!r}). It was trained on
{vectors}.

```python
import torch
from safetensors.torch import load_file

projector = torch.nn.Sequential({layers})
projector.load_state_dict(load_file("{file}"))
embeddings = llm.get_input_embeddings()(tokens)[0]  # tokens [1, length] of a prompt
embeddings[tokens[0] == {token}] = projector(vectors).to(embeddings.dtype)  # in their order
llm(inputs_embeds=embeddings[None])
```
{note}
The prompt, whose `{{vector}}` and `{{user}}` are placeholders:

    {template!r}
    each item: {item!r}
"""


def write_projector(folder: Path, projector: Projector, readme: Mapping[str, object]) -> None:
    """Writes projector.safetensors (float32), and a README.md that says how to use it elsewhere.

    `readme` has what the README says of the prompt: token, text, template, item; of the vectors;
    and a note, perhaps empty.
    """
    config, shapes = projector.config, {}
    tensors = {}
    for index in range(config.layers):
        weight = np.asarray(projector.layers[f"weight_{index}"][...], np.float32)
        tensors[f"{2 * index}.weight"] = np.ascontiguousarray(weight.T)
        tensors[f"{2 * index}.bias"] = np.asarray(
            projector.layers[f"bias_{index}"][...], np.float32
        )
        shapes[index] = weight.shape
    metadata = {"format": "pt", _ACTIVATION: config.activation}
    save_file(tensors, folder / PROJECTOR, metadata=metadata)
    between = f", {_TORCH[config.activation]}, "
    layers = between.join(f"torch.nn.Linear({i}, {o})" for i, o in shapes.values())
    given = {"file": PROJECTOR, "inputs": projector.inputs, "layers": layers}
    (folder / README).write_text(_TEXT.format(**given, **readme), encoding="utf-8")


def read_projector(
    path: str | Path, config: ProjectorConfig, inputs: int, outputs: int
) -> dict[str, np.ndarray]:
    """The parameters, float32 by name as `projector_shapes`, that `write_projector` wrote.

    Raises UserError, naming the file, for one that is missing or damaged, and for vectors or an LLM
    of another width, or another config than it was made for.
    """
    path, shapes = Path(path), projector_shapes(config, inputs, outputs)
    names = {
        name: f"{2 * int(index)}.{part}" for name in shapes for part, index in [name.split("_")]
    }
    expected = {names[name]: shape[::-1] for name, shape in shapes.items()}
    stored = stored_tensors(path)
    with reading(path, "safetensors file"), safe_open(path, framework="np") as file:
        activation = (file.metadata() or {}).get(_ACTIVATION, config.activation)
    if activation != config.activation:
        raise UserError(
            f"{path} has the activation {activation!r}, but projector.activation is "
            f"{config.activation!r}"
        )
    first = stored.get("0.weight")
    if first is not None and first.shape[1:] != (inputs,):
        raise UserError(
            f"{path} takes vectors of width {first.shape[-1]}, but those here have {inputs}: give "
            "the CF vectors that it was trained with"
        )
    check_shapes(f"{path}: tensors", stored, expected)
    everything = slice(None), slice(None)
    return {
        name: stored[names[name]].read(everything[: len(shape)]).astype(np.float32).T
        for name, shape in shapes.items()
    }
