"""What reaches ONNX Runtime: the exported file computes what the graph computes, on integers, and is small."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from examples.fashion_mnist.network import FashionNet
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from jettison.core.errors import CheckpointError, ExportError, ShapeError, TargetMissing
from jettison.quantization import Quantized, quantize
from jettison.quantization.integers import add_as_kernel, run_integers
from jettison.targets import onnxruntime as target

pytestmark = [pytest.mark.slow, pytest.mark.skipif(target.why_missing() is not None, reason=str(target.why_missing()))]

FLOAT_TOLERANCE = 1e-5
"""Relative to the largest output: two float32 libraries sum in different orders."""
WITHIN_ONE_STEP = 0.9999
"""Share of outputs that may differ by at most one 8-bit step of the output's range (algorithms.md 4.1)."""


class Mobile(nn.Module):
    """Depthwise convolutions between pointwise ones, with ReLU6, as in MobileNet."""

    def __init__(self) -> None:
        super().__init__()

        def block(width: int, out: int, stride: int) -> nn.Sequential:
            wide = 3 * width
            layers: list[nn.Module] = [nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
            layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
            return nn.Sequential(*layers, nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out))

        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.one, self.two = block(16, 16, 1), block(16, 24, 2)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        logits: Tensor = self.fc(torch.flatten(self.pool(self.two(x + self.one(x))), 1))
        return logits


class Joined(nn.Module):
    """Two branches that are concatenated, pooled, and read by a two-layer perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.fc1, self.fc2 = nn.Linear(160, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.a(x)), 2)
        x = torch.cat([torch.relu(self.c(x)), torch.relu(self.b(x))], 1)
        logits: Tensor = self.fc2(torch.relu(self.fc1(nn.functional.avg_pool2d(x, 4).flatten(1))))
        return logits


SHAPES = {"fashion": (1, 28, 28), "mobile": (3, 32, 32), "joined": (3, 16, 16)}
NETS = {"fashion": FashionNet, "mobile": Mobile, "joined": Joined}


@dataclass(frozen=True)
class Case:
    """A net, its int8 form, and both files with a free batch."""

    graph: GraphModule
    quantized: Quantized
    float_file: Path
    int8_file: Path
    x: Tensor


def trace(module: nn.Module, x: Tensor) -> GraphModule:
    module.train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn_like(x) * 2 + 0.5)
    program = torch.export.export(module.eval(), (x,), strict=False, dynamic_shapes=({0: Dim.AUTO},))
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    graph.graph.set_codegen(CodeGen())
    graph.recompile()
    return graph.requires_grad_(False)


def write(module: GraphModule, path: Path, x: Tensor, dynamic: bool = True) -> Path:
    target.export(module, (x,), path, input_names=["x"], output_names=["y"], dynamic_batch=dynamic)
    return path


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    torch.set_num_threads(1)
    folder, made = tmp_path_factory.mktemp("files"), {}
    for name, kind in NETS.items():
        torch.manual_seed(0)
        graph = trace(kind(), torch.randn(8, *SHAPES[name]))
        quantized = quantize(graph, [(torch.randn(16, *SHAPES[name]),) for _ in range(2)], scheme=target.scheme())
        x = torch.randn(48, *SHAPES[name])
        files = (
            write(graph, folder / f"{name}_f.onnx", x[:1]),
            write(quantized.module, folder / f"{name}_q.onnx", x[:1]),
        )
        made[name] = Case(graph, quantized, *files, x)
    return made


def run(path: Path, x: Tensor) -> Tensor:
    return target.predict(target.load(path, threads=1), (x,))[0]


def share_within_a_step(wanted: Tensor, given: Tensor) -> float:
    step = (wanted.max() - wanted.min()) / 255
    return float(((wanted - given).abs() <= step).float().mean())


@pytest.mark.parametrize("name", NETS)
def test_float_file_equals_the_graph(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    wanted = case.graph(case.x)[0]
    assert float((run(case.float_file, case.x) - wanted).abs().max() / wanted.abs().max()) < FLOAT_TOLERANCE


@pytest.mark.parametrize("name", NETS)
def test_simulation_equals_the_runtime(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    given = run(case.int8_file, case.x)
    assert share_within_a_step(case.quantized.module(case.x)[0], given) >= WITHIN_ONE_STEP


@pytest.mark.parametrize("name", NETS)
def test_whole_number_reference_equals_the_runtime(cases: dict[str, Case], name: str) -> None:
    """Exact sums: nine samples of ten agree to the last bits; the float simulation reaches three of four."""
    case = cases[name]
    given, (wanted,) = run(case.int8_file, case.x), run_integers(case.quantized.module, (case.x,), target.scheme())
    same = ((wanted - given).abs().amax(1) <= FLOAT_TOLERANCE * wanted.abs().max()).float().mean()
    assert float(same) >= 0.9 and share_within_a_step(wanted, given) >= WITHIN_ONE_STEP


@pytest.mark.parametrize("name", NETS)
def test_a_wrong_weight_scale_is_noticed(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    scale = case.quantized.module.get_buffer(f"{case.quantized.sites[1].layer}.weight_scale")
    kept = scale.clone()
    try:
        scale.mul_(2)
        wanted = case.quantized.module(case.x)[0]
    finally:
        scale.copy_(kept)
    assert share_within_a_step(wanted, run(case.int8_file, case.x)) < WITHIN_ONE_STEP


@pytest.mark.parametrize("name", NETS)
def test_every_layer_runs_on_integers(cases: dict[str, Case], name: str) -> None:
    layers = [site.layer for site in cases[name].quantized.sites]
    assert target.audit(cases[name].int8_file, layers) == dict.fromkeys(layers, True)
    assert target.audit(cases[name].float_file, layers) == dict.fromkeys(layers, False)


def test_audit_notices_a_layer_left_in_float(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["joined"]
    result = quantize(case.graph, [(case.x,)], scheme=target.scheme(), exclude=["b", "fc1"])
    found = target.audit(
        write(result.module, tmp_path / "mixed.onnx", case.x[:1]), ["a", "b", "c", "fc1", "fc2", "none"]
    )
    assert found == {"a": True, "b": False, "c": True, "fc1": False, "fc2": True, "none": False}


def test_int8_file_is_a_quarter_and_self_contained(cases: dict[str, Case]) -> None:
    import onnx

    case = cases["fashion"]
    assert case.int8_file.stat().st_size < 0.27 * case.float_file.stat().st_size
    assert not list(case.int8_file.parent.glob("*.data")) and not list(case.int8_file.parent.glob(".*"))
    model = onnx.load(case.int8_file)
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    layers = [site.layer for site in case.quantized.sites]
    assert {kinds[f"{name}.weight"] for name in layers} == {onnx.TensorProto.INT8}
    assert {kinds[f"{name}.bias"] for name in layers} == {onnx.TensorProto.INT32}
    floats = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    assert sum(int(np.prod(i.dims)) for i in floats) < 5_000  # scales only
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_batches_of_1_and_5_agree(cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        five = run(case.int8_file, case.x[:5])
        ones = torch.cat([run(case.int8_file, row) for row in case.x[:5].split(1)])
        assert torch.allclose(five, ones, atol=1e-6), name


def test_fixed_batch_files_are_fed_in_pieces(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["joined"]
    path = write(case.quantized.module, tmp_path / "fixed.onnx", case.x[:2], dynamic=False)
    session = target.load(path, threads=1)
    assert session.input_shapes == ((2, 3, 16, 16),)
    assert torch.allclose(target.predict(session, (case.x[:6],))[0], run(case.int8_file, case.x[:6]), atol=1e-6)
    with pytest.raises(ShapeError, match="split"):
        target.predict(session, (case.x[:5],))
    with pytest.raises(ShapeError, match=r"\(None is free\)"):
        target.predict(session, (torch.zeros(2, 3, 8, 8),))
    with pytest.raises(ShapeError, match="takes 1"):
        target.predict(session, (case.x, case.x))


def test_profile_names_layers(cases: dict[str, Case]) -> None:
    case = cases["fashion"]
    for path, first in ((case.float_file, "Conv"), (case.int8_file, "QLinearConv")):
        shares = target.profile(path, [case.x[:1].numpy()], threads=1, runs=10)
        assert shares[0].operator == first and shares[0].name.startswith("blocks.") and shares[0].ms > 0
        assert [s.ms for s in shares] == sorted((s.ms for s in shares), reverse=True)
        assert len([s for s in shares if s.operator == first]) == 15


def test_peak_memory_grows_with_the_network(cases: dict[str, Case], tmp_path: Path) -> None:
    small = target.measure_peak_memory(cases["joined"].float_file, threads=1)
    graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2048)), torch.zeros(2, 3, 32, 32))
    large = target.measure_peak_memory(write(graph, tmp_path / "large.onnx", torch.zeros(1, 3, 32, 32)), threads=1)
    assert large - small > 3072 * 2048 * 4 * 0.8  # at least its 25 MB of weights, less what pages already stood ready


def test_what_onnx_cannot_say_is_an_export_error(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    program = torch.export.export(Odd().eval(), (torch.zeros(2, 3),), strict=False)
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    with pytest.raises(ExportError, match="bessel_j0"):
        write(graph, tmp_path / "odd.onnx", torch.zeros(2, 3))
    assert not list(tmp_path.iterdir())


def test_bits_follow_the_cpu() -> None:
    assert target.scheme(frozenset({"avx512_vnni"})).weight.q_max == 127
    assert target.scheme(frozenset({"asimddp"})).weight.q_max == 127
    assert target.scheme(frozenset({"avx2", "avx512f"})).weight.q_max == 63


def test_importing_the_target_needs_neither_torch_nor_the_runtime() -> None:
    code = (
        "import sys, jettison.targets.onnxruntime, jettison.targets.timing, jettison.quantization;"
        "assert not {'torch', 'onnx', 'onnxruntime', 'torchao'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_runtime_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "NEEDED", ("onnx", "no_such_runtime"))
    assert "pip install no_such_runtime" in str(target.why_missing())
    with pytest.raises(TargetMissing, match="pip install"):
        target.load(Path("x.onnx"), threads=1)


def test_a_cut_file_is_a_checkpoint_error(cases: dict[str, Case], tmp_path: Path) -> None:
    whole = cases["joined"].int8_file.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    for ask in (target.load, target.measure_peak_memory):
        with pytest.raises(CheckpointError, match=r"cut\.onnx"):
            ask(tmp_path / "cut.onnx", threads=1)


def kernel_sums(left: np.ndarray, right: np.ndarray, scales: list[np.float32], zero_points: list[int]) -> np.ndarray:
    """Add two integer tensors in the runtime itself."""
    from onnx import TensorProto, helper

    kinds = {"s": TensorProto.FLOAT, "z": TensorProto.UINT8}
    values = {f"s{i}": s for i, s in enumerate(scales)} | {f"z{i}": z for i, z in enumerate(zero_points)}
    constants = [helper.make_tensor(name, kinds[name[0]], [], [value]) for name, value in values.items()]
    nodes = [
        helper.make_node("DequantizeLinear", ["a", "s0", "z0"], ["fa"]),
        helper.make_node("DequantizeLinear", ["b", "s1", "z1"], ["fb"]),
        helper.make_node("Add", ["fa", "fb"], ["f"]),
        helper.make_node("QuantizeLinear", ["f", "s2", "z2"], ["c"]),
    ]
    shapes = [helper.make_tensor_value_info(n, TensorProto.UINT8, list(left.shape)) for n in "abc"]
    graph = helper.make_graph(nodes, "add", shapes[:2], shapes[2:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    import onnxruntime

    sums = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"a": left, "b": right})[0]
    return np.asarray(sums).astype(int)


@pytest.mark.skipif(
    not {"fma"} <= (target.read_cpu_flags() or frozenset()), reason="the reference follows the kernel for x86 with FMA"
)
def test_sums_of_integer_tensors_round_as_the_kernel_does() -> None:
    """Every pair of 8-bit numbers, with scales that make many ties; another order of the additions is noticed."""
    rng = np.random.default_rng(0)
    left, right = (g.reshape(1, 1, 256, 256) for g in np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2))
    a, b = torch.from_numpy(left.copy()), torch.from_numpy(right.copy())
    swapped = 0
    for _ in range(20):
        unit = rng.uniform(0.001, 0.05)
        multiples = (*rng.integers(1, 16, 2), rng.choice([2, 4, 6, 8, 10, 12]))
        scales = [np.float32(unit * m) for m in multiples]
        zeros = [int(z) for z in rng.integers(0, 256, 3)]
        wanted = kernel_sums(left, right, scales, zeros)
        steps = tuple(torch.tensor(s) for s in scales)
        found = add_as_kernel(a, b, steps, tuple(zeros)).round().clamp(0, 255)
        assert np.array_equal(found.numpy().astype(int), wanted)
        other = add_as_kernel(b, a, (steps[1], steps[0], steps[2]), (zeros[1], zeros[0], zeros[2]))
        swapped += int((other.round().clamp(0, 255).numpy().astype(int) != wanted).sum())
    assert swapped > 0
