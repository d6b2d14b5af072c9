#!/usr/bin/env bash
# A Cloud TPU slice from creation to deletion: every command runs on all of its workers.
#
#   bash launch/tpu_pod.sh [--dry_run] create  NAME                  ask for the slice and wait for it
#   bash launch/tpu_pod.sh [--dry_run] install NAME                  this commit and its .venv on it
#   bash launch/tpu_pod.sh [--dry_run] run     NAME SCRIPT [ARGS...] start a launch script
#   bash launch/tpu_pod.sh [--dry_run] tail    NAME                  follow its log (WORKER=0)
#   bash launch/tpu_pod.sh [--dry_run] stop    NAME                  end it: it saves, and resumes with run
#   bash launch/tpu_pod.sh [--dry_run] delete  NAME                  give the slice back
#
# --dry_run prints the commands instead of running them. Variables: ZONE (needed), PROJECT (gcloud's
# by default), ACCELERATOR (v5litepod-16; v5p-8, v6e-16, ... as gcloud names them), SPOT=1 for a
# preemptible slice. WORKDIR and weights must lie where every worker sees them, for instance on a
# Filestore share. A bucket mounted with gcsfuse will not do for WORKDIR (docs/scaling.md), it is good
# for weights. Example:
#
#   export ZONE=us-west4-a ACCELERATOR=v5litepod-16
#   bash launch/tpu_pod.sh create pod && bash launch/tpu_pod.sh install pod
#   bash launch/tpu_pod.sh run pod launch/train.py --config=configs/llama_3_2_3b.py:chips=16 \
#     --workdir=/mnt/share/runs/llama
set -euo pipefail

# shellcheck source=launch/dry_run.sh
source "$(dirname "${BASH_SOURCE[0]}")/dry_run.sh"
[ -z "$dry_run" ] || shift
command="${1:-}" name="${2:-}"
[ -n "$command" ] && [ -n "$name" ] || usage
shift 2
accelerator="${ACCELERATOR:-v5litepod-16}"
where=(--zone="${ZONE:?set ZONE, for instance ZONE=us-west4-a}" ${PROJECT:+--project="$PROJECT"})
folder=tca4rec_jax # in every worker's home
archive="$name-tca4rec_jax.tar.gz" # in the worker's home; here in .git: /tmp is everybody's

# In the folder: whether the process of run.pid is still there, and not another one of its number.
# shellcheck disable=SC2016  # the worker expands it
running='pid="$(cat run.pid 2>/dev/null)" && [ "$(readlink "/proc/$pid/cwd")" = "$(pwd -P)" ]'

on_workers() { # WORKERS COMMAND
  do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}
runtime_version() {
  case "$accelerator" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo "tpu_pod: ACCELERATOR is $accelerator: expected v5litepod-N, v5p-N or v6e-N" >&2; exit 2 ;;
  esac
}
wait_until_active() {
  local state=""
  until [ "$state" = ACTIVE ]; do
    state="$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      --format='value(state.state)')"
    echo "$(date +%T) $name: $state"
    case "$state" in
      FAILED | SUSPENDED) exit 1 ;;
      ACTIVE) ;;
      *) sleep 30 ;;
    esac
  done
}

case "$command" in
  create)
    version="$(runtime_version)"
    do_it gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
      --accelerator-type="$accelerator" --runtime-version="$version" ${SPOT:+--spot}
    [ -n "$dry_run" ] || wait_until_active
    ;;
  install)
    packed="$(git rev-parse --git-dir)/$archive"
    do_it git archive --format=tar.gz --output="$packed" HEAD
    do_it gcloud compute tpus tpu-vm scp "$packed" "$name:$archive" "${where[@]}" --worker=all
    # The images carry CPython 3.10; uv brings a newer one.
    on_workers all "set -e; python3 -m pip install --quiet --user uv
mkdir -p $folder; tar -xzf $archive -C $folder; cd $folder
~/.local/bin/uv python install --quiet 3.12
PYTHON=\$(~/.local/bin/uv python find 3.12) JAX_EXTRA=tpu bash launch/setup.sh"
    ;;
  run)
    [ $# -gt 0 ] || { echo "tpu_pod: run needs a script, such as launch/train.py" >&2; exit 2; }
    on_workers all "cd $folder
if $running; then
  echo tpu_pod: a run of \$(hostname) is going on, process \$pid: stop it first >&2; exit 1
fi
nohup .venv/bin/python$(printf ' %q' "$@") >> run.log 2>&1 < /dev/null &
echo \$! > run.pid"
    ;;
  tail) on_workers "${WORKER:-0}" "tail -n 100 -F $folder/run.log" ;;
  stop) on_workers all "cd $folder
if $running; then kill -TERM \$pid; else echo tpu_pod: nothing runs on \$(hostname); fi" ;;
  delete) do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet ;;
  *) echo "tpu_pod: unknown command $command" >&2; exit 2 ;;
esac
