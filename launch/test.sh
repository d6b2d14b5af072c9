#!/usr/bin/env bash
# Sets up .venv and runs every test; arguments go to pytest (-m "not slow" for the quick ones).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec .venv/bin/python -m pytest "$@"
