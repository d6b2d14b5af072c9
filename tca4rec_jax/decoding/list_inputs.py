"""What lists of recommendations are made from: provenance."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tca4rec_jax.config import build
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.experiment import Experiment


def list_inputs(
    experiment: Experiment, name: str, weights: Sequence[ScoreWeights]
) -> dict[str, Any]:
    """What an LLM's lists, one for each of the weights, depend on besides rows and CF logits.

    `name` is a run that may be taken (Experiment.check_run), '' the pretrained LLM.
    """
    inputs = experiment.inference_inputs | {
        "decoding": dataclasses.asdict(build(SearchConfig, experiment.config.decoding)),
        "weights of scores": [one if one.guidance else one._replace(beta=1) for one in weights],
        "allowed items": experiment.item_filter.content_hash(),
    }
    if not name:
        return {field: value for field, value in inputs.items() if field != "lora"}
    made_from = experiment.runs[name].made_from.fingerprint
    return inputs | {"run.made_from": made_from, "run.step": experiment.run_step(name)}
