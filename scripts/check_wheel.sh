#!/usr/bin/env bash
# Builds the wheel, installs it into a fresh environment without torch, and runs the command from there.
# usage: check_wheel.sh   (PYTHON=... chooses the interpreter)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-$root/.venv/bin/python}

echo "building"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$root"
wheel=$(ls "$work"/pelton-*.whl)
echo "built $(basename "$wheel"), $(du -k "$wheel" | cut -f1) KiB"

"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel"
cd "$work" # away from the source, so that only the wheel can be imported
pelton=$work/venv/bin/pelton
echo "installed $("$work/venv/bin/python" -m pip list --format=freeze | grep -vc -e '^pip=' -e '^setuptools=') packages, $(du -sm "$work/venv" | cut -f1) MiB"

"$pelton" --help >/dev/null
"$pelton" serve --help >/dev/null
"$pelton" models list >/dev/null
"$pelton" env | grep -q '^kernel_backend  *native'
for command in "serve --kernel-backend reference" "generate --prompt x --dtype bfloat16" "bench serve"; do
    # Without its extra a command must say which one, in one line.
    if message=$("$pelton" $command 2>&1); then
        echo "pelton $command ran without its extra" >&2
        exit 1
    fi
    case $message in
    "pelton: "*"pip install 'pelton["*) ;;
    *)
        echo "pelton $command: $message" >&2
        exit 1
        ;;
    esac
done
start=$(date +%s%N)
"$pelton" --help >/dev/null
echo "pelton --help: $((($(date +%s%N) - start) / 1000000)) ms"
echo "pelton $("$pelton" --version) works from its wheel"
