#!/usr/bin/env bash
# Runs the native kernels under the address, undefined-behaviour and thread sanitizers (x86-64, gcc or clang).
# usage: check_native_sanitizers.sh   (CXX=... chooses the compiler)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
native=$root/src/pelton/worker/kernels/cpu/native
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cxx=${CXX:-g++}

# -Wno-(maybe-)uninitialized: what gcc 12 says about its own intrinsics.
avx2="-mavx2 -mfma -mf16c -mbmi2"
avx512="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16 -mfma -mf16c -mbmi2"
flags_of() {
    case $1 in
        *avx2.cpp) echo "$avx2" ;;
        *avx2_vnni.cpp) echo "$avx2 -mavxvnni" ;;
        *avx512.cpp | *bf16_attention.cpp) echo "$avx512" ;;
        *amx.cpp) echo "$avx512 -mamx-tile -mamx-bf16" ;;
    esac
}

check() { # name, sanitizer flags
    local name=$1 objects=() source
    shift
    echo "$name: building"
    for source in "$native"/*.cpp "$root"/tests/native/*.cpp; do
        case $source in *module.cpp | *neon*.cpp) continue ;; esac # Python's view; Arm's
        objects+=("$work/$name-$(basename "$source").o")
        # shellcheck disable=SC2046
        "$cxx" -std=c++20 -O1 -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized -ffp-contract=off \
            -fno-omit-frame-pointer "$@" $(flags_of "$source") -I "$native" -c "$source" -o "${objects[-1]}"
    done
    "$cxx" "$@" -pthread "${objects[@]}" -o "$work/$name"
    "$work/$name"
}

check memory -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all

echo "native kernels: clean"
