"""Semantic ids in prompts: those of the items, and the rows of their tokens in a pretrained LLM."""

from typing import TYPE_CHECKING

import jax

from tca4rec_jax.data.templates import shows_ids
from tca4rec_jax.llm.vocabulary import NewRows, init_new_rows
from tca4rec_jax.semantic_ids.ids import SemanticIds, catalogue_ids, ids_path

if TYPE_CHECKING:
    from tca4rec_jax.experiment import Experiment
    from tca4rec_jax.experiment_inputs import ExperimentInputs

_STREAM = 2000  # tells the random numbers of new rows from those of adapters and a projector


def item_ids(inputs: "ExperimentInputs") -> SemanticIds | None:
    """The items' semantic ids, if prompts show them. Raises UserError as `catalogue_ids`."""
    config = inputs.config
    if not shows_ids(config.prompt):
        return None
    path = ids_path(config.ids.path, inputs.workdir)
    return catalogue_ids(path, inputs.data.catalogue)


def first_new_rows(experiment: "Experiment") -> NewRows | None:
    """The rows of new tokens before the first step, if the LLM lacks any."""
    tokens, (architecture, params) = experiment.new_tokens, experiment.pretrained
    if not tokens:
        return None
    tables = {name: params[name] for name in ("embedding", "lm_head") if name in params}
    key = jax.random.fold_in(jax.random.key(experiment.config.seed), _STREAM)

    def fresh(tables, key):
        rows = init_new_rows(architecture, len(tokens), tables, key)
        return {"new_rows": {"tables": rows}}

    made = experiment.compute(fresh, tables, key)["new_rows"]["tables"]
    return NewRows(architecture, tokens.start, made)
