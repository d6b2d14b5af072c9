"""The card of an exported run, and its way to the Hub, which is not there."""

import json

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation import model_card as hub
from tca4rec_jax.evaluation.model_card import Evaluated, evaluated, model_card, push, write_card
from tca4rec_jax.provenance import Provenance

RUN = Provenance(
    "LLM run",
    "launch/train.py",
    {"objective.alpha": 0.3, "seed": 0, "prompt.end": "\n", "weights": "a" * 64},
    {"jax": "1.2"},
)
RESULTS = {
    "split": "test",
    "hits": "item",
    "config": {"data": {"source": "movielens_100k"}},
    "models": {
        "LLM": {"by item": {"hr@10": {"mean": 0.123456, "low": 0.1, "high": 0.2}}},
        "guided": {"by item": {"hr@10": {"mean": 0.5, "low": 0.4, "high": 0.6}}},
    },
    "provenance": {
        "artefact": "evaluation",
        "command": "launch/evaluate.py",
        "inputs": {
            "compared.variants": [["guided", "aligned", 1.0], ["LLM", "aligned", 0.0]],
            "lists.aligned.run.made_from": RUN.fingerprint,
            "lists.aligned.run.step": 250,
        },
    },
}
HOW = {"base_model": "me/base", "items": 12, "load": "load('.')", "catalogue": True}


def test_the_card_has_results_settings_and_what_the_run_was_made_from(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "results.md").write_text("| model | HR@10 |\n")
    found = evaluated(tmp_path, "aligned", RUN, 250)
    (tmp_path / "README.md").write_text("# A projector\n")
    write_card(tmp_path, model_card("peft", "aligned", RUN, found, **HOW))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "me/base")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("hr@10", 0.1235)
    assert (result.dataset_name, result.dataset_split) == ("movielens_100k", "test")
    for part in ("Adapters of a recommender of 12 items", "2601.18457", "load('.')",
                 "trie_logits_processor.py", "| model | HR@10 |", "- `objective.alpha`: 0.3\n",
                 f"weights `{'a' * 64}`", "jax 1.2", "# A projector"):  # fmt: skip
        assert part in card.content
    assert "`seed`" not in card.content  # the default


def test_results_of_another_checkpoint_are_left_out(tmp_path, caplog):
    assert evaluated(tmp_path, "aligned", RUN, 250) is None
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "results.md").write_text("")
    for run, step in (("plain", 250), ("aligned", 200)):
        assert evaluated(tmp_path, run, RUN, step) is None
        assert "The model card has no results" in caplog.messages[-1]
    (tmp_path / "results.json").write_text("{}")
    assert evaluated(tmp_path, "aligned", RUN, 250) is None
    how = HOW | {"base_model": None, "catalogue": False}
    card = model_card("gguf", "plain", Provenance("LLM run", "", {}), None, **how)
    assert "This checkpoint was not evaluated." in card
    assert "trie" not in card
    assert "2601.18457" not in card  # no CF model softened its labels
    assert ModelCard(card).data.eval_results is None
    assert Evaluated._fields == ("results", "table")


class FakeHub:
    """What is asked of the Hub."""

    calls: list = []
    error = None

    def __getattr__(self, name):
        def call(*args, **keywords):
            self.calls.append((name, args, keywords))
            if self.error:
                raise self.error
            return FakeHub.Made()

        return call

    class Made(str):
        repo_id = "me/recommender"

        def __str__(self):
            return "https://hub/me/recommender"


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(FakeHub, "error", None)
    return FakeHub.calls


def test_a_folder_is_pushed_to_a_private_repository(asked, tmp_path):
    assert push(tmp_path, "recommender") == "https://hub/me/recommender"
    assert asked == [
        ("create_repo", ("recommender",), {"private": True, "exist_ok": True}),
        ("upload_folder", (), {"repo_id": "me/recommender", "folder_path": str(tmp_path)}),
    ]


def test_what_cannot_be_pushed_is_said_before_and_after(asked, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--push=a b: Repo id"):
        hub.check_repository("a b")
    assert not asked
    hub.check_repository("me/recommender")
    monkeypatch.setattr(FakeHub, "error", LocalTokenNotFoundError("no token"))
    with pytest.raises(UserError, match=r"no token; log in with `hf auth login`"):
        hub.check_repository("me/recommender")
    monkeypatch.setattr(FakeHub, "error", ConnectionError("no route"))
    with pytest.raises(UserError, match=r"is whole, but could not .*`hf upload me/recommender /"):
        push(tmp_path, "me/recommender")
