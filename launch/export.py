"""Writes a trained LLM for PEFT or transformers:

    python launch/export.py --workdir=runs/x --run=aligned \\
        --format=merged --output=exported [--dtype=bfloat16]
    python launch/export.py ... --format=peft --base_model=meta-llama/Llama-3.2-3B
    python launch/export.py ... --format=gguf --output=exported --push=me/recommender

Reads the run's checkpoints and WORKDIR/data. Writes the new folder OUTPUT: with `peft` the
adapters, with `merged` the whole model, with `gguf` the same for llama.cpp, with `base` the model
without adapters, which `peft` is loaded on; README.md is its model card, with the results in
WORKDIR if they are of this checkpoint. A projector of CF vectors is written with all but `base`;
with the whole model the catalogue for other engines: trie.npz, trie_logits_processor.py. --push
uploads the folder to the Hugging Face Hub, into a private repository unless it exists.
"""

from functools import partial
from pathlib import Path

from absl import flags

from tca4rec_jax.config import run_name, score_weights
from tca4rec_jax.decoding.trie_export import lists_elsewhere, write_trie
from tca4rec_jax.evaluation.model_card import (
    check_repository,
    evaluated,
    model_card,
    push,
    write_card,
)
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.launching import DEFINE_field, launch
from tca4rec_jax.lease import only_writer
from tca4rec_jax.llm.checkpoints.export import (
    DTYPES,
    LOADING,
    WHOLE,
    check_kind,
    check_vacant,
    export_decoder,
)
from tca4rec_jax.llm.checkpoints.gguf_export import check_gguf
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.ranges import LocalPath
from tca4rec_jax.recommenders.vectors import describe_vectors
from tca4rec_jax.reporting import show

_FORMAT = flags.DEFINE_enum("format", None, list(LOADING), "What is written.", required=True)
_BASE_MODEL = flags.DEFINE_string("base_model", None, "What peft's adapters name as their base.")
_OUTPUT = DEFINE_field("output", LocalPath, None, "A new or empty folder.", required=True)
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the weights; adapters are float32.")
_PUSH = flags.DEFINE_string("push", None, "NAME or USER/NAME on the Hugging Face Hub.")


def export(config, workdir):
    """Loads the run's checkpoint and writes what --format says to --output."""
    check_vacant(_OUTPUT.value)  # loading takes long
    if _PUSH.value:
        check_repository(_PUSH.value)
    experiment, name = Experiment(config, workdir), run_name(config)
    run = experiment.check_run(name)
    adapters, new_rows = config.llm.train == "lora", bool(experiment.new_tokens)
    check_kind(_FORMAT.value, adapters=adapters, new_rows=new_rows)
    inputs = {"format": _FORMAT.value, "dtype": _DTYPE.value, "run": run.made_from.inputs}
    inputs |= {"run.name": name, "run.step": experiment.run_step(name)}
    inputs |= {"lists": experiment.search_inputs([score_weights(config, 0.0)])}
    if _FORMAT.value == "gguf":
        check_gguf(experiment.stored_architecture, experiment.tokenizer)
    has_catalogue = _FORMAT.value in WHOLE and lists_elsewhere(experiment)
    made_from = Provenance("export", "launch/export.py", inputs)
    card = _card(experiment, run, has_catalogue)
    with only_writer(_OUTPUT.value):
        how_to_load = export_decoder(
            _OUTPUT.value,
            experiment.trained_decoder(name),
            experiment.tokenizer,
            kind=_FORMAT.value,
            dtype=_DTYPE.value,
            base_model=_BASE_MODEL.value or _base_model(config.llm.weights),
            vectors=describe_vectors(experiment),
            beside=partial(_write_beside, experiment, card, has_catalogue, made_from),
        )
    show(_OUTPUT.value, f"load it with {how_to_load}")
    if _PUSH.value:
        show(push(Path(_OUTPUT.value), _PUSH.value))


def _card(experiment, run, has_catalogue):
    """The model card; no weight is needed."""
    name, kind, made_from = run.path.name, _FORMAT.value, run.made_from
    return model_card(
        kind,
        name,
        made_from,
        evaluated(experiment.workdir, name, made_from, experiment.run_step(name)),
        base_model=_BASE_MODEL.value,
        items=experiment.data.catalogue.num_items,
        load=LOADING[kind].format(folder="."),
        catalogue=has_catalogue,
    )


def _write_beside(experiment, card, has_catalogue, made_from, folder):
    """The model card, the catalogue for engines that run the whole model, and the provenance."""
    if has_catalogue:
        write_trie(experiment, folder)
    write_card(folder, card)
    made_from.save(folder)


def _base_model(weights: str) -> str | None:
    """The weights' folder; a file, or a name of ours, is nothing that peft could load."""
    return weights if Path(weights).is_dir() else None


if __name__ == "__main__":
    reads = ["data", "llm", "run"]
    launch(export, "export", reads=reads, writes=[_OUTPUT, _PUSH], config_of="run")
