"""tca4rec COMMAND --config=CONFIG --workdir=FOLDER ...  (in a checkout: python launch COMMAND ...)

A command is a script of the folder launch/: `tca4rec train` is `python launch/train.py`, and
`tca4rec COMMAND --help` lists its flags. Where CONFIG is no file, it may name a config that was
installed too: `configs/quickstart.py:debug`, or only `quickstart:debug`.
"""

import ast
import runpy
import sys
from pathlib import Path

SCRIPTS = {path.stem: path for path in sorted(Path(__file__).parent.glob("[!_]*.py"))}
CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    """Runs the command that sys.argv names, as `python launch/<command>.py` would."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_help())
    elif command in SCRIPTS:
        sys.argv = [str(SCRIPTS[command]), *_with_shipped_config(arguments)]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.exit(f"tca4rec: there is no command {command}: expected one of {', '.join(SCRIPTS)}")


def _help() -> str:
    """Every command with the first line of its docstring, and the configs."""
    lines = [__doc__ or "", "commands:"]
    for name, path in SCRIPTS.items():
        about = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines.append(f"  {name:17} {about.splitlines()[0].rstrip('.:')}")
    configs = sorted(CONFIGS.rglob("*.py"))
    names = ", ".join(str(path.relative_to(CONFIGS).with_suffix("")) for path in configs)
    return "\n".join([*lines, f"\nconfigs in {CONFIGS}:", f"  {names}"])


def _with_shipped_config(arguments: list[str]) -> list[str]:
    """The arguments, with the path of a shipped config where --config or --grid has its name."""
    found: list[str] = []
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag in ("--config", "--grid") and value:
            argument = f"{flag}={_path(value)}"
        elif found[-1:] in (["--config"], ["--grid"]):
            argument = _path(argument)
        found.append(argument)
    return found


def _path(config: str) -> str:
    """`name` or `configs/<name>.py`, with or without `:argument`, as the path of a file."""
    name, colon, argument = config.partition(":")
    shipped = CONFIGS / f"{name.removeprefix('configs/').removesuffix('.py')}.py"
    if Path(name).is_file() or not shipped.is_file():
        return config
    return f"{shipped}{colon}{argument}"


if __name__ == "__main__":
    main()
