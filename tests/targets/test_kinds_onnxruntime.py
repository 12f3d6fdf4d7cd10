"""Dynamic int8, weight-only and halves in ONNX Runtime and OpenVINO: the file computes what the module computes, in the
kernels that are meant for it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from jettison.core.errors import CheckpointError
from jettison.graph.trace import Traced, trace_module
from jettison.quantization import Quantized
from jettison.quantization.dynamic import quantize_dynamic
from jettison.quantization.half import store_half
from jettison.quantization.weight_only import quantize_weights
from jettison.targets import onnx_file, onnx_kinds, openvino
from jettison.targets import onnxruntime as target
from jettison.targets.operators import GROUP_KERNELS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(target.why_missing() is not None, reason=str(target.why_missing()))]
needs_openvino = pytest.mark.skipif(openvino.why_missing() is not None, reason=str(openvino.why_missing()))

SAME_INTEGERS = 2e-6
"""Relative to the largest output: the integers are the same, float32 sums of what they stand for come in another
order. One activation rounded to another integer would show as 1e-3."""


class Net(nn.Module):
    """Linear layers of rank 2 and 3, with and without bias, and a head tied to the embedding."""

    def __init__(self, width: int = 70, hidden: int = 97) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.a, self.norm, self.b = nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, width, bias=False)
        self.head = nn.Linear(width, 40, bias=False)
        self.head.weight = self.embed.weight
        self.pooled = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.embed(x)
        y = y + self.b(nn.functional.gelu(self.norm(self.a(y))))
        return self.head(y), self.pooled(y[:, 0])


ONE_STEP = 5e-3
"""Relative: between layers stand float operators whose last bit differs, so that now and then an activation of the next
layer that lies between two integers goes to the other one."""
ON_A_TIE = 1e-3
"""Share of outputs of a layer, each a sum over 72 activations, one of which may lie in the middle of two integers: the
kernels for groups do not say how they break ties, and about one activation in 200,000 goes the other way."""
LAYERS = ("a", "b", "head", "pooled")


def draw(batch: int) -> Tensor:
    return torch.randint(0, 40, (batch, 9), generator=torch.Generator().manual_seed(batch))


def trace(width: int, hidden: int) -> Traced:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return trace_module(Net(width, hidden).eval().requires_grad_(False), (draw(3),), {})


@pytest.fixture(scope="module")
def odd() -> Traced:
    return trace(70, 97)


@pytest.fixture(scope="module")
def even() -> Traced:
    return trace(64, 96)


def write(traced: Traced, quantized: Quantized, path: Path) -> Path:
    options = {"input_names": list(traced.input_names), "output_names": ["y", "z"], "dynamic_batch": True}
    onnx_file.export(quantized.module, traced.example, path, **options)  # type: ignore[arg-type]
    return path


def list_operators(path: Path, folder: Path) -> list[str]:
    """The runtime's own optimised graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


def compare(quantized: Quantized, outputs: tuple[Tensor, ...], x: Tensor) -> float:
    wanted = quantized.module(x)
    return max(float((w - g).abs().max() / w.abs().max()) for w, g in zip(wanted, outputs, strict=True))


def run_openvino(path: Path, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(y.copy()) for y in openvino.load(path, threads=1).run([x.numpy()]))


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 32, False), (4, 128, True), (8, 32, True), (8, 16, False)]
)
def test_weight_only_in_onnxruntime(odd: Traced, tmp_path: Path, bits: int, group: int, symmetric: bool) -> None:
    found = quantize_weights(odd.module, bits=bits, group=group, symmetric=symmetric)
    path = write(odd, found, tmp_path / "net.onnx")
    session = target.load(path, threads=1)
    for batch in (1, 3, 20):
        x = draw(batch)
        assert compare(found, target.predict(session, (x,)), x) < ONE_STEP
    kinds = list_operators(path, tmp_path)
    assert kinds.count("MatMulNBits") == len(LAYERS) and not {"MatMul", "Gemm", "DequantizeLinear"} & set(kinds)
    stored = {i.data_type for i in onnx.load(path).graph.initializer if i.name == "a.weight"}
    assert stored == {getattr(onnx.TensorProto, f"{'' if symmetric else 'U'}INT{bits}")}


def test_four_bits_take_an_eighth_and_the_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    traced = trace_module(nn.Linear(512, 256).eval().requires_grad_(False), (torch.randn(2, 512),), {})
    options = {"input_names": list(traced.input_names), "output_names": ["y"], "dynamic_batch": True}
    found = quantize_weights(traced.module, bits=4, group=32, symmetric=True)
    onnx_file.export(found.module, traced.example, tmp_path / "net.onnx", **options)  # type: ignore[arg-type]
    size = (tmp_path / "net.onnx").stat().st_size
    assert 512 * 256 * 5 / 8 <= size < 512 * 256 * 5 / 8 + 3000


def test_swapped_halves_of_a_byte_are_noticed(odd: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(proto: onnx.ModelProto, bits: dict[str, int]) -> None:
        pack(proto, bits)
        for constant in proto.graph.initializer:
            if constant.data_type == onnx.TensorProto.UINT4:
                constant.raw_data = bytes((b >> 4) | ((b & 15) << 4) for b in constant.raw_data)

    pack = onnx_kinds.pack_constants
    monkeypatch.setattr(onnx_file, "pack_constants", swap)
    found = quantize_weights(odd.module, bits=4)
    path = write(odd, found, tmp_path / "net.onnx")
    assert compare(found, target.predict(target.load(path, threads=1), (draw(3),)), draw(3)) > 0.01


def test_a_module_that_keeps_activations_float_would_be_noticed(odd: Traced, tmp_path: Path) -> None:
    """The runtime rounds activations as well; a module that did not say so would be off by far more than allowed."""
    found = quantize_weights(odd.module, bits=4)
    path = write(odd, found, tmp_path / "net.onnx")
    for node in found.module.graph.nodes:
        if "linear_groups" in str(node.target):
            node.update_arg(7, 0)
    found.module.recompile()
    assert compare(found, target.predict(target.load(path, threads=1), (draw(3),)), draw(3)) > 100 * SAME_INTEGERS


@pytest.mark.parametrize("kind", ["dynamic", "4 symmetric", "4", "8 symmetric", "8"])
def test_a_layer_is_the_same_integer_for_integer(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    traced = trace_module(nn.Linear(72, 7).eval().requires_grad_(False), (torch.randn(2, 72),), {})
    if kind == "dynamic":
        found = quantize_dynamic(traced.module, levels=target.scheme().weight)
    else:
        found = quantize_weights(traced.module, bits=int(kind[0]), symmetric="symmetric" in kind)
    options = {"input_names": list(traced.input_names), "output_names": ["y"], "dynamic_batch": True}
    onnx_file.export(found.module, traced.example, tmp_path / "net.onnx", **options)  # type: ignore[arg-type]
    session = target.load(tmp_path / "net.onnx", threads=1)
    for scale in (1e-3, 1.0, 1e3):
        x = torch.randn(3000, 72) * scale
        (wanted,), (given,) = found.module(x), target.predict(session, (x,))
        off = (wanted - given).abs() / wanted.abs().max()
        other = float((off > SAME_INTEGERS).float().mean())
        assert float(off.max()) < ONE_STEP and other <= (0.0 if kind == "dynamic" else ON_A_TIE)


def test_dynamic_in_onnxruntime(odd: Traced, tmp_path: Path) -> None:
    found = quantize_dynamic(odd.module, levels=target.scheme().weight)
    path = write(odd, found, tmp_path / "net.onnx")
    session = target.load(path, threads=1)
    for batch in (1, 3, 20):
        x = draw(batch)
        assert compare(found, target.predict(session, (x,)), x) < ONE_STEP
    kinds = list_operators(path, tmp_path)
    assert sum(kinds.count(k) for k in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")) == len(LAYERS)
    assert not {"MatMul", "Gemm"} & set(kinds)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_halves_in_onnxruntime(odd: Traced, tmp_path: Path, dtype: str) -> None:
    found = store_half(odd.module, dtype=dtype)
    path = write(odd, found, tmp_path / "net.onnx")
    assert compare(found, target.predict(target.load(path, threads=1), (draw(3),)), draw(3)) < SAME_INTEGERS
    # Casts fold into the weights when the file is loaded: what runs is the float network.
    assert "Cast" not in list_operators(path, tmp_path)
    kind = onnx.TensorProto.FLOAT16 if dtype == "fp16" else onnx.TensorProto.BFLOAT16
    wide = [i for i in onnx.load(path).graph.initializer if len(i.dims) > 1 and i.data_type != kind]
    assert not wide


@needs_openvino
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, False), (4, 128, True), (8, 32, True), (4, 16, True)])
def test_weight_only_in_openvino(even: Traced, tmp_path: Path, bits: int, group: int, symmetric: bool) -> None:
    kernels = GROUP_KERNELS["openvino"]
    found = quantize_weights(even.module, bits=bits, group=group, symmetric=symmetric, kernels=kernels)
    path = write(even, found, tmp_path / "net.onnx")
    assert all(site.bits == bits for site in found.sites)
    assert compare(found, run_openvino(path, draw(3)), draw(3)) < (SAME_INTEGERS if bits == 4 else ONE_STEP)


@needs_openvino
def test_openvino_refuses_a_last_group_that_is_smaller(odd: Traced, tmp_path: Path) -> None:
    """Why the module is made with whole groups for it: if this ever loads, the rule can go."""
    path = write(odd, quantize_weights(odd.module, bits=4), tmp_path / "net.onnx")
    with pytest.raises(CheckpointError, match="DequantizeLinear"):
        openvino.load(path, threads=1)
    whole = quantize_weights(odd.module, bits=4, kernels=GROUP_KERNELS["openvino"])
    assert {site.bits for site in whole.sites} == {32}
    run_openvino(write(odd, whole, tmp_path / "whole.onnx"), draw(3))


@needs_openvino
def test_dynamic_and_halves_in_openvino(odd: Traced, tmp_path: Path) -> None:
    levels = target.scheme().weight
    kinds = {"dynamic": quantize_dynamic(odd.module, levels=levels), "bf16": store_half(odd.module, dtype="bf16")}
    for name, found in kinds.items():
        path = write(odd, found, tmp_path / f"{name}.onnx")
        allowed = ONE_STEP if name == "dynamic" else SAME_INTEGERS
        assert compare(found, run_openvino(path, draw(3)), draw(3)) < allowed
