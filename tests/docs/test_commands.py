"""Every command, flag and config field that README, docs and configs name exists."""

import ast
import os
import re
import runpy

import pages
import pytest
from forked import Script

from tca4rec_jax.config import SHORT_NAMES, apply_argument, config_value, default_config

CONFIGS = sorted((pages.ROOT / "configs").glob("*/*.py"))
_DEFINED = re.compile(r"DEFINE_(?:\w+)\(\s*\"(\w+)\"")
# Flags of other programs that the pages call or mention.
_FOREIGN = {"--local-dir", "--no-deps", "--strict", "--config-file", "--nodes", "--upgrade"}


def _flags(script) -> set[str]:
    """The flags of a launch script: its own, and those that every script has."""
    own = set(_DEFINED.findall(script.read_text()))
    shared = set(_DEFINED.findall((pages.ROOT / "tca4rec_jax/launching.py").read_text()))
    return own | (shared if "launching import" in script.read_text() else set())


ALL_FLAGS = set().union(*map(_flags, (pages.ROOT / "launch").rglob("*.py"))) | {"dry_run"}


def problems_of_command(words: list[str]) -> list[str]:
    """What is wrong with a command: a missing script, an unknown flag, field or value."""
    program, *arguments = words
    if program == "tca4rec":
        program, arguments = "python", [f"launch/{arguments[0]}.py", *arguments[1:]]
    if program.endswith("python") and arguments[0] == "-m":
        return []
    files = [a for a in arguments if re.match(r"(launch|configs|docs|tests|\.ci)/", a)]
    missing = [f"no file {name}" for name in files if not (pages.ROOT / name).exists()]
    if missing or not (program.endswith("python") and files[:1] and arguments[0].endswith(".py")):
        return missing
    known, found, config = _flags(pages.ROOT / arguments[0]), [], None
    if arguments[0].startswith("docs/"):
        return []
    for flag in arguments[1:]:
        name, _, value = flag.removeprefix("--").partition("=")
        if name == "config":
            config, problem = _config(value)
        elif name.startswith("config."):
            problem = _set(config, name.removeprefix("config."), value)
        else:
            problem = "" if flag.startswith("--") and name in known else f"unknown flag {flag}"
        found += [f"{arguments[0]}: {problem}"] if problem else []
    return found


def _config(value: str):
    """(the config, what is wrong with the file or its argument)."""
    name, _, argument = value.partition(":")
    if not (pages.ROOT / name).is_file():
        return default_config(), f"no config file {name}"
    get_config = runpy.run_path(str(pages.ROOT / name))["get_config"]
    try:
        return get_config(argument), ""
    except ValueError as error:
        return default_config(), str(error)


def _set(config, field: str, value: str) -> str:
    """Sets a field as a flag does; what is wrong with it."""
    try:
        kind = type(config_value(config, field))
        if kind not in (str, tuple, bool):
            apply_argument(config, f"{field}={value}")
    except (KeyError, AttributeError, ValueError, TypeError) as error:
        return f"--config.{field}={value}: {error}"
    return ""


def problems_of_quotes(text: str) -> list[str]:
    """Flags and fields in `backticks` that do not exist."""
    found, config = [], default_config()
    for quote in pages.quoted(text):
        for flag in re.findall(r"(?<![\w-])--[\w.-]+", quote):
            name = flag.removeprefix("--").split(".")[0]
            if name == "config" and "." in flag:
                quote = quote.replace("--config.", "")
            elif name not in ALL_FLAGS and flag not in _FOREIGN:
                found.append(f"no script has the flag {flag}")
        for field, value in re.findall(r"(?<![\w/.])((?:\w+\.)+\w+)(?:=([^\s`]+))?", quote):
            section, _, rest = field.partition(".")
            if section not in config or rest in ("py", "md", "json", "npz", "csv", "png"):
                continue
            try:
                kind = type(config_value(config, field))
            except (KeyError, AttributeError, TypeError):
                found.append(f"no config field {field}")
                continue
            if value and kind not in (tuple, bool) and value.isupper() is False:
                try:
                    apply_argument(default_config(), f"{field}={value.strip(chr(34))}")
                except ValueError as error:
                    found.append(str(error))
    return found


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_every_command_can_be_given(page):
    blocks = pages.code_blocks(page.read_text(), "bash")
    called = [words for block in blocks for words in pages.commands(block)]
    assert not [problem for words in called for problem in problems_of_command(words)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_command_of_a_config_can_be_given(path):
    """Of the configs in folders: what stands indented in their docstrings."""
    lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
    block = "\n".join(line[4:] for line in lines if line.startswith("    "))
    called = pages.commands(block)
    assert called
    assert not [problem for words in called for problem in problems_of_command(words)]


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_every_flag_and_field_exists(page):
    assert not problems_of_quotes(page.read_text())


def dry_run(words: list[str]) -> Script:
    """A launch script with the arguments of a command and --dry_run; it has begun."""
    _, script, *flags = [word.replace("configs/", f"{pages.ROOT}/configs/") for word in words]
    if not any(
        flag.startswith(("--config=", "--grid=")) for flag in flags
    ):  # that of a run, not here
        flags.append(f"--config={pages.ROOT}/configs/quickstart.py")
    return Script([str(pages.ROOT / script), *flags, "--dry_run"], dict(os.environ))


@pytest.mark.slow
def test_every_launch_script_takes_its_command():
    called = {
        tuple(words): page.name
        for page in pages.PAGES
        for block in pages.code_blocks(page.read_text(), "bash")
        for words in pages.commands(block)
        if re.fullmatch(  # the others have no --dry_run
            r"launch/(?!status|compare|\w+_report|\w+_merge)\w+\.py", words[1]
        )
    }
    assert len(called) > 15
    config = "--config=configs/quickstart.py"
    wrong = ("python", "launch/train.py", config, "--workdir=x", "--no_such_flag=5")
    started = [(words, dry_run(words)) for words in (*called, wrong)]
    done = {tuple(words): script.completed() for words, script in started}
    assert done.pop(wrong).returncode == 1
    failed = {(called[words], words): one.stderr for words, one in done.items() if one.returncode}
    assert not failed


def test_the_short_names_are_fields():
    for field in SHORT_NAMES.values():
        config_value(default_config(), field)


@pytest.mark.parametrize(
    "command",
    [
        "python launch/no_such_script.py",
        "python launch/train.py --config=configs/quickstart.py --no_such_flag=1",
        "python launch/train.py --config=configs/no_such_config.py",
        "python launch/train.py --config=configs/quickstart.py:no_such_field=1",
        "python launch/train.py --config=configs/quickstart.py --config.training.no_such_field=1",
        "python launch/train.py --config=configs/quickstart.py --config.training.steps=many",
        "for s in train no_such_script; do python launch/$s.py; done",
        "bash launch/no_such_script.sh",
        "tca4rec no_such_script --workdir=x",
        "tca4rec train --no_such_flag=1",
    ],
)
def test_a_wrong_command_is_found(command):
    (words, *more) = pages.commands(command)
    assert [problem for one in (words, *more) for problem in problems_of_command(one)]


@pytest.mark.parametrize(
    "text", ["`--no_such_flag`", "`training.no_such_field`", "`--config.cf.no_such=1`"]
)
def test_a_wrong_quote_is_found(text):
    assert problems_of_quotes(text)


def test_a_block_that_bash_cannot_read_is_found():
    with pytest.raises(AssertionError, match="syntax error|unexpected"):
        pages.commands("for s in a b; do python launch/$s.py")
