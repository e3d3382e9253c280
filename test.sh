#!/usr/bin/env bash
# Run the tests on a fresh machine: make .venv, install, run pytest (CPU, no network after the install).
# Arguments go to pytest: ./test.sh -k sampler
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "error: Python 3.11 or newer is needed: remove .venv, then PYTHON=python3.11 ./test.sh" >&2; exit 2; }
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
export HF_HUB_OFFLINE=1
# Idle threads sleep: where other work runs beside, spinning ones take its time and their own.
export OMP_WAIT_POLICY=PASSIVE
[ $# -gt 0 ] || set -- -n 2 --dist loadfile  # the whole: two processes of one thread share out the files
exec .venv/bin/python -m pytest -q "$@"
