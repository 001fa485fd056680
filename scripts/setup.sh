#!/usr/bin/env bash
# Makes the virtual environment that serve, test and check use.   usage: setup.sh FOLDER
# PYTHON=/path/to/python chooses the interpreter; PIP_ARGS adds arguments to pip install.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

is_new_enough() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

if [ ! -x "$venv/bin/python" ]; then
    chosen=
    for python in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if is_new_enough "$python"; then chosen=$python; break; fi
    done
    if [ -z "$chosen" ]; then
        echo "Pelton needs Python 3.11 or newer, with venv and pip." >&2
        echo "Tried: ${PYTHON:-python3.11, python3.12, python3.13, python3 ($(python3 --version 2>&1 || true))}." >&2
        echo "Install one (on Debian: apt-get install python3 python3-venv), or name one: make setup PYTHON=/path/to/python" >&2
        exit 1
    fi
    echo "Making $venv with $("$chosen" --version)"
    "$chosen" -m venv "$venv"
fi

echo "Installing Pelton into $venv (the first time: a few minutes, about 1 GB)"
log=$venv/install.log
# pip's own words go to the log; here a line for each larger download.
if ! "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off ${PIP_ARGS:-} -e '.[dev]' 2>&1 |
    tee "$log" | awk '
        /^ *Downloading .*[0-9.]+ MB\)/ { sub(/^ *Downloading /, ""); print "  " $0; fflush() }
        /^Installing collected packages/ { print "  unpacking"; fflush() }'; then
    tail -n 20 "$log" >&2
    echo "Installing failed; all of pip's output is in $log" >&2
    exit 1
fi
echo "Installed Pelton $("$venv/bin/pelton" --version)"
