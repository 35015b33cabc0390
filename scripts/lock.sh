#!/usr/bin/env bash
# lock.sh [--check] FILE: resolve the workspace anew and write FILE, or compare FILE with what comes out.
# FILE holds names, versions, markers and hashes, no download addresses, and neither torch nor what only torch needs,
# because the right build of torch depends on the machine (scripts/setup.sh installs it).
set -euo pipefail
check=0
if [ "${1:-}" = --check ]; then check=1; shift; fi
file=$(realpath "$1")
cd "$(dirname "$0")/.."
# setup.sh has fetched one into .venv if the PATH has none that fits.
if [ -x .venv/bin/uv ]; then uv=.venv/bin/uv; else uv=uv; fi

fresh=$(mktemp)
trap 'rm -f "$fresh"' EXIT
"$uv" lock --quiet --upgrade --python .venv/bin/python
{
    echo '# Written by `make lock`: what development installs beside torch. Do not edit.'
    "$uv" export --quiet --frozen --python .venv/bin/python --no-header --no-annotate --no-emit-workspace \
        --all-groups --prune torch
} >"$fresh"

if [ "$check" = 0 ]; then
    cat "$fresh" >"$file"
    echo "lock: wrote $(grep -c '==' "$file") pins to $(basename "$file")"
elif ! diff -u "$file" "$fresh"; then
    echo "lock: $(basename "$file") is not what a fresh resolution gives; run 'make lock' and commit the result" >&2
    exit 1
else
    echo "lock: $(basename "$file") agrees with a fresh resolution"
fi
