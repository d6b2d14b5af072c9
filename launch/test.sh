#!/usr/bin/env bash
# Sets up .venv and runs every test, the files spread over the cores in their order (by default those
# with the fewest tests come last, which are the longest); arguments go to pytest (-m "not slow" for
# the quick ones, -n 0 for a single process).
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
