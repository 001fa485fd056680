"""Runs a command, and all that it starts, as if the processor had no AMX tiles.

    python benchmarks/without_amx.py COMMAND ...

For figures of machines without tiles (Zen 4 and 5, Ice Lake) taken on one that has them. A seccomp filter refuses the
system's permission to use tiles, for which oneDNN, OpenVINO, llama.cpp and Pelton ask; PyTorch looks at the processor
itself, so that vLLM is also told by a `sitecustomize` module. Linux on x86-64.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import tempfile
from pathlib import Path

_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_EPERM = 1
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
# Of a classic BPF program over `struct seccomp_data`: load a word, compare it, return.
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 16

_FILTER = (
    (_LOAD, 0, 0, _NUMBER_OFFSET),
    (_JUMP_IF_EQUAL, 0, 3, _SYS_ARCH_PRCTL),
    (_LOAD, 0, 0, _FIRST_ARGUMENT_OFFSET),
    (_JUMP_IF_EQUAL, 0, 1, _ARCH_REQ_XCOMP_PERM),
    (_RETURN, 0, 0, _ERRNO | _EPERM),
    (_RETURN, 0, 0, _ALLOW),
)

_SITECUSTOMIZE = """
import importlib.util
if importlib.util.find_spec("vllm") is not None:
    import torch
    torch.cpu._is_amx_tile_supported = lambda: False
    torch.cpu._is_amx_fp16_supported = lambda: False
"""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def refuse_tiles() -> None:
    """For this process and all that it starts. Raises `OSError` where the kernel has no such filters."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in _FILTER))
    program = _Program(len(_FILTER), ctypes.cast(code, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(tempfile.gettempdir()) / "pelton-without-amx"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    refuse_tiles()
    os.execvpe(sys.argv[1], sys.argv[1:], {**os.environ, "PYTHONPATH": os.pathsep.join(paths)})


if __name__ == "__main__":
    main()
