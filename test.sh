#!/usr/bin/env bash
# Run the tests on a fresh machine: make .venv, install, run pytest (CPU, no network after the install).
# Arguments go to pytest: ./test.sh -k sampler
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
export HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest -q "$@"
