#!/usr/bin/env bash
# Installs the system packages that tests need where they are missing: `tools/system.sh COMMAND:PACKAGE...`
set -euo pipefail
missing=()
for pair in "$@"; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
[ ${#missing[@]} -gt 0 ] || exit 0
root=""
[ "$(id -u)" = 0 ] || root="sudo -n"
if ! { $root apt-get update -q && $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q "${missing[@]}"; } >&2; then
    echo "error: the system packages ${missing[*]} are missing and could not be installed: install them (apt-get install ${missing[*]}) and run make again." >&2
    exit 1
fi
