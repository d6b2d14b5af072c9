"""The model card of an exported run, and its way to the Hugging Face Hub.

A card is a README.md with fields that the Hub reads (huggingface_hub.ModelCardData); its numbers
are those of results.json, its settings those of the run's provenance.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from tca4rec_jax.config import config_fields, config_value, default_config
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import read_json
from tca4rec_jax.provenance import Provenance, StaleError

README = "README.md"
_LIBRARIES = {"merged": "transformers", "base": "transformers", "peft": "peft", "gguf": "gguf"}
_HASH = 64  # hex digits
_TEXT = """# {name}

{what} of {items} items: an LLM that was trained with `tca4rec_jax` to write the next one{softened}.

Load it with `{load}`.{catalogue}

## Results

{results}

## Settings

What differs from the defaults of `tca4rec_jax`:

{settings}

What it was made from (SHA-256): {hashes}. Made by {versions}.
"""
_CATALOGUE = """

`trie.npz` and `trie_logits_processor.py` hold its lists to the catalogue in transformers, vLLM and
SGLang: `recommend(Trie(), transformers_scores(model), history, k=10)`."""
_SOFTENED = """, from labels that a
collaborative-filtering model softens (TCA4Rec, [arXiv 2601.18457](https://arxiv.org/abs/2601.18457))"""
_NOT_EVALUATED = "This checkpoint was not evaluated."


class Evaluated(NamedTuple):
    """What an evaluation says of a run."""

    results: Mapping[str, Any]  # results.json
    table: str  # results.md


def evaluated(folder: Path, run: str, made_from: Provenance, step: int) -> Evaluated | None:
    """The evaluation in a folder if it is of this run and step; None, with a warning, else."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    results = read_json(path, remedy="evaluate again")
    try:
        of_results = Provenance.from_fields(results.get("provenance"), path)
        lists = f"lists.{run}.run"
        of_results.check({f"{lists}.made_from": made_from.fingerprint, f"{lists}.step": step}, path)
    except StaleError as error:
        logging.warning("The model card has no results: %s", error)
        return None
    return Evaluated(results, path.with_suffix(".md").read_text("utf-8"))


def model_card(
    kind: str,
    run: str,
    made_from: Provenance,
    evaluation: Evaluated | None,
    *,
    base_model: str | None,
    items: int,
    load: str,
    catalogue: bool,
) -> str:
    """The text of README.md.

    kind: of the export; made_from: the run's; items: of its catalogue; load: what loads the export;
    catalogue: whether the catalogue lies beside it.
    """
    inputs, known = made_from.inputs, config_fields()
    default = default_config()
    settings = [
        f"- `{name}`: {value!r}"
        for name, value in inputs.items()
        if name in known and value != _plain(config_value(default, name))
    ]
    hashes = [
        f"{name} `{value}`"
        for name, value in inputs.items()
        if name not in known and isinstance(value, str) and len(value) == _HASH
    ]
    data = ModelCardData(
        model_name=run,
        library_name=_LIBRARIES[kind],
        base_model=base_model,
        tags=["recommendation", "tca4rec"],
        eval_results=_eval_results(run, evaluation) or None,
    )
    text = _TEXT.format(
        name=run,
        what="Adapters of a recommender" if kind == "peft" else "A recommender",
        items=items,
        softened=_SOFTENED * any(map(inputs.get, ("objective.alpha", "objective.alpha_last"))),
        load=load,
        catalogue=_CATALOGUE * catalogue,
        results=evaluation.table.strip() if evaluation else _NOT_EVALUATED,
        settings="\n".join(settings) or "Nothing.",
        hashes=", ".join(hashes),
        versions=", ".join(f"{name} {version}" for name, version in made_from.versions.items()),
    )
    return f"---\n{data.to_yaml().strip()}\n---\n\n{text}"


def write_card(folder: Path, card: str) -> None:
    """Writes README.md; what is there already follows the card."""
    path = folder / README
    more = f"\n{path.read_text('utf-8')}" if path.exists() else ""
    path.write_text(card + more, encoding="utf-8")


def _eval_results(run: str, evaluation: Evaluated | None) -> list[EvalResult]:
    """Means of the run's metrics without guidance: what is exported has none."""
    if evaluation is None:
        return []
    results = evaluation.results
    labels = [
        label
        for label, of_run, guidance in results["provenance"]["inputs"]["compared.variants"]
        if of_run == run and not guidance
    ]
    about = {
        "task_type": "other",
        "task_name": "Sequential recommendation",
        "dataset_type": results["config"]["data"]["source"],
        "dataset_name": results["config"]["data"]["source"],
        "dataset_split": results["split"],
    }
    found = results["models"][labels[0]][f"by {results['hits']}"] if labels else {}
    return [
        EvalResult(**about, metric_type=name, metric_value=round(value["mean"], 4))
        for name, value in found.items()
    ]


def _plain(value: Any) -> Any:
    """As JSON keeps it."""
    return list(value) if isinstance(value, tuple) else value


def check_repository(name: str) -> None:
    """Raises UserError for what is no NAME or USER/NAME of the Hub, or without a login there."""
    try:
        validate_repo_id(name)
        HfApi().whoami()
    except HFValidationError as error:
        raise UserError(f"--push={name}: {error}") from error
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(f"--push={name}: {error}; log in with `hf auth login`") from error


def push(folder: Path, name: str) -> str:
    """Uploads a folder to a repository of the Hub, which is made, private, if it is not there.

    Returns its address. Raises UserError, with what to do, if that fails.
    """
    api = HfApi()
    try:
        made = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=os.fspath(folder))
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{folder} is whole, but could not be pushed to {name}: {error}; try again with "
            f"`hf upload {name} {folder}`"
        ) from error
    return str(made)
