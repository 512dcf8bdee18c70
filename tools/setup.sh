#!/usr/bin/env bash
# Makes .venv with the package and what its tests need, once for each pyproject.toml. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/.made-for
wanted=$(sha256sum pyproject.toml | cut -d' ' -f1)
if [ -x .venv/bin/dynamixer ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then exit 0; fi

python=${PYTHON:-python3}
if [ "$python" != python3 ] && ! command -v "$python" >/dev/null; then
    echo "error: there is no $python: name a Python of 3.11 or newer that is installed, or leave PYTHON out." >&2
    exit 1
fi
if ! command -v "$python" >/dev/null || ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "setting up: $python with venv is missing, trying to install the package python3-venv" >&2
    root=""
    [ "$(id -u)" = 0 ] || root="sudo -n"
    if ! { $root apt-get update -q && $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q python3 python3-venv; } >&2; then
        echo "error: the system package python3-venv is missing and could not be installed: install it (apt-get install python3-venv) and run make again." >&2
        exit 1
    fi
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $($python --version) is too old: Python 3.11 or newer is needed; name one with make PYTHON=python3.12." >&2
    exit 1
fi
echo "setting up .venv (torch is large: minutes on a slow line)" >&2
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
.venv/bin/python -m pip install --disable-pip-version-check -e '.[dev]' >&2
echo "$wanted" >"$stamp"
