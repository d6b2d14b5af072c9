#!/usr/bin/env bash
# The main job end to end on CPU: data, CF model, LLM with CF alignment, a first look at what it
# recommends and why, then the full comparison with the LLM without alignment.
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
first="$workdir/results/first_look"
so_far() { echo "$((SECONDS / 60)) min $((SECONDS % 60)) s"; }
step() {
  echo
  echo "== $1 (takes about $2; $(so_far) so far)"
  shift 2
  .venv/bin/python "$@" --workdir="$workdir"
}
echo "quickstart: 7 steps into $workdir, the first time with two downloads. About 10 minutes on 2 free"
echo "cores, the first result after 6; slow or busy cores have taken three times as long"
step "1/7 data: MovieLens-100K" "10 s" launch/prepare_data.py --config="$config"
step "2/7 CF model: SASRec" "30 s" launch/train_cf.py --config="$config"
step "3/7 LLM: SmolLM2-135M, alpha > 0" "3 min" launch/train.py --config="${config}run=aligned"
if [ ! -e "$first/explained.html" ]; then
  # 60 rows are one batch, as long as the longest of the 700: step 7 runs what is compiled here.
  # Row 2501 is the first example of their report.
  step "4/7 first look: a sample of 60 test rows" "40 s" launch/evaluate.py --config="$config" \
    --config.evaluation.rows=60 --runs=untrained,aligned --guidance=0,1 --name=first_look
  step "5/7 first look: a list explained" "30 s" launch/explain.py --config="$config" \
    --run=aligned --guidance=1 --row=2501 --html="$first/explained.html"
  echo
  echo "quickstart: the first result after $(so_far): trained, a sample ranked, a list explained. Look at"
  echo "  $first/explained.html    why a user's list is as it is"
  echo "  $first/report.html       tables and lists of 60 rows: a sample, too few for a verdict"
fi
step "6/7 LLM: SmolLM2-135M, alpha = 0" "2 min" launch/train.py --config="${config}alpha=0,run=plain"
step "7/7 evaluation: the full comparison" "2 min" launch/evaluate.py --config="$config"
echo
echo "quickstart: done in $(so_far). Look at"
echo "  $workdir/report.html                       all of it in one file, in a browser"
echo "  $workdir/results.md, examples.md, *.png    the tables, five users' lists, pictures"
echo "  $workdir/llm/, cf/                         the trained models and their logs"
echo "and go on with"
echo "  .venv/bin/python launch/recommend.py --workdir=$workdir --run=aligned --item='Toy Story (1995)'"
