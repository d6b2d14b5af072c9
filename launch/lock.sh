#!/usr/bin/env bash
# Makes launch/locks anew: the exact releases, with the hashes of all their files, that requirements.txt
# (run.txt) and the extras of pyproject.toml lead to, for every supported Python and platform. An extra's
# file holds only what run.txt lacks: install it together with that one; beam.txt alone is whole.
# Usage: bash launch/lock.sh [--upgrade]     (without it a release stays while it satisfies)
# Needs uv (pip install uv) and the package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=launch/locks/run.txt

compile() { # LOCK ARGUMENTS... of uv
  uv pip compile --quiet --universal --python-version=3.11 --generate-hashes --no-header \
    --annotation-style=line --output-file="launch/locks/$1.txt" "${@:2}"
  sed -i '/^# The following packages were excluded/,$d' "launch/locks/$1.txt"
}
compile run requirements.txt "$@"
# What only Windows needs there may be needed everywhere by an extra.
mapfile -t locked < <(grep -v "== 'win32'" "$run" | grep -oE '^[a-z0-9-]+')
for extra in tpu cuda12 cuda13 wandb clu serve test browser docs; do
  compile "$extra" pyproject.toml --extra="$extra" --constraints="$run" \
    "${locked[@]/#/--no-emit-package=}" "$@"
done
# Apache Beam holds pyarrow, protobuf and python-dateutil below the releases in run.txt: its lock is whole.
compile beam pyproject.toml --extra=beam "$@"
rm -rf tca4rec_jax.egg-info # left by reading pyproject.toml: pip would take the checkout for an installation
