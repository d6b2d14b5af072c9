"""LLM recommenders, each as the five choices that make one (docs/recommenders.md).

To add one, write a file beside generative.py with the choices that differ,

    CODES = dataclasses.replace(GENERATIVE, write_items=write_codes)

give it a name in RECOMMENDERS, and write a config that names it (`config.recommender.name`).
Neither the training loop, the training step, the decoder nor the beam search knows which
recommender it runs.
"""

from tca4rec_jax.errors import check_choice
from tca4rec_jax.recommenders.answer import ANSWER
from tca4rec_jax.recommenders.generative import GENERATIVE
from tca4rec_jax.recommenders.recipe import Recipe

RECOMMENDERS: dict[str, Recipe] = {"generative": GENERATIVE, "answer": ANSWER}


def recipe_of(name: str) -> Recipe:
    """The recipe of config.recommender.name. Raises UserError for a name without one."""
    check_choice("recommender.name", name, RECOMMENDERS)
    return RECOMMENDERS[name]
