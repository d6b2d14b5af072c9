#!/usr/bin/env bash
# A slice of a grid of experiments on one NVIDIA GPU, in a few minutes and without a network.
# Usage: bash launch/experiments_gpu.sh [--dry_run] FOLDER GRID [MINUTES]     (MINUTES: 12)
# FOLDER holds what the job needs and takes what it leaves:
#   wheels/      the releases in launch/locks, for .venv; without it PYTHON (python3) runs, as it is
#   cache/       weights and data sets, as in ~/.cache/tca4rec_jax
#   programs/    what was compiled
#   work/        the grid's work directory, with prepared data or as it came back
#   back.tar.*   what an earlier job packed in parts of PART (15m): work/ and programs/ take over what they lack
# `pip download --require-hashes -r launch/locks/run.txt -r launch/locks/cuda12.txt -d FOLDER/wheels` fills wheels/.
# BACK is the folder for the new parts (FOLDER), GPU the card (0), JAX_EXTRA cuda12 or cuda13.
# --dry_run prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/dry_run.sh
source launch/dry_run.sh
[ -z "$dry_run" ] || shift
[ $# -ge 2 ] || usage
folder="$1" grid="$2" minutes="${3:-12}" back="${BACK:-$1}"

python="${PYTHON:-python3}"
if [ -d "$folder/wheels" ]; then
  do_it export PIP_NO_INDEX=1 PIP_FIND_LINKS="$folder/wheels" JAX_EXTRA="${JAX_EXTRA:-cuda12}"
  do_it source launch/setup.sh
  python=.venv/bin/python
else
  do_it export PYTHONPATH="$PWD"
fi
do_it mkdir -p "$folder/cache" "$folder/programs" "$folder/work" "$back"
parts=("$folder"/back.tar.*)
[ ! -e "$folder/back.tar" ] || parts=("$folder/back.tar") # whole: a job was ended before it was split
if [ -e "${parts[0]}" ]; then
  # Both places may have gone on: what is here stays, what is not is taken over. Until then nothing is packed.
  came="$folder/came_back"
  do_it rm -rf "$came"
  do_it mkdir "$came"
  # shellcheck disable=SC2016 # $1 and $@ are those of the inner shell
  do_it bash -c 'into="$1"; shift; cat "$@" | tar -x -C "$into"' unpack "$came" "${parts[@]}"
  do_it cp -r -u "$came/programs" "$folder"
  do_it "$python" launch/experiments_merge.py --workdir="$folder/work" --other="$came/work"
  do_it rm -rf "$came"
fi

do_it export CUDA_VISIBLE_DEVICES="${GPU:-0}" TCA4REC_CACHE="$folder/cache"
do_it export JAX_COMPILATION_CACHE_DIR="$folder/programs"
status=0
do_it "$python" launch/experiments.py --grid="$grid" --workdir="$folder/work" --minutes="$minutes" ||
  status=$?
# Also of a grid that was stopped: hidden states are computed again faster than they travel.
do_it tar -c -f "$back/back.begun" -C "$folder" --exclude="hidden_states_*" --exclude=work/claims programs work
do_it mv "$back/back.begun" "$back/back.tar"
do_it rm -f "$back"/back.tar.*
do_it split -b "${PART:-15m}" "$back/back.tar" "$back/back.tar."
do_it rm "$back/back.tar"
exit "$status"
