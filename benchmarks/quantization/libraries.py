"""Each library's own way from a float network to an int8 file: `python -m benchmarks.quantization.libraries`.

One call quantizes one network with one library in a process of its own, so that seconds and memory are its own, and
prints a JSON line. Timed is the whole way from the module and the calibration inputs to the int8 file: those that start
from a float file have to make it first, as their users do.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quantization.cases import find_case

INPUT = "x"


def export_float(model: nn.Module, data: Tensor, folder: Path) -> Path:
    """Write the float network as ONNX with one free batch dimension, by torch's own exporter."""
    path = folder / "float.onnx"
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        torch.onnx.export(
            model, (data[:2],), str(path), dynamo=True, input_names=[INPUT], dynamic_shapes=shapes,
            external_data=False, verbose=False,
        )  # fmt: skip
    return path


def quantize_with_jettison(model: nn.Module, data: Tensor, folder: Path) -> Path:
    import jettison as jt

    quantized = jt.quantize(model, data.split(32), samples=len(data))
    return jt.export(quantized.module, data[:1], folder / "jettison.onnx")


def quantize_with_onnxruntime(model: nn.Module, data: Tensor, folder: Path) -> Path:
    """`quantize_static` with its defaults: QDQ, signed activations, one scale per weight tensor."""
    return _quantize_static(model, data, folder, "onnxruntime.onnx", {})


def quantize_with_onnxruntime_per_channel(model: nn.Module, data: Tensor, folder: Path) -> Path:
    """The same with what its guide advises for accuracy and speed on x86: one scale per channel, u8 activations."""
    from onnxruntime.quantization import QuantType

    options = {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    return _quantize_static(model, data, folder, "onnxruntime-per-channel.onnx", options)


def _quantize_static(model: nn.Module, data: Tensor, folder: Path, name: str, options: dict[str, Any]) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, path = export_float(model, data, folder), folder / name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.items = iter([{INPUT: x.numpy()} for x in data.split(1)])

        def get_next(self) -> Any:
            return next(self.items, None)

    ready = path.with_suffix(".ready.onnx")
    quant_pre_process(str(source), str(ready))
    quantize_static(str(ready), str(path), Reader(), **options)
    return path


def quantize_with_nncf_onnx(model: nn.Module, data: Tensor, folder: Path) -> Path:
    import nncf
    import onnx

    network = onnx.load(export_float(model, data, folder))
    dataset = nncf.Dataset(data.split(1), lambda x: {INPUT: x.numpy()})
    path = folder / "nncf.onnx"
    onnx.save(nncf.quantize(network, dataset, subset_size=len(data)), path)
    return path


def quantize_with_nncf_openvino(model: nn.Module, data: Tensor, folder: Path) -> Path:
    import nncf
    import openvino

    network = openvino.convert_model(export_float(model, data, folder))
    dataset = nncf.Dataset(data.split(1), lambda x: x.numpy())
    path = folder / "nncf.xml"
    openvino.save_model(nncf.quantize(network, dataset, subset_size=len(data)), path, compress_to_fp16=False)
    return path


def quantize_with_torchao(model: nn.Module, data: Tensor, folder: Path) -> Path:
    """PT2E with the x86 quantizer's default configuration, written as ONNX by torch's own exporter."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        graph = torch.export.export(model, (data[:1],)).module()
        prepared = prepare_pt2e(graph, quantizer)
        for x in data.split(1):
            prepared(x)
        converted = convert_pt2e(prepared)
        path = folder / "torchao.onnx"
        torch.onnx.export(converted, (data[:1],), str(path), dynamo=True, input_names=[INPUT], external_data=False)
    return path


def quantize_with_ai_edge(model: nn.Module, data: Tensor, folder: Path) -> Path:
    """ai-edge-quantizer's static int8 recipe on the float LiteRT file."""
    import litert_torch
    from ai_edge_quantizer import quantizer as ai_edge
    from ai_edge_quantizer import recipe

    source, path = folder / "float.tflite", folder / "ai-edge.tflite"
    if not source.exists():
        litert_torch.convert(model, (data[:1],)).export(str(source))
    given = ai_edge.Quantizer(str(source), recipe.static_wi8_ai8())
    key = next(iter(_read_signature(source)))
    inputs = {key: [dict(zip(_read_signature(source)[key], (x.numpy(),), strict=True)) for x in data.split(1)]}
    path.write_bytes(bytes(given.quantize(given.calibrate(inputs)).quantized_model))
    return path


def _read_signature(path: Path) -> dict[str, list[str]]:
    from ai_edge_litert.interpreter import Interpreter

    return {k: list(v["inputs"]) for k, v in Interpreter(str(path)).get_signature_list().items()}


LIBRARIES: dict[str, Callable[[nn.Module, Tensor, Path], Path]] = {
    "jettison": quantize_with_jettison,
    "onnxruntime": quantize_with_onnxruntime,
    "onnxruntime-per-channel": quantize_with_onnxruntime_per_channel,
    "nncf-onnx": quantize_with_nncf_onnx,
    "nncf-openvino": quantize_with_nncf_openvino,
    "torchao": quantize_with_torchao,
    "ai-edge": quantize_with_ai_edge,
}


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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, processor = time.perf_counter(), time.process_time()
    path = LIBRARIES[given.library](model, data, given.folder)
    found = {
        "file": path.name,
        "seconds": round(time.perf_counter() - start, 2),
        "processor_s": round(time.process_time() - processor, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "before_mb": before // 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
