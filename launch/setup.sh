#!/usr/bin/env bash
# Makes .venv from requirements.txt, or brings it up to date; sourced by the other scripts.
# PYTHON chooses the interpreter (CPython 3.11 or newer), JAX_EXTRA=tpu or cuda12 adds what that
# accelerator needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: $python is $("$python" --version 2>&1), but CPython 3.11 or newer is needed; set PYTHON" >&2
  exit 1
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
extra="${JAX_EXTRA:-$(cat .venv/jax_extra 2>/dev/null || true)}"
wanted="$(cat requirements.txt pyproject.toml | sha256sum) $extra"
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "setup: installing requirements.txt into .venv (about a minute)"
  # --no-compile: Python compiles the few modules that are imported.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
    -r requirements.txt ${extra:+"jax[$extra]"}
  # The same as `pip install -e .`, which takes five seconds.
  pwd > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tca4rec_jax.pth"
  echo "$extra" > .venv/jax_extra
  echo "$wanted" > .venv/installed
fi
export PYTHONUNBUFFERED=1
# Without bytecode on disk every process compiles what it imports: 8 s of a script's first 14.
unset PYTHONDONTWRITEBYTECODE
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1  # "PyTorch was not found": it is not needed
