"""What Triton's interpreter lacks beside this numpy; kernels with loops whose bounds are computed need it."""

from __future__ import annotations

from typing import Any

import triton
from triton.runtime import interpreter


def read_loop_bounds() -> None:
    """Let the interpreter read scalars, which it holds as arrays of one number: numpy 2.4 makes no integer of those,
    and Triton 3.6 asks it to. Does nothing where kernels are compiled."""
    if not triton.knobs.runtime.interpret:
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_index
