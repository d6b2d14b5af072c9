#!/usr/bin/env bash
# A launch script as a JobSet on GKE TPU slices.
#
#   bash launch/gke_jobset.sh [--dry_run] build                build and push the image of this commit
#   bash launch/gke_jobset.sh [--dry_run] run SCRIPT [ARGS...] start it
#   bash launch/gke_jobset.sh [--dry_run] tail                 follow the first worker's log
#   bash launch/gke_jobset.sh [--dry_run] delete               end it
#
# --dry_run prints what would be built, applied or run. Variables: IMAGE (needed), NAME (tca4rec),
# TPU (tpu-v5-lite-podslice; tpu-v5p-slice, tpu-v6e-slice), TOPOLOGY (4x4), HOSTS of the slice (4),
# CHIPS_PER_HOST (4), VOLUME_CLAIM (tca4rec: a ReadWriteMany claim, mounted at /work; keep workdir and
# weights there). Example:
#
#   IMAGE=us-docker.pkg.dev/project/repository/tca4rec bash launch/gke_jobset.sh run launch/train.py \
#     --config=configs/llama_3_2_3b.py:chips=16 --workdir=/work/runs/llama
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/dry_run.sh
source "$here/dry_run.sh"
[ -z "$dry_run" ] || shift
command="${1:-}"
[ -n "$command" ] || usage
shift
NAME="${NAME:-tca4rec}" IMAGE="${IMAGE:?set IMAGE, where the image is pushed to and pulled from}"
TPU="${TPU:-tpu-v5-lite-podslice}" TOPOLOGY="${TOPOLOGY:-4x4}" HOSTS="${HOSTS:-4}"
CHIPS_PER_HOST="${CHIPS_PER_HOST:-4}" VOLUME_CLAIM="${VOLUME_CLAIM:-tca4rec}"

json_list() { # a JSON list of strings is a YAML list
  local separator="" text
  printf '['
  for text in "$@"; do
    text="${text//\\/\\\\}"
    printf '%s"%s"' "$separator" "${text//\"/\\\"}"
    separator=", "
  done
  printf ']'
}
filled_in() {
  local text value
  text="$(cat "$here/gke_jobset.yaml")"
  for variable in NAME IMAGE TPU TOPOLOGY HOSTS CHIPS_PER_HOST VOLUME_CLAIM ARGS; do
    value="${!variable}"
    text="${text//"\${$variable}"/"$value"}"
  done
  printf '%s\n' "$text"
}

case "$command" in
  build)
    if [ -n "$dry_run" ]; then
      echo "git archive HEAD | docker build --tag=$IMAGE --file=launch/Dockerfile -"
    else
      git -C "$here/.." archive HEAD | docker build --tag="$IMAGE" --file=launch/Dockerfile -
    fi
    do_it docker push "$IMAGE"
    ;;
  run)
    [ $# -gt 0 ] || { echo "gke_jobset: run needs a script, such as launch/train.py" >&2; exit 2; }
    # shellcheck disable=SC2034  # read by name
    ARGS="$(json_list "$@")"
    if [ -n "$dry_run" ]; then filled_in; else filled_in | kubectl apply -f -; fi
    ;;
  tail)
    first="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
    do_it kubectl logs --follow --tail=100 --selector="$first"
    ;;
  delete) do_it kubectl delete jobset "$NAME" ;;
  *) echo "gke_jobset: unknown command $command" >&2; exit 2 ;;
esac
