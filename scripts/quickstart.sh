#!/usr/bin/env bash
# Installs PopMTL beside the sources and trains a first Pareto set: eight models of two digit-recognition tasks.
# What follows goes to `popmtl train`: scripts/quickstart.sh train.steps=50
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment
exec "$python" -m popmtl train "$root/configs/multidigits.yaml" "$@"
