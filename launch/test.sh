#!/usr/bin/env bash
# Sets up .venv and runs every test, the files spread over the cores, slow ones first
# (tests/conftest.py); arguments go to pytest (-m "not slow" for the quick ones, -n 0 for a single
# process). One process more than cores: some wait for others that they have started.
set -euo pipefail
# shellcheck disable=SC2034  # setup.sh reads it
setup_also="serve test"
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec .venv/bin/python -m pytest -n "$(($(nproc) + 1))" --dist loadfile --no-loadscope-reorder "$@"
