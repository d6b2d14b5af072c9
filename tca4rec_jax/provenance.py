"""What an artefact of a work directory was made from, and whether that is what is here now.

Whoever writes an artefact (prepared data, a CF model, a logits store, hidden states, an LLM run,
rankings, an export, a file of recommendations) writes a `Provenance` with it: in its folder as
provenance.json, or inside its own file. Whoever reads the artefact compares the inputs that it
relies on with those that are here now, and refuses a stale one in one line.

An input is a config field, by its dotted name, or the content hash of something that was read. What
only changes where or how fast a thing is made is no input.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import fingerprint, write_text

FILE = "provenance.json"
_PACKAGES = ("tca4rec-jax", "jax", "flax", "optax")
_SHOWN = 4  # differences in a message
_HASH, _SHORT = 64, 12  # hex digits of a SHA-256, and of one in a message


class StaleError(UserError):
    """An artefact that was made from other inputs than those that are here, or does not say."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What an artefact was made from.

    Attributes:
      artefact: what it is, for messages: 'prepared data', 'LLM run'.
      command: what makes it anew, for messages: 'launch/train.py'.
      inputs: JSON values by name; nested mappings become dotted names.
      versions: of the packages that made it, for people: they are not compared.
    """

    artefact: str
    command: str
    inputs: Mapping[str, Any]
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: _versions())

    def __post_init__(self):
        inputs = json.loads(json.dumps(dict(flatten(self.inputs))))  # tuples become lists
        object.__setattr__(self, "inputs", inputs)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the inputs: one name for all of them."""
        return fingerprint(self.inputs)

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path | str) -> "Provenance":
        """Raises StaleError, naming `where`, for a text that `to_json` did not write."""
        try:
            fields = json.loads(text)
        except (RecursionError, ValueError) as error:
            raise StaleError(f"{where} is damaged ({error}): make it anew") from error
        return cls.from_fields(fields, where)

    @classmethod
    def from_fields(cls, fields: Any, where: Path | str) -> "Provenance":
        """From what `dataclasses.asdict` gave and a JSON file kept; raises as `from_json`."""
        try:
            return cls(**fields)
        except (AttributeError, TypeError, ValueError) as error:
            raise StaleError(f"{where} is damaged ({error}): make it anew") from error

    def save(self, folder: Path) -> None:
        """Writes provenance.json into the artefact's folder, whole or not at all."""
        write_text(folder / FILE, self.to_json())

    @classmethod
    def load(cls, folder: Path) -> "Provenance":
        """Reads an artefact's provenance.json.

        Raises StaleError if there is none (an artefact of before, or not one of this project), or
        if it is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            raise StaleError(f"{folder} does not say what it was made from (no {FILE})")
        return cls.from_json(path.read_text("utf-8"), path)

    def differences(self, now: Mapping[str, Any]) -> list[str]:
        """In words, the inputs among those of `now` that were others when this was made.

        One that is None says that something is not used: it need not have been recorded.
        """
        here = Provenance(self.artefact, self.command, now).inputs
        return [
            f"{name} was {short(self.inputs.get(name, 'not recorded'))}, is {short(value)}"
            for name, value in here.items()
            if self.inputs.get(name) != value
        ]

    def check(self, now: Mapping[str, Any], where: Path | str) -> None:
        """Raises StaleError, with what differs and what to do, unless `now` agrees.

        Args:
          now: the inputs that the reader relies on, as they are here now; others do not matter.
          where: the artefact's path, for the message.
        """
        found = self.differences(now)
        if found:
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise StaleError(
                f"{where}: this {self.artefact} was made from other inputs: "
                f"{'; '.join(found[:_SHOWN])}{more}. Give these back, or make it anew with "
                f"{self.command}"
            )


def flatten(inputs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested mappings; an empty mapping is a value."""
    for name, value in inputs.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def short(value: Any) -> str:
    """An input as a message shows it: the first digits of a hash."""
    is_hash = isinstance(value, str) and len(value) == _HASH
    return value[:_SHORT] if is_hash else repr(value)


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a checkout on the path
            versions[package] = "unknown"
    return versions
