"""launch/Dockerfile, of which no image is built here: what it names is there.

That launch/setup.sh needs no file but those copied before it is what test_setup.py runs.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
STEPS = [line.split() for line in LINES if line and not line.startswith("#")]
SETUP = (ROOT / "launch" / "setup.sh").read_text()


def at(start):
    """The place of the one step that begins so."""
    (found,) = [place for place, step in enumerate(STEPS) if " ".join(step).startswith(start)]
    return found


def test_the_environment_is_made_of_what_was_copied_by_a_user_that_may():
    setup = at("RUN JAX_EXTRA=$JAX_EXTRA setup_also=$ALSO bash launch/setup.sh ")
    copies = [(place, *step[1:]) for place, step in enumerate(STEPS) if step[0] == "COPY"]
    assert {one[2] for one in copies if one[0] < setup} == {"launch/setup.sh", "launch/locks"}
    assert copies[-1][2:] == (".", ".")
    for _, owner, source, target in copies:
        assert owner == "--chown=tca4rec"
        here = ROOT / source
        assert here.exists()
        assert target in (".", "launch/" if here.is_file() else source)
    assert at("RUN useradd --create-home --uid=1000 tca4rec ") < at("USER tca4rec") < setup
    assert "--owner=tca4rec /app" in " ".join(STEPS[at("RUN useradd")])
    assert at("WORKDIR /app") < copies[0][0]


def test_what_can_be_chosen_is_what_setup_knows():
    defaults = dict(step[1].split("=") for step in STEPS if step[0] == "ARG")
    assert defaults == {"JAX_EXTRA": "tpu", "ALSO": ""}
    assert "${JAX_EXTRA-" in SETUP
    assert "${setup_also:-}" in SETUP
    (supported,) = re.findall(r"\((3, \d+)\) <= v <= \((3, \d+)\)", SETUP)
    oldest, newest = (int(one.split(", ")[1]) for one in supported)
    assert oldest <= int(re.fullmatch(r"python:3\.(\d+)-slim", STEPS[0][1])[1]) <= newest


def test_every_build_that_is_named_has_its_locks():
    files = [ROOT / "launch/Dockerfile", ROOT / "docs/serving.md", *(ROOT / "launch").glob("gke*")]
    named = [
        pair for file in files for pair in re.findall(r"--build-arg=(\w+)=(\w*)", file.read_text())
    ]
    assert {name for name, _ in named} == {"JAX_EXTRA", "ALSO"}
    for value in {value for _, value in named} | {"cuda12", "cuda13", "tpu"}:
        assert not value or (ROOT / "launch" / "locks" / f"{value}.txt").is_file()
