#!/usr/bin/env bash
# lock.sh [--check] FILE: resolve the workspace anew and write FILE; or see that FILE is a resolution of the workspace:
# the versions in it satisfy everything that is declared, and nothing is missing, superfluous, or has other hashes.
# Whether there are newer releases does not matter to the check: an index may show them late, or not everywhere.
# FILE holds names, versions, markers and hashes, no download addresses, and neither torch nor what only torch needs,
# because the right build of torch depends on the machine (scripts/setup.sh installs it).
set -euo pipefail
check=0
if [ "${1:-}" = --check ]; then check=1; shift; fi
file=$(realpath "$1")
cd "$(dirname "$0")/.."
# setup.sh has fetched one into .venv if the PATH has none that fits.
if [ -x .venv/bin/uv ]; then uv=$PWD/.venv/bin/uv; else uv=uv; fi
python=$PWD/.venv/bin/python

fresh=$(mktemp)
workspace=$(mktemp -d)
trap 'rm -rf "$fresh" "$workspace"' EXIT
if [ "$check" = 1 ]; then  # in a copy of the declarations to which the pins are added
    tar -cf - pyproject.toml packages/*/pyproject.toml apps/*/pyproject.toml | tar -xf - -C "$workspace"
    pins=$(sed -nE 's/^([a-zA-Z0-9._-]+==[^\\]*[^\\ ]) *\\?$/    "\1",/p' "$file")
    pins=$pins perl -pi -e 's/^constraint-dependencies = \[$/$&\n$ENV{pins}/' "$workspace/pyproject.toml"
    cd "$workspace"
fi
"$uv" lock --quiet --upgrade --python "$python"
{
    echo '# Written by `make lock`: what development installs beside torch. Do not edit.'
    "$uv" export --quiet --frozen --python "$python" --no-header --no-annotate --no-emit-workspace \
        --all-groups --prune torch
} >"$fresh"

if [ "$check" = 0 ]; then
    cat "$fresh" >"$file"
    echo "lock: wrote $(grep -c '==' "$file") pins to $(basename "$file")"
elif ! diff -u "$file" "$fresh"; then
    echo "lock: $(basename "$file") is no resolution of what is declared; run 'make lock' and commit the result" >&2
    exit 1
else
    echo "lock: $(basename "$file") is a resolution of what is declared"
fi
