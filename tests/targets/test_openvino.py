"""What reaches OpenVINO: the same files, in the precision that was asked for, on the kernels that were hoped for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from examples.fashion_mnist.network import FashionNet
from torch import Tensor, nn
from torch.fx import GraphModule

from jettison.core.errors import CheckpointError, ShapeError, TargetMissing, UnknownName
from jettison.graph.trace import trace_module
from jettison.quantization import Quantized, quantize
from jettison.targets import onnxruntime
from jettison.targets import openvino as target
from jettison.targets.audit import match, share_of_integers
from jettison.targets.onnx_layers import list_layers

pytestmark = [pytest.mark.slow, pytest.mark.skipif(target.why_missing() is not None, reason=str(target.why_missing()))]

FLOAT_TOLERANCE = 1e-4
"""Relative to the largest output: another library sums in another order, and may use Winograd's convolutions."""
HALF_TOLERANCE = 0.03
"""Relative to the largest output: bfloat16 has 8 bits of mantissa, and some tens of layers each lose half a bit."""
WITHIN_ONE_STEP = {"fashion": 0.9999, "upsampled": 0.9999, "tokens": 0.999}
"""Share of outputs within one 8-bit step of the output's range. LayerNorm and GELU are computed in float by other code
than PyTorch's: a last bit of theirs turns a rounding now and then, and a turned one spreads over its row."""


class Upsampled(nn.Module):
    """A transposed convolution between two others: an integer kernel here, none in ONNX Runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = nn.Conv2d(3, 32, 3, 2, 1), nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(16, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.up(torch.relu(self.a(x)))))
        return y


class Tokens(nn.Module):
    """Patches, then two pairs of linear layers on tokens, of equal widths: their zero points are equal constants."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 64, 4, 4), nn.LayerNorm(64)
        self.a, self.b, self.c, self.d = (nn.Linear(i, o) for i, o in ((64, 128), (128, 64), (64, 128), (128, 64)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.b(nn.functional.gelu(self.a(self.norm(x))))
        return x + self.d(nn.functional.gelu(self.c(self.norm(x))))


NETS = {"fashion": FashionNet, "upsampled": Upsampled, "tokens": Tokens}
SHAPES = {"fashion": (1, 28, 28), "upsampled": (3, 32, 32), "tokens": (3, 16, 16)}


@dataclass(frozen=True)
class Case:
    """A net, its int8 form, and both files with a free batch."""

    graph: GraphModule
    quantized: Quantized
    float_file: Path
    int8_file: Path
    x: Tensor


def write(module: GraphModule, path: Path, x: Tensor, dynamic: bool = True) -> Path:
    target.export(module, (x,), path, input_names=["x"], output_names=["y"], dynamic_batch=dynamic)
    return path


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    torch.set_num_threads(1)
    folder, made = tmp_path_factory.mktemp("files"), {}
    for name, kind in NETS.items():
        torch.manual_seed(0)
        module = kind().train()
        for _ in range(3):
            module(torch.randn(8, *SHAPES[name]))
        graph = trace_module(module.eval(), (torch.randn(8, *SHAPES[name]),)).module.requires_grad_(False)
        quantized = quantize(graph, [(torch.randn(32, *SHAPES[name]),)], scheme=target.scheme())
        x = torch.randn(24, *SHAPES[name])
        files = (
            write(graph, folder / f"{name}_f.onnx", x[:1]),
            write(quantized.module, folder / f"{name}_q.onnx", x[:1]),
        )
        made[name] = Case(graph, quantized, *files, x)
    return made


def run(path: Path, x: Tensor, precision: str = "fp32") -> Tensor:
    return target.predict(target.load(path, threads=1, precision=precision), (x,))[0]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", NETS)
def test_float_file_equals_the_graph_in_real_float32(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    wanted = case.graph(case.x)[0]
    assert error(run(case.float_file, case.x), wanted) < FLOAT_TOLERANCE


@pytest.mark.parametrize("name", NETS)
def test_bf16_is_what_is_asked_for_and_never_the_default(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    try:
        found = run(case.float_file, case.x, "bf16")
    except TargetMissing as missing:
        pytest.skip(str(missing))
    assert FLOAT_TOLERANCE < error(found, case.graph(case.x)[0]) < HALF_TOLERANCE
    kinds = {o.precision for o in target.list_operators(case.float_file, None, threads=1, precision="bf16") if o.covers}
    assert "bf16" in kinds
    kinds = {o.precision for o in target.list_operators(case.float_file, None, threads=1) if o.covers}
    assert "bf16" not in kinds


def test_a_precision_the_processor_lacks_is_said(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def read_model(self, path: str) -> object:
            import openvino

            return openvino.Core().read_model(path)

        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(target, "_import_core", Core)
    with pytest.raises(TargetMissing, match="bfloat16"):
        target.load(cases["tokens"].float_file, threads=1, precision="bf16")
    with pytest.raises(UnknownName, match="fp32"):
        target.load(cases["tokens"].float_file, threads=1, precision="fp33")


def share_within_a_step(wanted: Tensor, given: Tensor) -> float:
    step = (wanted.max() - wanted.min()) / 255
    return float(((wanted - given).abs() <= step).float().mean())


@pytest.mark.parametrize("name", NETS)
def test_simulation_equals_the_runtime_within_a_step(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    given, wanted = run(case.int8_file, case.x), case.quantized.module(case.x)[0]
    assert share_within_a_step(wanted, given) >= WITHIN_ONE_STEP[name]
    planted = run(case.int8_file, case.x * 1.1)
    assert share_within_a_step(wanted, planted) < WITHIN_ONE_STEP[name]


def test_a_convolution_adds_before_it_rounds(cases: dict[str, Case]) -> None:
    """A file that asks for a rounding between a convolution and an addition does not get it, so the scheme has none."""
    case = cases["fashion"]
    asked = quantize(case.graph, [(case.x,)], scheme=replace(target.scheme(), summed=frozenset()))
    unasked = quantize(case.graph, [(case.x,)], scheme=target.scheme())
    shares = []
    for number, form in enumerate((asked, unasked)):
        file = write(form.module, case.int8_file.with_name(f"sums{number}.onnx"), case.x[:1])
        shares.append(share_within_a_step(form.module(case.x)[0], run(file, case.x)))
    assert shares[0] < WITHIN_ONE_STEP["fashion"] <= shares[1]


@pytest.mark.parametrize("name", NETS)
def test_all_layers_run_on_integers(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    layers = [site.layer for site in case.quantized.sites]
    assert target.audit(case.int8_file, layers) == dict.fromkeys(layers, True)
    assert target.audit(case.float_file, layers) == dict.fromkeys(layers, False)
    # Kernels for a known shape are others than those for a free batch, and they are the ones that run.
    operators = target.list_operators(case.int8_file, [case.x[:1].numpy()], threads=1, runs=3)
    kernels = match(list_layers(case.int8_file, [case.x[:1].shape]), operators)
    assert share_of_integers(kernels) == 1.0


def test_a_shared_zero_point_would_leave_layers_in_float(cases: dict[str, Case], tmp_path: Path) -> None:
    """Why `export` writes one for each layer: OpenVINO 2026.4 unpacks weights that share one, at every run."""
    import onnx

    model = onnx.load(cases["tokens"].int8_file)
    constants = {i.name: i.SerializeToString() for i in model.graph.initializer}
    first: dict[bytes, str] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants and len(node.input) == 3:
            value = next(i for i in model.graph.initializer if i.name == node.input[2])
            node.input[2] = first.setdefault(value.raw_data + bytes(value.int32_data), value.name)
    onnx.save(model, tmp_path / "shared.onnx")
    operators = target.list_operators(tmp_path / "shared.onnx", [cases["tokens"].x[:1].numpy()], threads=1, runs=3)
    kernels = match(list_layers(tmp_path / "shared.onnx", [(1, 3, 16, 16)]), operators)
    assert (share_of_integers(kernels) or 0.0) < 1.0


def test_transposed_convolution_is_left_out_for_onnxruntime_alone() -> None:
    assert "aten.conv_transpose2d.input" in target.scheme().weighted
    assert "aten.conv_transpose2d.input" not in onnxruntime.scheme().weighted


def test_excluded_layers_are_found_in_float(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["fashion"]
    result = quantize(case.graph, [(case.x,)], scheme=target.scheme(), exclude=["blocks.3.conv1"])
    found = target.audit(write(result.module, tmp_path / "mixed.onnx", case.x[:1]), [s.layer for s in result.sites])
    assert [name for name, integer in found.items() if not integer] == ["blocks.3.conv1"]


def test_ir_computes_the_same_and_stands_in_two_files(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["fashion"]
    for module, onnx in ((case.graph, case.float_file), (case.quantized.module, case.int8_file)):
        path = write(module, tmp_path / "model.xml", case.x[:1])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "model.xml"]
        assert torch.equal(run(path, case.x), run(onnx, case.x))
    assert path.with_suffix(".bin").stat().st_size < 1.1 * case.int8_file.stat().st_size


def test_any_batch_runs_and_few_forms_are_kept(cases: dict[str, Case]) -> None:
    case = cases["tokens"]
    session = target.load(case.float_file, threads=1)
    assert session.input_shapes == ((None, 3, 16, 16),) and session.input_names == ("x",)
    whole = case.graph(case.x)[0]
    for size in (1, 2, 3, 4, 5, 1):
        assert error(target.predict(session, (case.x[:size],))[0], whole[:size]) < FLOAT_TOLERANCE
    assert len(session.requests) == target.SHAPES_KEPT + 1


def test_fixed_batch_files_are_fed_in_pieces(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["tokens"]
    session = target.load(write(case.graph, tmp_path / "fixed.onnx", case.x[:2], dynamic=False), threads=1)
    assert session.input_shapes == ((2, 3, 16, 16),)
    assert error(target.predict(session, (case.x[:6],))[0], case.graph(case.x[:6])[0]) < FLOAT_TOLERANCE
    with pytest.raises(ShapeError, match="split"):
        target.predict(session, (case.x[:5],))


def test_profile_names_layers_and_memory_is_measured(cases: dict[str, Case]) -> None:
    case = cases["fashion"]
    shares = target.profile(case.int8_file, [case.x[:1].numpy()], threads=1, runs=5)
    assert [s.ms for s in shares] == sorted((s.ms for s in shares), reverse=True) and shares[-1].ms > 0
    assert {s.name for s in shares} >= {site.layer for site in case.quantized.sites}
    assert target.measure_peak_memory(case.int8_file, threads=1) > case.int8_file.stat().st_size


def test_importing_the_target_needs_neither_torch_nor_the_runtime() -> None:
    code = "import sys, jettison.targets.openvino; assert not {'torch', 'onnx', 'openvino'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_broken_file_is_a_checkpoint_error(cases: dict[str, Case], tmp_path: Path) -> None:
    whole = cases["tokens"].float_file.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "lonely.xml").write_text("<net/>")
    for name in ("cut.onnx", "lonely.xml", "none.onnx"):
        with pytest.raises(CheckpointError, match=name):
            target.load(tmp_path / name, threads=1)
    with pytest.raises(CheckpointError, match=r"cut\.onnx"):
        target.measure_peak_memory(tmp_path / "cut.onnx", threads=1)


def test_a_missing_runtime_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    assert "pip install openvino" in str(target.why_missing())
    with pytest.raises(TargetMissing, match="pip install openvino"):
        target.load(Path("x.onnx"), threads=1)
