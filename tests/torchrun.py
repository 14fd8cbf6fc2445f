"""Two processes under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def torchrun(module: str, *arguments: str) -> tuple[str, str]:
    """Run a module in two processes; return what they wrote to standard output and error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", module, *arguments]
    with subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        try:
            output, errors = launcher.communicate(timeout=240)
        except BaseException:
            # torchrun's own children would outlive it.
            os.killpg(launcher.pid, signal.SIGTERM)
            raise
    assert launcher.returncode == 0, output + errors
    return output, errors
