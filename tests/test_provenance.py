"""Provenance: what differs is said, what does not matter is not in the way."""

import pytest

from tca4rec_jax.provenance import FILE, Provenance, StaleError

INPUTS = {"llm": {"dtype": "float32", "layers": (1, 2)}, "data": "a" * 64, "seed": 0}


def record(**changes) -> Provenance:
    return Provenance("LLM run", "launch/train.py", INPUTS | changes)


def test_it_comes_back_from_its_folder(tmp_path):
    record().save(tmp_path)
    assert Provenance.load(tmp_path) == record()


def test_nested_inputs_become_dotted_names():
    assert record().inputs == {
        "llm.dtype": "float32",
        "llm.layers": [1, 2],
        "data": "a" * 64,
        "seed": 0,
    }


def test_equal_inputs_pass_also_a_part_of_them():
    record().check(INPUTS, "run")
    record().check({"llm": {"layers": [1, 2]}}, "run")
    record().check({"new": None}, "run")  # what is not used need not have been recorded


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"llm": {"dtype": "bfloat16"}}, "llm.dtype was 'float32', is 'bfloat16'"),
        ({"data": "b" * 64}, f"data was {'a' * 12}, is {'b' * 12}"),
        ({"new": 1}, "new was 'not recorded', is 1"),
    ],
)
def test_what_differs_is_said_with_the_way_out(now, said):
    with pytest.raises(StaleError) as error:
        record().check(now, "runs/x/llm/a")
    assert "runs/x/llm/a: this LLM run was made from other inputs" in str(error.value)
    assert said in str(error.value)
    assert "launch/train.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_long_list_of_differences_is_cut():
    with pytest.raises(StaleError, match="; and 3 more"):
        record().check({f"field{n}": n for n in range(7)}, "run")


def test_the_fingerprint_is_of_the_inputs_alone():
    assert record().fingerprint == Provenance("x", "y", INPUTS).fingerprint
    assert record().fingerprint != record(seed=1).fingerprint


def test_no_record_is_an_error(tmp_path):
    with pytest.raises(StaleError, match="does not say what it was made from"):
        Provenance.load(tmp_path)


NO_INPUTS = '{"artefact": "x", "command": "y", "inputs": 1}'


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"artefact": "x"}', '{"more": 1}', "[" * 10**5, NO_INPUTS]
)
def test_a_damaged_record_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(StaleError, match=FILE):
        Provenance.load(tmp_path)
