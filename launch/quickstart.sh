#!/usr/bin/env bash
# The main job end to end on CPU: data, CF model, LLM without and with CF alignment, evaluation.
# Usage: bash launch/quickstart.sh [WORKDIR] [debug]     (WORKDIR: runs/quickstart)
# Interrupted? Run it again: every step goes on from what is already there.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# A step maps its large temporaries anew: with pages of 4 kB that takes up to an eighth of the CPU
# time, with huge pages little.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1"

workdir="${1:-runs/quickstart}"
config="configs/quickstart.py:${2:+$2,}"
step() {
  echo
  echo "== $1 ($((SECONDS / 60)) min)"
  shift
  .venv/bin/python "$@" --workdir="$workdir"
}
step "1/5 data: MovieLens-100K" launch/prepare_data.py --config="$config"
step "2/5 CF model: SASRec" launch/train_cf.py --config="$config"
step "3/5 LLM: SmolLM2-135M, alpha = 0" launch/train.py --config="${config}alpha=0,run=plain"
step "4/5 LLM: SmolLM2-135M, alpha > 0" launch/train.py --config="${config}run=aligned"
step "5/5 evaluation" launch/evaluate.py --config="$config"
echo
echo "quickstart: done in $((SECONDS / 60)) min $((SECONDS % 60)) s; everything is in $workdir"
