"""Each library's own way from a float network to an int8 file: `python -m benchmarks.quantization.libraries`.

One call quantizes one network with one library in a process of its own, so that seconds and memory are its own, and
prints a JSON line. Timed is the whole way from the module and the calibration inputs to the int8 file: those that start
from a float file have to make it first, as their users do.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quantization.cases import Case, Inputs, find_case, split

Quantize = Callable[[Case, nn.Module, Inputs, Path], Path]


def _first(data: Inputs, rows: int) -> Inputs:
    return tuple(x[:rows] for x in data)


def _feed(case: Case, item: Inputs) -> dict[str, Any]:
    return {name: x.numpy() for name, x in zip(case.inputs, item, strict=True)}


def export_float(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    """Write the float network as ONNX with one free batch dimension, by torch's own exporter."""
    path = folder / "float.onnx"
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in data)
    with torch.no_grad():
        torch.onnx.export(
            model, _first(data, 2), str(path), dynamo=True, input_names=list(case.inputs), dynamic_shapes=shapes,
            external_data=False, verbose=False,
        )  # fmt: skip
    return path


def quantize_with_jettison(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    return _quantize_for("onnxruntime", model, data, folder / "jettison.onnx")


def quantize_with_jettison_for_openvino(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    return _quantize_for("openvino", model, data, folder / "jettison-openvino.onnx")


def quantize_with_jettison_for_litert(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    return _quantize_for("litert", model, data, folder / "jettison.tflite")


def _quantize_for(target: str, model: nn.Module, data: Inputs, path: Path) -> Path:
    import jettison as jt

    quantized = jt.quantize(model, split(data, 32), samples=len(data[0]), target=target)
    return jt.export(quantized.module, _first(data, 1), path, target=target)


def quantize_with_jettison_dynamic(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    import jettison as jt

    quantized = jt.quantize(model, split(data, 32), kind="dynamic")
    return jt.export(quantized.module, _first(data, 1), folder / "jettison-dynamic.onnx")


def quantize_with_onnxruntime(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    """`quantize_static` with its defaults: QDQ, signed activations, one scale per weight tensor."""
    return _quantize_static(case, model, data, folder, "onnxruntime.onnx", {})


def quantize_with_onnxruntime_per_channel(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    """The same with what its guide advises for accuracy and speed on x86: one scale per channel, u8 activations."""
    from onnxruntime.quantization import QuantType

    options = {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    return _quantize_static(case, model, data, folder, "onnxruntime-per-channel.onnx", options)


def _quantize_static(
    case: Case, model: nn.Module, data: Inputs, folder: Path, name: str, options: dict[str, Any]
) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.items = iter([_feed(case, item) for item in split(data, 1)])

        def get_next(self) -> Any:
            return next(self.items, None)

    ready, path = _prepare_onnx(case, model, data, folder), folder / name
    quantize_static(str(ready), str(path), Reader(), **options)
    return path


def _prepare_onnx(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = folder / "ready.onnx"
    quant_pre_process(str(export_float(case, model, data, folder)), str(ready))
    return ready


def quantize_with_onnxruntime_dynamic(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    """`quantize_dynamic` with its defaults."""
    from onnxruntime.quantization import quantize_dynamic

    ready, path = _prepare_onnx(case, model, data, folder), folder / "onnxruntime-dynamic.onnx"
    quantize_dynamic(str(ready), str(path))
    return path


def _tell_nncf(case: Case, data: Inputs) -> dict[str, Any]:
    import nncf

    kind = nncf.ModelType.TRANSFORMER if case.transformer else None
    return {"subset_size": len(data[0]), "model_type": kind}


def quantize_with_nncf_onnx(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    import nncf
    import onnx

    network = onnx.load(export_float(case, model, data, folder))
    dataset = nncf.Dataset(split(data, 1), lambda item: _feed(case, item))
    path = folder / "nncf.onnx"
    onnx.save(nncf.quantize(network, dataset, **_tell_nncf(case, data)), path)
    return path


def quantize_with_nncf_openvino(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    import nncf
    import openvino

    network = openvino.convert_model(export_float(case, model, data, folder))
    dataset = nncf.Dataset(split(data, 1), lambda item: _feed(case, item))
    path = folder / "nncf.xml"
    quantized = nncf.quantize(network, dataset, **_tell_nncf(case, data))
    openvino.save_model(quantized, path, compress_to_fp16=False)
    return path


def quantize_with_torchao(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    """PT2E with the x86 quantizer's default configuration, written as ONNX by torch's own exporter."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        graph = torch.export.export(model, _first(data, 1)).module()
        prepared = prepare_pt2e(graph, quantizer)
        for item in split(data, 1):
            prepared(*item)
        converted = convert_pt2e(prepared)
        path = folder / "torchao.onnx"
        names = list(case.inputs)
        torch.onnx.export(
            converted, _first(data, 1), str(path), dynamo=True, input_names=names, external_data=False
        )  # fmt: skip
    return path


def quantize_with_torchao_unshared(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    """The same after a change by hand: each use of an activation module gets a module of its own."""
    graph = torch.fx.symbolic_trace(model)
    seen: set[str] = set()
    for index, node in enumerate(graph.graph.nodes):
        if node.op == "call_module" and isinstance(graph.get_submodule(node.target), (nn.ReLU, nn.ReLU6)):
            if node.target in seen:
                name = f"activation_{index}"
                graph.add_submodule(name, type(graph.get_submodule(node.target))())
                node.target = name
            seen.add(node.target)
        node.meta.clear()  # it names the module the activation had before, and the quantizer would believe it
    graph.recompile()
    return quantize_with_torchao(case, graph.eval(), data, folder)


def quantize_with_ai_edge(case: Case, model: nn.Module, data: Inputs, folder: Path) -> Path:
    """ai-edge-quantizer's static int8 recipe on the float LiteRT file."""
    import litert_torch
    from ai_edge_quantizer import quantizer as ai_edge
    from ai_edge_quantizer import recipe

    source, path = folder / "float.tflite", folder / "ai-edge.tflite"
    litert_torch.convert(model, _first(data, 1)).export(str(source))
    given = ai_edge.Quantizer(str(source), recipe.static_wi8_ai8())
    key, names = next(iter(_read_signature(source).items()))
    # The converter makes int32 of whole numbers.
    narrow = tuple(x.int() if x.dtype == torch.int64 else x for x in data)
    inputs = {key: [{n: x.numpy() for n, x in zip(names, item, strict=True)} for item in split(narrow, 1)]}
    path.write_bytes(bytes(given.quantize(given.calibrate(inputs)).quantized_model))
    return path


def _read_signature(path: Path) -> dict[str, list[str]]:
    from ai_edge_litert.interpreter import Interpreter

    return {k: list(v["inputs"]) for k, v in Interpreter(str(path)).get_signature_list().items()}


LIBRARIES: dict[str, Quantize] = {
    "jettison": quantize_with_jettison,
    "jettison-dynamic": quantize_with_jettison_dynamic,
    "jettison-openvino": quantize_with_jettison_for_openvino,
    "jettison-litert": quantize_with_jettison_for_litert,
    "onnxruntime": quantize_with_onnxruntime,
    "onnxruntime-per-channel": quantize_with_onnxruntime_per_channel,
    "onnxruntime-dynamic": quantize_with_onnxruntime_dynamic,
    "nncf-onnx": quantize_with_nncf_onnx,
    "nncf-openvino": quantize_with_nncf_openvino,
    "torchao": quantize_with_torchao,
    "torchao-unshared": quantize_with_torchao_unshared,
    "ai-edge": quantize_with_ai_edge,
}
TRANSFORMERS_ONLY = ("jettison-dynamic", "onnxruntime-dynamic")
AFTER = {"torchao-unshared": "torchao"}
"""Run only where the other one failed."""


def read_peak_kb() -> int:
    """Return this process's peak resident memory; Linux's ru_maxrss would hold that of the parent, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=list(LIBRARIES))
    parser.add_argument("case")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = find_case(given.case)
    model, data = case.build(), case.calibrate()
    before = read_peak_kb()
    start, processor = time.perf_counter(), time.process_time()
    path = LIBRARIES[given.library](case, model, data, given.folder)
    found = {
        "file": path.name,
        "seconds": round(time.perf_counter() - start, 2),
        "processor_s": round(time.process_time() - processor, 2),
        "peak_mb": read_peak_kb() // 1024,
        "before_mb": before // 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
