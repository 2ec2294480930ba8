#!/usr/bin/env bash
# All checks: lint, format, types, tests. What follows goes to pytest: scripts/test.sh tests/test_config.py
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment test
cd -- "$root"
"$python" -m ruff check
"$python" -m ruff format --check
"$python" -m mypy
exec "$python" -m pytest "$@"
