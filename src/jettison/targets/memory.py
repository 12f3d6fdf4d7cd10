"""How much memory a network takes in its runtime: measured in a fresh process, which has nothing else in it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from jettison.core.errors import CheckpointError

_BEFORE = """
import resource, sys
import numpy as np

def peak_bytes():
    try:
        line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""
_AFTER = """
path, threads = sys.argv[1], int(sys.argv[2])
try:
    open("/proc/self/clear_refs", "w").write("5")
except OSError:
    pass
before = peak_bytes()
run = start(path, threads)
for _ in range(5):
    run()
print(peak_bytes() - before)
"""
# Linux hands ru_maxrss down through fork and exec, so that under a large parent it would never grow: VmHWM starts anew,
# and clear_refs sets it back to what is resident, so that the peak of the imports does not hide the network's.


def measure_growth(start: str, path: Path, *, threads: int) -> int:
    """Return by how many bytes the peak resident memory of a fresh process grows through loading and running a file.

    `start` is Python source: imports, and a function `start(path, threads)` that loads the file and returns a callable
    which runs it once on zeros at batch 1. Counted is the highest resident set from just before the file is loaded to
    the end of five runs, less the resident set at the start: weights, packed copies of them, activations, the
    runtime's arena, its kernels' code when first used, and what the loader needed for a moment.
    Raises CheckpointError where the file does not run.
    """
    done = _run_apart(start, path, threads)
    if done.returncode != 0:
        raise CheckpointError(
            f"The memory of {path.name} could not be measured: {done.stderr.strip().splitlines()[-1:]}. "
            "A fresh Python process failed to run the file. Load it by hand to see the runtime's own message."
        )
    return int(done.stdout.strip().splitlines()[-1])


def find_death(start: str, path: Path, *, threads: int) -> str | None:
    """Return the name of the signal that kills a fresh process which loads and runs a file; None where none does.

    `start` is as in `measure_growth`. An error that the runtime raises is no death.
    """
    code = _run_apart(start, path, threads).returncode
    return signal.Signals(-code).name if code < 0 else None


def _run_apart(start: str, path: Path, threads: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _BEFORE + start + _AFTER, str(path), str(threads)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
