#!/usr/bin/env bash
# Set up if needed, then run the whole suite. Further arguments go to pytest: scripts/test.sh tests/data -k splits
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/setup_env.sh

# One thread per process: the multi-rank tests start more processes than a small machine has cores.
export OMP_NUM_THREADS=1
# WORKERS=0 runs them one after the other, as a debugger wants them.
python -m pytest -q --durations=10 -n "${WORKERS:-auto}" --dist worksteal "$@"
