"""What a user pays before anything is computed: import time, packages, and modules loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

IMPORT_S = 0.3
"""What a person at a prompt does not notice."""
ATTEMPTS = 5
"""The cores are shared, so the fastest of a few tries is the one that says what the import itself costs."""
HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "onnxscript", "torchao", "rich", "jinja2", "safetensors"}
ADDED_PACKAGES = 20


def _run(code: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure_import(statement: str) -> tuple[float, set[str]]:
    code = (
        "import json, sys, time; start = time.perf_counter()\n"
        f"{statement}\n"
        "seconds = time.perf_counter() - start\n"
        "print(json.dumps({'seconds': seconds, 'modules': sorted(sys.modules)}))"
    )
    runs = [_run(code) for _ in range(ATTEMPTS)]
    modules = runs[0]["modules"]
    assert isinstance(modules, list)
    return min(float(str(r["seconds"])) for r in runs), {m.split(".")[0] for m in modules}


def test_import_is_quick_and_loads_nothing_heavy() -> None:
    seconds, modules = _measure_import("import jettison")
    assert not modules & HEAVY
    assert seconds < IMPORT_S


def test_the_measurement_sees_a_heavy_import() -> None:
    _, modules = _measure_import("import jettison, numpy")
    assert modules & HEAVY == {"numpy"}


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    _, modules = _measure_import("import jettison.cli\ntry: jettison.cli.main(['--help'])\nexcept SystemExit: pass")
    assert not modules & HEAVY
    command = [str(Path(sys.executable).with_name("jettison")), "--help"]
    waits = []
    for _ in range(ATTEMPTS):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        waits.append(time.perf_counter() - start)
        assert "Usage" in done.stdout
    assert min(waits) < IMPORT_S


def _closure(name: str) -> set[str]:
    """Return the packages that installing `name` without extras brings, itself included."""
    seen: set[str] = set()
    waiting = [canonicalize_name(name)]
    while waiting:
        package = waiting.pop()
        if package in seen:
            continue
        seen.add(package)
        for line in metadata.requires(package) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return seen


def test_few_packages_beyond_torch() -> None:
    added = _closure("jettison") - _closure("torch") - {"jettison"}
    assert {"onnx", "onnxruntime"} <= added
    assert len(added) <= ADDED_PACKAGES, sorted(added)
