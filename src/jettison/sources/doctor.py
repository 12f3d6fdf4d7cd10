"""What this machine can do: which targets are usable and why not, the processor, memory, disk, and optional packages.

Everything is read from package metadata and the operating system; no runtime is imported, so it takes a moment only.
"""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

DECIDING_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""x86 instruction sets that decide how fast int8 and bf16 are."""
DECIDING_FEATURES_ARM = ("asimd", "asimddp", "i8mm", "bf16", "sve")
"""Their counterparts on ARM: NEON, int8 dot products, int8 matrices, bf16."""


@dataclass(frozen=True)
class TargetFinding:
    """A place a network can run: if it is usable here, its version, and otherwise what is missing and the remedy."""

    name: str
    usable: bool
    version: str | None
    reason: str
    remedy: str


@dataclass(frozen=True)
class PackageFinding:
    """An optional package: what it is for, its version or None, what keeps it from working, and the remedy."""

    name: str
    purpose: str
    version: str | None
    problem: str
    remedy: str


@dataclass(frozen=True)
class Machine:
    """Processor, cores this process may use, memory and disk in bytes; None where the system does not tell."""

    system: str
    python: str
    processor: str
    features: tuple[str, ...]
    missing_features: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int | None
    free_memory_bytes: int | None
    free_disk_bytes: int
    compiler: str | None


@dataclass(frozen=True)
class Diagnosis:
    """All that `jettison doctor` says."""

    jettison: str
    torch: str | None
    torch_build: str
    machine: Machine
    targets: tuple[TargetFinding, ...]
    packages: tuple[PackageFinding, ...]


RUNTIMES = {
    "onnxruntime": (("onnxruntime", "onnx", "onnxscript"), "onnxruntime onnx onnxscript"),
    "openvino": (("openvino",), "openvino"),
    "executorch": (("executorch",), "executorch"),
    "litert": (("litert-torch", "ai-edge-litert"), "litert-torch ai-edge-litert"),
}
"""Targets that are packages: the distributions they need, and what to hand to `pip install`."""
EXTRAS = {
    "torchao": ("int8 quantization", "torchao"),
    "timm": ("models by the name timm:NAME", "timm"),
    "torchvision": ("models by the name torchvision:NAME", "torchvision"),
    "pillow": ("inputs from folders of pictures", "'jettison[images]'"),
}
"""Optional packages: what each is for, and what to hand to `pip install`."""


def diagnose(folder: Path | None = None) -> Diagnosis:
    """Look at this machine; free disk is that of `folder`, by default the current one."""
    torch_version = read_version("torch")
    machine = look_at_machine(folder or Path.cwd())
    targets = (
        _find_eager(torch_version),
        *(_find_runtime(name, *needs) for name, needs in RUNTIMES.items()),
        _find_inductor(torch_version, machine.compiler),
    )
    return Diagnosis(
        jettison=read_version("jettison") or "not installed (running from source)",
        torch=torch_version,
        torch_build=_describe_build(torch_version),
        machine=machine,
        targets=targets,
        packages=tuple(_find_package(name, purpose, wanted) for name, (purpose, wanted) in EXTRAS.items()),
    )


def describe_diagnosis(diagnosis: Diagnosis) -> str:
    """Return what was found as text for a terminal."""
    machine = diagnosis.machine
    memory = "unknown" if machine.memory_bytes is None else f"{machine.memory_bytes / 1e9:.0f} GB"
    free = "" if machine.free_memory_bytes is None else f" ({machine.free_memory_bytes / 1e9:.0f} GB free)"
    lacking = f" (not {' '.join(machine.missing_features)})" if machine.missing_features else ""
    lines = [
        f"jettison  {diagnosis.jettison}, Python {machine.python}, torch {diagnosis.torch} ({diagnosis.torch_build})",
        f"machine   {machine.system}, {machine.processor}",
        f"          {' '.join(machine.features) or 'none of the fast instructions'}{lacking}",
        f"          {machine.cores} cores, {machine.threads} threads by default, memory {memory}{free}, "
        f"disk {machine.free_disk_bytes / 1e9:.0f} GB free",
        f"          C++ compiler: {machine.compiler or 'none'}",
        "",
        "targets",
    ]
    for target in diagnosis.targets:
        said = "usable" if target.usable else target.reason + (f": {target.remedy}" if target.remedy else "")
        lines.append(f"  {'yes' if target.usable else 'no':<4}{target.name:<12} {target.version or '-':<14} {said}")
    lines += ["", "optional packages"]
    for package in diagnosis.packages:
        said = package.purpose + (f": {package.problem}: {package.remedy}" if package.problem else "")
        lines.append(f"  {'no' if package.problem else 'yes':<4}{package.name:<12} {package.version or '-':<14} {said}")
    return "\n".join(lines)


def read_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def look_at_machine(folder: Path) -> Machine:
    """Read processor, memory and the free disk of `folder`."""
    processor, flags = _read_processor()
    wanted = DECIDING_FEATURES_ARM if platform.machine().lower() in ("aarch64", "arm64") else DECIDING_FEATURES
    memory = _read_memory()
    available = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        processor=processor,
        features=tuple(f for f in wanted if f in flags),
        missing_features=tuple(f for f in wanted if f not in flags) if flags else (),
        cores=len(available),
        threads=_read_threads() or len(available),
        memory_bytes=memory.get("MemTotal"),
        free_memory_bytes=memory.get("MemAvailable"),
        free_disk_bytes=shutil.disk_usage(folder).free,
        compiler=_find_compiler(),
    )


def _find_eager(version: str | None) -> TargetFinding:
    if version is None:
        return TargetFinding("eager", False, None, "torch is not installed", "pip install torch")
    return TargetFinding("eager", True, version, "", "")


def _find_runtime(name: str, distributions: tuple[str, ...], wanted: str) -> TargetFinding:
    versions = {d: read_version(d) for d in distributions}
    # Metadata may outlive its package, so the main module must be findable too; find_spec does not run it.
    module = {"litert": "ai_edge_litert"}.get(name, name)
    missing = [d for d, version in versions.items() if version is None]
    if not missing and find_spec(module) is None:
        missing = [f"{distributions[0]} (its metadata is there, its files are not)"]
    if missing:
        reason = f"not installed: {', '.join(missing)}"
        return TargetFinding(name, False, versions[distributions[0]], reason, f"pip install {wanted}")
    return TargetFinding(name, True, versions[distributions[0]], "", "")


def _find_inductor(version: str | None, compiler: str | None) -> TargetFinding:
    if version is None:
        return TargetFinding("inductor", False, None, "torch is not installed", "pip install torch")
    if compiler is None:
        reason = "no C++ compiler on PATH; torch.compile builds its kernels with one"
        return TargetFinding("inductor", False, version, reason, "apt-get install g++, or set CXX to a compiler")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        reason = f"Python's headers are missing ({header}); torch.compile's kernels include them"
        return TargetFinding("inductor", False, version, reason, "apt-get install python3-dev")
    return TargetFinding("inductor", True, version, "", "")


def _read_threads() -> int:
    named = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is for nested regions
    return int(named) if named.isdigit() else 0


def _find_compiler() -> str | None:
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "clang++", "cl"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def _find_package(name: str, purpose: str, wanted: str) -> PackageFinding:
    version = read_version(name)
    if version is None:
        return PackageFinding(name, purpose, None, "not installed", f"pip install {wanted}")
    # timm imports torchvision. Built for another processor than torch, neither can be imported.
    mine, torchs = (
        _read_build(package).get("__version__", "").partition("+")[2] for package in ("torchvision", "torch")
    )
    if name in ("timm", "torchvision") and mine and torchs and mine != torchs:
        remedy = (
            f"pip install --force-reinstall --no-deps torchvision --index-url https://download.pytorch.org/whl/{torchs}"
        )
        return PackageFinding(name, purpose, version, f"torchvision is built for {mine}, torch for {torchs}", remedy)
    return PackageFinding(name, purpose, version, "", "")


def _describe_build(version: str | None) -> str:
    if version is None:
        return "not installed"
    build = _read_build("torch")
    if not build:
        return "its metadata is there, its files are not"
    for kind in ("cuda", "hip", "xpu"):
        if build.get(kind, "None") != "None":
            return f"{kind} {build[kind]}"
    return "CPU"


def _read_build(package: str) -> dict[str, str]:
    """Return the constants in a package's `version.py`: torch's take seconds to import, and this file says it all."""
    spec = find_spec(package)
    try:
        text = (Path(spec.origin).parent / "version.py").read_text() if spec and spec.origin else ""
    except OSError:
        return {}
    constants = dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    return {name.partition(":")[0].strip(): value.strip().strip("'\"") for name, value in constants.items()}


def _read_processor() -> tuple[str, frozenset[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.machine(), frozenset(flags.split())


def _read_memory() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
