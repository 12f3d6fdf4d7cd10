"""Which share of a network's MACs really runs on integers, by the runtimes' own graphs.

`python -m benchmarks.kernel_audit [names]`, in an environment with openvino, and timm (with its torchvision) for the
networks without trained weights. Shows a line for each network and target, and the findings; with a layer planted in
float, the audit must name it. Writes `results/kernel-audit.csv`.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

import torch

import jettison as jt
from benchmarks.quantization.cases import CASES, Case, find_case
from jettison.graph.trace import trace_module
from jettison.quantization import quantize
from jettison.targets import find_target

RESULTS = Path(__file__).with_name("results") / "kernel-audit.csv"
TARGETS = ("onnxruntime", "openvino")
SAMPLES = 32
HEAD = ("network", "target", "layers", "integer_mac_share", "float_time_share", "roundings_alone", "planted_found")


def audit_case(case: Case, target: str, folder: Path) -> tuple[str, ...]:
    """Export a network in int8 for a target, and once more with its middle layer left in float; return a line."""
    network, data = case.build(), tuple(x[:SAMPLES] for x in case.calibrate())
    graph = trace_module(network, [x[:2] for x in data]).module.requires_grad_(False)
    runtime = find_target(target)
    path, planted = folder / f"{case.name}.onnx", folder / f"{case.name}-planted.onnx"
    whole = quantize(graph, [data], scheme=runtime.scheme())
    name = whole.sites[len(whole.sites) // 2].layer
    mixed = quantize(graph, [data], scheme=runtime.scheme(), exclude=[name])
    first, names = tuple(x[:1] for x in data), list(case.inputs)
    for file, module in ((path, whole.module), (planted, mixed.module)):
        runtime.export(module, first, file, input_names=names, output_names=["y"], dynamic_batch=True)
    found = jt.audit(path, inputs=first, target=target, runs=20)
    left = [kernel.layer for kernel in jt.audit(planted, inputs=first, target=target, runs=3).left_in_float]
    print(f"{case.name} in {found.target}", *found.findings, sep="\n  ")
    return (
        case.name,
        target,
        str(sum(1 for kernel in found.kernels if kernel.stored)),
        f"{found.integer_share:.4f}",
        f"{found.float_share:.4f}",
        str(len(found.alone)),
        "yes" if left == [name] else f"no: {left} for {name}",
    )


def main(names: list[str]) -> None:
    """Audit the named networks, or all."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in [find_case(name) for name in names] or CASES:
            for target in TARGETS:
                rows.append(audit_case(case, target, Path(folder)))
                print("  ".join(rows[-1]), flush=True)
    if not names:
        with open(RESULTS, "w", newline="") as file:
            csv.writer(file).writerows([HEAD, *rows])


if __name__ == "__main__":
    main(sys.argv[1:])
