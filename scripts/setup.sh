#!/usr/bin/env bash
# Prepare .venv: the interpreter, uv, torch, what requirements.lock pins, and the packages of this repository.
# `make setup` calls it; PYTHON, TORCH and TORCH_BACKEND come from there.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TORCH:?is not set: call this by \'make setup\'}"

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
is_supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_supported "$PYTHON" || fail "NanoFlow needs Python 3.11 or newer, and PYTHON=$PYTHON is" \
            "$("$PYTHON" --version 2>&1 | head -n 1 || true). Name a newer one: make setup PYTHON=python3.12"
        echo "$PYTHON"
        return
    fi
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.14; do
        if is_supported "$name"; then echo "$name"; return; fi
    done
    fail "NanoFlow needs Python 3.11 or newer, and python3 here is" \
        "$(python3 --version 2>/dev/null || echo 'not installed'). Install one, or name it: make setup PYTHON=/path/to/python3.12"
}

# An environment is made anew if its interpreter is gone, too old or not the one asked for, or if its folder has moved.
version_of() { "$1" -c 'import sys; print(sys.version_info[:2])'; }
fits() {
    is_supported .venv/bin/python && grep -qsF "$PWD/.venv" .venv/bin/activate &&
        { [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of .venv/bin/python)" ]; }
}
python=$(find_python)
if [ -d .venv ] && ! fits; then
    say "removing a .venv that does not fit"
    rm -rf .venv
fi
if [ ! -d .venv ]; then
    say "creating .venv with $("$python" --version)"
    "$python" -m venv .venv >.venv-error 2>&1 || {
        reason=$(grep -v '^$' .venv-error | head -n 1); rm -rf .venv .venv-error
        fail "'$python -m venv' failed ($reason). On Debian and Ubuntu: apt install python3-venv"
    }
    rm -f .venv-error
fi

# A uv on the PATH serves if it accepts this workspace (its required-version); otherwise one is fetched into .venv.
if uv pip list --python .venv/bin/python >/dev/null 2>&1; then
    uv=uv
else
    uv=.venv/bin/uv
    if ! "$uv" pip list --python .venv/bin/python >/dev/null 2>&1; then
        say "fetching uv into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1' ||
            fail "pip could not fetch uv; see the lines above"
    fi
fi
install() { "$uv" pip install --python .venv/bin/python "$@"; }

say "installing $TORCH${TORCH_BACKEND:+ for $TORCH_BACKEND}"
install ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} --constraints requirements.lock "$TORCH"
say "installing what requirements.lock pins"
# Every line of it has hashes, and uv verifies those that are given.
install --no-deps --verify-hashes --requirements requirements.lock

say "installing the packages of this repository"
compiler=''
for name in "${CXX:-c++}" g++ clang++; do compiler=${compiler:-$(command -v "$name" || true)}; done
headers=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
without() {
    say "$1: nf-kernels goes without its native CPU kernels and computes with plain torch, nf-kvcache finds prefixes" \
        "in Python; both are slower. To have what is native: install $2, then 'make -B setup'."
}
if [ -z "$compiler" ]; then
    without "no C++ compiler found" "one (g++)"
elif [ ! -e "$headers" ]; then
    without "no Python headers found" "them (python3-dev)"
fi
PATH="$PWD/.venv/bin:$PATH" install --no-deps --no-build-isolation --reinstall \
    --editable packages/nf-kernels --editable packages/nf-kvcache --editable packages/nf-scheduler \
    --editable packages/nf-runtime --editable apps/server

# The CUDA library is an extra: its headers come where there is a compiler for it, itself where there is a device, too.
if command -v "${CUDACXX:-nvcc}" >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
    if ! install --quiet --no-deps --verify-hashes --requirements requirements-cuda.txt; then
        say "the headers of CUTLASS could not be fetched: no CUDA library. 'make -B setup' tries again."
    elif [ -e /dev/nvidiactl ]; then
        say "building the CUDA library, which takes minutes"
        .venv/bin/python -m nf_kernels.cuda.build ||
            say "no CUDA library: products on a share of a GPU go without. 'make cuda-build' tries again."
    fi
fi
touch .venv/.setup-stamp
say "done; see 'make help'"
