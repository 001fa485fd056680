"""A process that ends while a thread of its own computes, as a start that copies weights behind all else may."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import threading
import numpy as np
from tests.worker.native import native, random_packed

kernels = native("portable")
weight = kernels.make_linear_loader().load([random_packed("Q5_0", 4096, 4096)])
x = np.ones((256, 4096), np.float32)
begun = threading.Event()

def compute():
    begun.set()
    while True:
        kernels.linear(x, weight)

threading.Thread(target=compute, daemon=True).start()
begun.wait()
print("leaving")
"""


def test_an_exit_in_the_midst_of_a_native_call_is_quiet() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")
