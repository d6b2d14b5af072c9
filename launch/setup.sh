#!/usr/bin/env bash
# Makes .venv, or brings it up to date: the releases in launch/locks, checked by their hashes. Sourced
# by the other scripts, which name further locks in setup_also (serve, test, browser, docs).
# PYTHON chooses the interpreter (CPython 3.11 to 3.14). JAX_EXTRA=tpu, cuda12 or cuda13 adds what that
# accelerator needs, and later calls keep it; JAX_EXTRA= (empty) goes back to the CPU.
# An environment made here that is half-made, can't start, or is of another Python or accelerator is
# made anew; one that was not made here is never removed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup_fail() {
  echo "setup: $1" >&2
  exit 1
}
version_of() { # an interpreter's, such as 3.12, if it starts and is supported
  "$1" -c 'import sys; v = sys.version_info[:2]; print("%d.%d" % v)
sys.exit(not (3, 11) <= v <= (3, 14))' 2>/dev/null
}

python="${PYTHON:-python3}"
have="$(version_of .venv/bin/python)" || have=""
extra_before="$(cat .venv/unfinished .venv/installed 2>/dev/null | grep -oE '(tpu|cuda1[23])' | head -n 1 || true)"
extra="${JAX_EXTRA-$extra_before}"
case "$extra" in
  "" | tpu | cuda12 | cuda13) ;;
  *) setup_fail "JAX_EXTRA is $extra: expected tpu, cuda12, cuda13 or nothing" ;;
esac

unusable=""
if [ -z "$have" ]; then
  unusable="its Python does not start, or is not CPython 3.11 to 3.14"
elif [ -n "${PYTHON:-}" ] && [ "$(version_of "$python")" != "$have" ]; then
  unusable="it is of Python $have, not of $python"
elif [ -e .venv/unfinished ]; then
  unusable="its installation was interrupted"
elif [ -n "$extra_before" ] && [ "$extra_before" != "$extra" ]; then
  unusable="it is for $extra_before"
fi
if [ -n "$unusable" ]; then
  version_of "$python" > /dev/null || setup_fail \
    "$python is $("$python" --version 2>&1), but CPython 3.11 to 3.14 is needed; set PYTHON"
  if [ -e .venv ] || [ -L .venv ]; then
    [ -e .venv/made_by_setup ] || setup_fail "cannot use .venv: $unusable; move it out of the way"
    echo "setup: making .venv anew: $unusable"
    rm -rf .venv
  fi
  mkdir .venv
  touch .venv/made_by_setup .venv/unfinished
  "$python" -m venv .venv || setup_fail "$python could not make .venv (Debian: apt-get install python3-venv)"
  have="$(version_of .venv/bin/python)"
fi

locks=(launch/locks/run.txt)
for name in $extra ${setup_also:-}; do locks+=("launch/locks/$name.txt"); done
wanted="$(sha256sum "${locks[@]}")"
touch -a .venv/installed
if grep -qvxFf .venv/installed <<< "$wanted"; then
  echo "setup: installing ${locks[*]} into .venv (about a minute)"
  echo "$wanted" > .venv/unfinished
  .venv/bin/python -m pip --version > /dev/null 2>&1 || .venv/bin/python -m ensurepip > /dev/null ||
    setup_fail ".venv has no pip, and Python's ensurepip is missing; move .venv out of the way"
  trap 'exit 130' INT # after Ctrl-C pip fails too, but may have stopped halfway
  # --no-compile: Python compiles the few modules that are imported.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes \
    "${locks[@]/#/--requirement=}" || {
    rm .venv/unfinished # pip fetches and checks everything first
    setup_fail "pip could not install the above; .venv is as it was"
  }
  trap - INT
  echo "$wanted" > .venv/installed
fi
rm -f .venv/unfinished
# The same as `pip install -e .`, which takes five seconds; true again after the checkout has moved.
checkout=".venv/lib/python$have/site-packages/tca4rec_jax.pth"
[ "$(cat "$checkout" 2>/dev/null)" = "$PWD" ] || pwd > "$checkout"

export PYTHONUNBUFFERED=1
# Without bytecode on disk every process compiles what it imports: 8 s of a script's first 14.
unset PYTHONDONTWRITEBYTECODE
