"""What lists of recommendations are made from: provenance."""

from collections.abc import Sequence
from typing import Any

from tca4rec_jax.decoding.beam_search import ScoreWeights
from tca4rec_jax.experiment import Experiment


def list_inputs(
    experiment: Experiment, name: str, weights: Sequence[ScoreWeights]
) -> dict[str, Any]:
    """What an LLM's lists, one for each of the weights, depend on besides rows and CF logits.

    `name` is a run that may be taken (Experiment.check_run), '' the pretrained LLM.
    """
    inputs = experiment.inference_inputs | experiment.search_inputs(weights)
    if not name:
        return {field: value for field, value in inputs.items() if field != "lora"}
    made_from = experiment.runs[name].made_from.fingerprint
    return inputs | {"run.made_from": made_from, "run.step": experiment.run_step(name)}
