"""What Triton's interpreter lacks. Kernels with loops whose bounds are computed need it, and tests its speed."""

from __future__ import annotations

from typing import Any

import triton
from triton.runtime import interpreter


def mend_interpreter() -> None:
    """Does nothing where kernels are compiled, and nothing the second time.

    Loop bounds: the interpreter holds scalars as arrays of one number, and asks numpy to make integers of them, which
    numpy 2.4 refuses. Time: it prepares the language anew at each call of a function within a kernel, a third of the
    time of a small kernel; once a launch and function will do.
    """
    if not triton.knobs.runtime.interpret or hasattr(interpreter, "pelton_prepared"):
        return
    prepared: set[Any] = set()
    interpreter.pelton_prepared = prepared
    patch_tensor, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__

    def patch_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    def patch_once(function: Any) -> Any:
        if function in prepared:
            return None
        prepared.add(function)
        return patch_language(function)

    def launch_anew(self: Any, *args: Any, **options: Any) -> Any:
        prepared.clear()
        return launch(self, *args, **options)

    interpreter._patch_lang_tensor = patch_and_index
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
