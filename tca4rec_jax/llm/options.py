"""How a decoder's layers run: loops, rematerialisation, attention, weights that are spread out."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.attention import IMPLEMENTATIONS


def _as_stored(path: str, weight: jax.Array) -> jax.Array:
    return weight


@dataclass(frozen=True)
class DecoderOptions:
    """How the layers run, not what they compute.

    Attributes:
      layer_loop: 'scan' compiles one layer, 'unroll' all of them (slower to compile).
      remat: what is kept for the backward pass: with 'none' every activation, with 'products' the
        results of matrix products, from which the elementwise rest is computed again (less memory,
        and on CPU no slower), with 'full' only each layer's input.
      attention: of whole sequences: 'xla', 'cudnn' (GPU) or 'splash' (TPU); the two kernels cannot
        run a model whose layers differ in their sliding window.
      whole: (path, weight) -> the weight, where it is about to be used: what puts a matrix
        together of which every device holds a part (a layer's without the layer axis). Of a layer
        it is done again in the backward pass, unless remat is 'none'.
    """

    layer_loop: str = "scan"
    remat: str = "products"
    attention: str = "xla"
    whole: Callable[[str, jax.Array], jax.Array] = _as_stored

    def __post_init__(self):
        if self.layer_loop not in ("scan", "unroll"):
            raise UserError(f"layer_loop must be 'scan' or 'unroll', got {self.layer_loop!r}")
        if self.remat not in ("none", "products", "full"):
            raise UserError(f"remat must be 'none', 'products' or 'full', got {self.remat!r}")
        if self.attention not in IMPLEMENTATIONS:
            raise UserError(f"attention must be in {IMPLEMENTATIONS}, got {self.attention!r}")
