"""Runs the tests of the CUDA kernels on the host under a sanitizer: ``address`` or ``thread``.

``python -m tests.native.cuda_emulator thread`` looks for races; arguments behind it are pytest's.
"""

import os
import sys

from tests.native.cuda_emulator import HERE, preload

_, sanitizer, *arguments = sys.argv
tests = map(str, sorted(HERE.parent.glob("test_cuda_*.py")))
# One process, and reports as they are written: what the sanitizer finds is its exit status too.
command = [sys.executable, "-m", "pytest", "-n0", "-s", "-q", *tests, *arguments]
os.execve(sys.executable, command, {**os.environ, **preload(sanitizer)})
