"""A table of measured layer latencies: which widths are measured, what is read between them, and its cache on disk.

Kernels take their time in steps of 8 or 16 channels, and some (integer depthwise ones) are slower at 24 channels than
at 32. Within one residue of the width modulo 16 the time is close to linear. So the grid holds a few multiples of 16
and a few odd multiples of 8, and a lookup reads between points of the width's own residue only. Other widths are read
at the next multiple of 8.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

from jettison.core.errors import CheckpointError, InputError
from jettison.core.plain import read_json, write_json
from jettison.cost.layers import LayerShape
from jettison.cost.timing import find_bench, measure_layers

FORMAT = "jettison latency table 1"
STEP = 8
BLOCK = 16
POINTS_IN = 3
POINTS_OUT = 4
"""Grid points for each of the two residues of a width."""
MIN_TOGETHER = 8
"""Layers that run one after another even where fewer are missing from the cache."""
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve")


@dataclass(frozen=True)
class Family:
    """A layer measured at a grid of widths: `ms[i][o]` is for `ins[i]` and `outs[o]`; `full` is its largest form.

    A depthwise family has one row: its widths move together, so `outs` stands for the output width alone.
    """

    full: LayerShape
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of single layers, measured in one runtime on one machine with so many threads."""

    format: str
    machine: Mapping[str, str]
    threads: int
    families: tuple[Family, ...]

    @cached_property
    def by_kind(self) -> dict[LayerShape, list[Family]]:
        """Families by their shape without widths, the smallest first."""
        index: dict[LayerShape, list[Family]] = {}
        for family in self.families:
            index.setdefault(_kind(family.full), []).append(family)
        for same in index.values():
            same.sort(key=lambda f: (f.full.macs, f.full.in_channels))
        return index


def measure_table(
    layers: Sequence[LayerShape],
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    rounds: int = 20,
    cache: bool = True,
) -> LatencyTable:
    """Return a table that answers for each of `layers` at its own width and below.

    `runtime` is one of `timing.RUNTIMES`. Families found in the cache of this machine are not measured again. Raises
    InputError for bad counts, UnknownName for a runtime that is none, StorageError where the cache cannot be written,
    TargetMissing without the runtime.
    """
    find_bench(runtime)
    machine = describe_machine(runtime)
    path = cache_folder() / f"{_digest(machine)}-{threads}.json"
    known = {f.full: f for f in _read_cache(path, machine, threads)} if cache else {}
    wanted = list(dict.fromkeys(layers))
    missing = [shape for shape in wanted if shape not in known]
    grids = {shape: _grid(shape) for shape in missing}
    points = {shape: [_at(shape, i, o) for i in ins for o in outs] for shape, (ins, outs) in grids.items()}
    # The k-th points of all families run together, as the network's layers will; see timing.
    unique = [p for column in zip_longest(*points.values()) for p in dict.fromkeys(column) if p is not None]
    unique = list(dict.fromkeys(unique))
    together = max(MIN_TOGETHER, len(missing))
    measured = measure_layers(unique, runtime=runtime, threads=threads, rounds=rounds, together=together)
    times = dict(zip(unique, measured, strict=True))
    for shape, (ins, outs) in grids.items():
        ms = tuple(tuple(times[_at(shape, i, o)] for o in outs) for i in ins)
        known[shape] = Family(shape, ins, outs, ms)
    if cache and missing:
        write_json(LatencyTable(FORMAT, machine, threads, tuple(known.values())), path)
    return LatencyTable(FORMAT, machine, threads, tuple(known[shape] for shape in wanted))


def latency_ms(table: LatencyTable, shape: LayerShape) -> float:
    """Return the milliseconds of a layer at any width the table covers, interpolated between measured points.

    Raises InputError where no family of the table covers the layer.
    """
    for family in table.by_kind.get(_kind(shape), ()):
        full = family.full
        if shape.in_channels <= full.in_channels and shape.out_channels <= full.out_channels:
            columns = _weights(family.outs, shape.out_channels, full.out_channels)
            # A depthwise family has one row, whatever the input width.
            width_in = full.in_channels if full.depthwise else shape.in_channels
            rows = _weights(family.ins, width_in, full.in_channels)
            return max(0.0, sum(a * b * family.ms[i][o] for i, a in rows for o, b in columns))
    raise InputError(
        f"The latency table has no measurement for {shape}. It was measured for {len(table.families)} other layers. "
        f"Pass the layer at its full width to measure_table first."
    )


def describe_machine(runtime: str = "onnxruntime") -> dict[str, str]:
    """Return what a measured time depends on: processor, its vector extensions, cores, and the runtime's version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""  # not Linux: platform's word has to do
    lines: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        lines.setdefault(key.strip(), value.strip())
    model = " ".join(lines[k] for k in ("model name", "cpu family", "model") if k in lines)
    model = model or platform.processor() or platform.machine()
    flags = " ".join(f for f in _FLAGS if f in (lines.get("flags") or lines.get("Features") or "").split())
    try:
        found = version(runtime)
    except PackageNotFoundError:
        found = "none"
    return {"cpu": model, "flags": flags, "cores": str(os.cpu_count()), runtime: found}


def cache_folder() -> Path:
    """Return `$JETTISON_CACHE/latency`, by default `~/.cache/jettison/latency`."""
    return Path(os.environ.get("JETTISON_CACHE") or Path.home() / ".cache" / "jettison") / "latency"


def _digest(machine: Mapping[str, str]) -> str:
    """Return a short name for a machine."""
    return hashlib.sha256(repr(sorted(machine.items())).encode()).hexdigest()[:16]


def _read_cache(path: Path, machine: Mapping[str, str], threads: int) -> tuple[Family, ...]:
    """Return the cached families, or none with a warning where the file is damaged or from elsewhere."""
    if not path.exists():
        return ()
    try:
        table = read_json(LatencyTable, path)
        if (table.format, dict(table.machine), table.threads) != (FORMAT, dict(machine), threads):
            raise CheckpointError(f"{path} was measured by another version or on another machine.")
        for family in table.families:
            _check(family)
    except (CheckpointError, InputError) as error:
        warnings.warn(f"The cached latency table is ignored and measured anew: {error}", stacklevel=3)
        return ()
    return table.families


def _check(family: Family) -> None:
    """Refuse a family whose numbers do not fit its grid."""
    good = (family.ins, family.outs) == _grid(family.full) and len(family.ms) == len(family.ins)
    good = good and all(len(row) == len(family.outs) for row in family.ms)
    if not good or not all(math.isfinite(t) and t >= 0 for row in family.ms for t in row):
        raise CheckpointError(f"The measurements of {family.full} do not fit its grid.")


def _kind(shape: LayerShape) -> LayerShape:
    """Return the shape at its smallest widths: equal for all widths of one layer."""
    if shape.depthwise:
        return shape.at(2, 2 * shape.out_channels // shape.in_channels)
    return shape.at(shape.groups, shape.groups)


def _grid(shape: LayerShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the input and the output widths to measure."""
    if shape.depthwise:
        ratio = shape.out_channels // shape.in_channels
        # Widths move together, so the grid is a line, and a line can have more points.
        outs = [w for w in _points(shape.out_channels, 2 * POINTS_OUT, ratio) if w // ratio > 1]
        return (shape.in_channels,), tuple(outs)
    ins = _points(shape.in_channels, POINTS_IN, shape.groups)
    return tuple(ins), tuple(_points(shape.out_channels, POINTS_OUT, shape.groups))


def _at(shape: LayerShape, ins: int, outs: int) -> LayerShape:
    """Return the layer at one point of its grid."""
    return shape.at(outs * shape.in_channels // shape.out_channels, outs) if shape.depthwise else shape.at(ins, outs)


def _points(full: int, count: int, divisor: int) -> list[int]:
    """Return `full` and, of either residue modulo 16, about `count` evenly spread multiples of 8 below it."""
    points = {full}
    for residue in (0, STEP):
        widths = [w for w in range(STEP, full + 1, STEP) if w % BLOCK == residue and w % divisor == 0]
        if len(widths) > count:
            last = len(widths) - 1
            widths = [widths[round(i * last / (count - 1))] for i in range(count)]
        points.update(widths)
    return sorted(points)


def _weights(points: Sequence[int], width: int, full: int) -> list[tuple[int, float]]:
    """Return the one or two grid points to read a width at, and how much each counts."""
    if width not in points:
        width = min(math.ceil(width / STEP) * STEP, full)
    if width in points:
        return [(points.index(width), 1.0)]
    same = [i for i, w in enumerate(points) if w % BLOCK == width % BLOCK] or list(range(len(points)))
    below = [i for i in same if points[i] < width]
    above = [i for i in same if points[i] > width]
    if not below or not above:
        # Outside the measured widths of this residue: the nearest one, never a guess beyond it.
        return [(below[-1] if below else above[0], 1.0)]
    low, high = below[-1], above[0]
    share = (width - points[low]) / (points[high] - points[low])
    return [(low, 1.0 - share), (high, share)]
