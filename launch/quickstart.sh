#!/usr/bin/env bash
# The main job end to end on CPU: data, CF model, LLM without and with CF alignment, evaluation.
# Usage: bash launch/quickstart.sh [WORKDIR] [debug]     (WORKDIR: runs/quickstart)
# Interrupted? Run it again: every step goes on from what is already there.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Else a step maps its large temporaries anew, which takes up to a fifth of the CPU time: those of
# threads that share the main arena stay mapped, and huge pages make the first time cheap.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"

workdir="${1:-runs/quickstart}"
config="configs/quickstart.py:${2:+$2,}"
step() {
  echo
  echo "== $1 (takes about $2; $((SECONDS / 60)) min $((SECONDS % 60)) s so far)"
  shift 2
  .venv/bin/python "$@" --workdir="$workdir"
}
echo "quickstart: 5 steps into $workdir; about 8 minutes on 2 cores, the first time with two downloads"
step "1/5 data: MovieLens-100K" "10 s" launch/prepare_data.py --config="$config"
step "2/5 CF model: SASRec" "30 s" launch/train_cf.py --config="$config"
step "3/5 LLM: SmolLM2-135M, alpha = 0" "2 min" launch/train.py --config="${config}alpha=0,run=plain"
step "4/5 LLM: SmolLM2-135M, alpha > 0" "2 min" launch/train.py --config="${config}run=aligned"
step "5/5 evaluation" "3 min" launch/evaluate.py --config="$config"
echo
echo "quickstart: done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Look at"
echo "  $workdir/report.html                       all of it in one file, in a browser"
echo "  $workdir/results.md, examples.md, *.png    the tables, five users' lists, pictures"
echo "  $workdir/llm/, cf/                         the trained models and their logs"
echo "and go on with"
echo "  .venv/bin/python launch/recommend.py --workdir=$workdir --run=aligned --item='Toy Story (1995)'"
