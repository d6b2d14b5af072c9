"""The table's labels."""

import pytest

from tca4rec_jax.config import default_config
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.evaluate import table_labels


def make_evaluation(variants, differences=()):
    evaluation = default_config().evaluation
    evaluation.variants, evaluation.differences = variants, differences
    return evaluation


def test_the_table_begins_with_what_every_model_is_compared_to():
    variants = (("LLM", "run", 0.0), ("guided", "run", 1.0))
    evaluation = make_evaluation(variants, (("guided", "CF model"),))
    assert table_labels(evaluation) == ["Most popular", "CF model", "LLM", "guided"]


@pytest.mark.parametrize("label", ["LLM", "CF model", "Most popular"])
def test_two_rows_of_one_label_are_refused(label):
    variants = (("LLM", "run", 0.0), (label, "other", 0.0))
    with pytest.raises(UserError, match=f"evaluation.variants: the label '{label}' .* two rows"):
        table_labels(make_evaluation(variants))


def test_a_difference_of_what_is_not_in_the_table_is_refused():
    evaluation = make_evaluation((("LLM", "run", 0.0),), (("LLM", "aligned"),))
    with pytest.raises(UserError, match=r"evaluation.differences names \['aligned'\]"):
        table_labels(evaluation)
