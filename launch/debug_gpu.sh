#!/usr/bin/env bash
# The whole path once on one NVIDIA GPU, in a few minutes: does this machine train and recommend?
# Usage: bash launch/debug_gpu.sh [--dry_run] [WORKDIR]     (WORKDIR: runs/debug_gpu)
# Needs a driver for CUDA 12 (JAX_EXTRA=cuda13: for 13), whose JAX goes into .venv. GPU chooses the card (0).
# --dry_run prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/dry_run.sh
source launch/dry_run.sh
[ -z "$dry_run" ] || shift
workdir="${1:-runs/debug_gpu}"
# SmolLM2-135M, two layers, six steps, in the arithmetic of the large runs.
config="configs/quickstart.py:debug,llm.dtype=bfloat16,run=plain,alpha=0"
aligned="${config/run=plain,alpha=0/run=aligned}"

do_it export JAX_EXTRA="${JAX_EXTRA:-cuda12}"
do_it source launch/setup.sh
do_it export CUDA_VISIBLE_DEVICES="${GPU:-0}" JAX_PLATFORMS=cuda
do_it .venv/bin/python -c 'import jax; print(jax.devices()[0].device_kind)'
for script in prepare_data train_cf train; do
  do_it .venv/bin/python "launch/$script.py" --config="$config" --workdir="$workdir"
done
do_it .venv/bin/python launch/train.py --config="$aligned" --workdir="$workdir"
do_it .venv/bin/python launch/evaluate.py --config="$config" --workdir="$workdir"
