#!/usr/bin/env bash
# Cross-compiles the native kernels for 64-bit Arm and runs them under emulation, with and without the
# dot-product instructions. Emulation shows that the numbers are right; it says nothing about speed or real hardware.
# usage: check_native_arm.sh   (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
native=$root/src/pelton/worker/kernels/cpu/native
cxx=${CXX:-aarch64-linux-gnu-g++}
qemu=${QEMU:-qemu-aarch64-static}
for tool in "$cxx" "$qemu"; do
    if ! command -v "$tool" >/dev/null; then
        echo "arm kernels: not checked, as $tool is missing (Debian: g++-aarch64-linux-gnu, qemu-user-static)"
        exit 0
    fi
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

objects=()
for source in "$native"/*.cpp "$root"/tests/native/*.cpp; do
    case $source in *module.cpp | *avx*.cpp | *amx*.cpp | *bf16_attention.cpp) continue ;; esac
    flags=()
    case $source in *neon_dotprod.cpp) flags=(-march=armv8.2-a+dotprod) ;; esac
    objects+=("$work/$(basename "$source").o")
    "$cxx" -std=c++20 -O2 -Wall -Wextra -ffp-contract=off "${flags[@]}" -I "$native" -c "$source" -o "${objects[-1]}"
done
"$cxx" -static -pthread "${objects[@]}" -o "$work/driver"
"$qemu" -cpu max "$work/driver"
"$qemu" -cpu cortex-a53 "$work/driver"
echo "arm kernels: clean (under emulation)"
