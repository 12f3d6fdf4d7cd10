"""The audit: MACs are those of the cost model, planted float layers and roundings are found, and causes are named."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from examples.fashion_mnist.network import FashionNet
from torch import Tensor, nn
from torch.fx import GraphModule

import jettison as jt
from jettison.cli import main
from jettison.core.errors import CheckpointError, InputError, ShapeError
from jettison.cost.macs import count
from jettison.flow.auditing import audit
from jettison.graph.trace import trace_module
from jettison.quantization import quantize
from jettison.targets import onnxruntime, openvino
from jettison.targets.audit import Operator, match, share_of_integers, share_of_time, tell_integers
from jettison.targets.onnx_layers import FileLayer, list_layers

pytestmark = pytest.mark.slow
TARGETS = {"onnxruntime": onnxruntime, "openvino": openvino}


def needs(name: str) -> object:
    why = TARGETS[name].why_missing()
    return pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=str(why)))


BOTH = [needs(name) for name in TARGETS]


class Mixed(nn.Module):
    """Dense, depthwise, grouped and transposed convolutions, linear layers on tokens and on vectors, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.grouped, self.up = nn.Conv2d(32, 32, 3, 2, 1, groups=4), nn.ConvTranspose2d(32, 16, 2, 2)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.grouped(torch.relu(self.deep(torch.relu(self.stem(x))))))))
        x = self.mix(x.flatten(2).transpose(1, 2))
        x = nn.functional.softmax(x @ x.transpose(1, 2), -1) @ x
        logits: Tensor = self.head(x.mean(1))
        return logits


NETS = {"fashion": (FashionNet, (1, 28, 28)), "mixed": (Mixed, (3, 16, 16))}


def build(name: str) -> GraphModule:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, shape = NETS[name]
    return trace_module(kind().eval(), (torch.randn(4, *shape),)).module.requires_grad_(False)


def write(module: GraphModule, path: Path, shape: tuple[int, ...], target: ModuleType = onnxruntime) -> Path:
    x = torch.zeros(1, *shape)
    target.export(module, (x,), path, input_names=["x"], output_names=["y"], dynamic_batch=True)
    return path


@functools.cache
def make_int8(name: str, scheme: str, exclude: tuple[str, ...]) -> bytes:
    graph, shape = build(name), NETS[name][1]
    batches = [(torch.randn(8, *shape, generator=torch.Generator().manual_seed(1)),)]
    found = quantize(graph, batches, scheme=TARGETS[scheme].scheme(), exclude=exclude)
    with tempfile.TemporaryDirectory() as folder:
        return write(found.module, Path(folder) / "q.onnx", shape).read_bytes()


def write_int8(name: str, path: Path, scheme: str, exclude: tuple[str, ...] = ()) -> Path:
    path.write_bytes(make_int8(name, scheme, exclude))
    return path


@pytest.mark.parametrize("name", NETS)
def test_macs_read_from_the_file_are_those_of_the_graph(name: str, tmp_path: Path) -> None:
    graph, shape = build(name), NETS[name][1]
    for path in (write(graph, tmp_path / "f.onnx", shape), write_int8(name, tmp_path / "q.onnx", "openvino")):
        one, three = (list_layers(path, [(size, *shape)]) for size in (1, 3))
        assert sum(layer.macs for layer in one) == count(graph).macs
        assert [3 * layer.macs for layer in one] == [layer.macs for layer in three]
    assert {layer.stored for layer in one if layer.weight} == {"int8"}
    if name == "mixed":
        assert [layer.name for layer in one if layer.depthwise] == ["deep"]
        assert sum(not layer.weight for layer in one) == 2


@pytest.mark.parametrize("target", BOTH)
def test_a_cnn_runs_on_integers_throughout(target: str, tmp_path: Path) -> None:
    found = audit(write_int8("fashion", tmp_path / "q.onnx", target), target=target, runs=20)
    assert found.integer_share == 1.0 and found.precision == "int8"
    assert not found.left_in_float and not found.alone
    assert (found.float_share or 0.0) < 0.1
    text = str(found)
    assert "100.0% of the MACs" in text and "blocks.5.conv2" in text and found.target in text


@pytest.mark.parametrize("target", BOTH)
def test_a_planted_float_layer_is_found_and_named(target: str, tmp_path: Path) -> None:
    planted = "blocks.3.conv1"
    path = write_int8("fashion", tmp_path / "q.onnx", target, exclude=(planted,))
    found = audit(path, target=target, runs=3)
    assert [k.layer for k in found.left_in_float] == [planted]
    macs = {k.layer: k.macs for k in found.kernels}
    assert found.integer_share == pytest.approx(1 - macs[planted] / sum(macs.values()))
    assert found.alone and (found.float_share or 0.0) > 0.0
    assert any(f"'{planted}'" in finding and "exclude" in finding for finding in found.findings)


@pytest.mark.parametrize("target", BOTH)
def test_a_float_file_and_what_to_do(target: str, tmp_path: Path) -> None:
    found = audit(write(build("fashion"), tmp_path / "f.onnx", (1, 28, 28)), target=target, runs=3)
    assert found.integer_share == 0.0 and found.float_share == pytest.approx(1.0, abs=0.02)
    assert {k.precision for k in found.kernels} == {"fp32"} and "quantize" in found.findings[0]


class Words(nn.Module):
    """Token ids, a mask that must not hide them all, and a float vector."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(68, 10)

    def forward(self, ids: Tensor, mask: Tensor, extra: Tensor) -> Tensor:
        x = self.mix(self.table(ids))
        x = nn.functional.scaled_dot_product_attention(x, x, x, mask[:, None, :])
        logits: Tensor = self.head(torch.cat([x.mean(1), extra], -1))
        return logits


@pytest.mark.parametrize("target", BOTH)
def test_inputs_that_are_made_up_have_the_types_of_the_file(target: str, tmp_path: Path) -> None:
    ids, mask, extra = torch.ones(2, 12, dtype=torch.int64), torch.ones(2, 12, dtype=torch.bool), torch.randn(2, 4)
    path = jt.export(Words().eval(), (ids, mask, extra), tmp_path / "words.onnx")
    found = audit(path, target=target, runs=3)
    assert {"mix", "head"} <= {k.layer for k in found.kernels}
    given = audit(path, target=target, inputs=(ids, mask, extra), runs=3)
    assert [2 * k.macs for k in found.kernels] == [k.macs for k in given.kernels]


class Gated(nn.Module):
    """A product without a bias that is split: OpenVINO multiplies its scales in where the halves are read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Linear(64, 64), nn.Linear(64, 256, bias=False)
        self.down, self.head = nn.Linear(128, 64, bias=False), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.up(self.first(x)).chunk(2, -1)
        logits: Tensor = self.head(self.down(nn.functional.silu(left) * right).mean(1))
        return logits


@pytest.mark.parametrize("target", BOTH)
def test_scales_that_a_reader_multiplies_in_make_no_float_layer(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 32, 64)
    for exclude, share in (((), 1.0), (("up",), 1 - 64 * 256 * 32 / (64 * (64 + 256 + 128) * 32 + 640))):
        quantized = jt.quantize(Gated().eval(), [x], target=target, exclude=exclude)
        path = jt.export(quantized.module, x[:1], tmp_path / "gated.onnx", target=target)
        assert audit(path, target=target, inputs=x[:1], runs=3).integer_share == pytest.approx(share)


def test_int8_weights_that_a_runtime_unpacks_are_told_from_excluded_ones(tmp_path: Path) -> None:
    path = write_int8("mixed", tmp_path / "q.onnx", "openvino")
    found = audit(path, target="onnxruntime", runs=3)
    assert [k.layer for k in found.left_in_float] == ["up"] and found.left_in_float[0].stored == "int8"
    assert any("'up'" in f and "ConvTranspose" in f and "exclude" in f for f in found.findings)
    assert any("attention" in f for f in found.findings)


@pytest.mark.parametrize("target", BOTH)
def test_planted_roundings_around_a_float_operator_are_found(target: str, tmp_path: Path) -> None:
    """Quantize, dequantize, sigmoid, quantize, dequantize in the middle: no kernel takes any of them in."""
    import onnx
    from onnx import helper

    path = write_int8("fashion", tmp_path / "q.onnx", target)
    before = len(audit(path, target=target, runs=3).alone)
    model = onnx.load(path)
    nodes = list(model.graph.node)
    place = next(i for i, n in enumerate(nodes) if n.op_type == "Conv" and n.name == "blocks.3.conv1")
    conv, source = nodes[place], nodes[place].input[0]
    step = next(n for n in nodes if source in n.output).input[1:3]
    planted = [
        helper.make_node("Softplus", [source], ["p0"], name="planted"),
        helper.make_node("QuantizeLinear", ["p0", *step], ["p1"], name="quantize_planted"),
        helper.make_node("DequantizeLinear", ["p1", *step], ["p2"], name="dequantize_planted"),
    ]
    conv.input[0] = "p2"
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *planted, *nodes[place:]])
    onnx.save(model, tmp_path / "planted.onnx")
    found = audit(tmp_path / "planted.onnx", target=target, runs=3)
    assert len(found.alone) > before or (found.float_share or 0.0) > 0.0
    assert found.integer_share == 1.0


@pytest.mark.parametrize("target", BOTH)
def test_a_file_slower_than_its_baseline_is_said_first(target: str, tmp_path: Path) -> None:
    small = write_int8("fashion", tmp_path / "q.onnx", target)
    torch.manual_seed(0)
    wide = trace_module(FashionNet((128, 128, 128)).eval(), (torch.zeros(2, 1, 28, 28),)).module.requires_grad_(False)
    large = write(wide, tmp_path / "large.onnx", (1, 28, 28))
    found = audit(large, target=target, baseline=small, runs=3)
    assert found.speedup is not None and found.speedup.value < 0.5 and "slower" in found.findings[0]
    found = audit(small, target=target, baseline=large, runs=3)
    assert found.speedup is not None and found.speedup.value > 2 and not any("slower" in f for f in found.findings)


def test_a_small_network_is_told_that_calling_costs_as_much_as_computing(tmp_path: Path) -> None:
    found = audit(write_int8("mixed", tmp_path / "q.onnx", "onnxruntime"), runs=3)
    assert any("so small" in finding for finding in found.findings)


@pytest.mark.skipif(openvino.why_missing() is not None, reason=str(openvino.why_missing()))
def test_bf16_is_seen_where_it_runs(tmp_path: Path) -> None:
    if "avx512_bf16" not in (onnxruntime.read_cpu_flags() or ()):
        pytest.skip("this processor has no avx512_bf16")
    found = audit(
        write(build("fashion"), tmp_path / "f.onnx", (1, 28, 28)), target="openvino", precision="bf16", runs=3
    )
    assert {k.precision for k in found.kernels} == {"bf16"} and found.precision == "bf16"


def test_questions_that_cannot_be_answered(tmp_path: Path) -> None:
    path = write(build("fashion"), tmp_path / "f.onnx", (1, 28, 28))
    with pytest.raises(InputError, match="does not show"):
        audit(path, target="eager")
    with pytest.raises(ShapeError, match="takes"):
        audit(path, inputs=torch.zeros(1, 3, 28, 28))
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"no\.onnx"):
        audit(tmp_path / "no.onnx")
    with pytest.raises(CheckpointError, match=r"no\.onnx"):
        list_layers(tmp_path / "no.onnx", [(1, 1, 28, 28)])
    with pytest.raises(ShapeError, match="takes 1"):
        list_layers(path, [(1, 1, 28, 28), (1,)])
    with pytest.raises(ShapeError, match="free"):
        list_layers(path, [(1, 3, 28, 28)])


LAYER = FileLayer("conv", "Conv", "conv.weight", "int8", 100, False)
INTEGER = Operator("conv", "QLinearConv", "int8", ("conv", "conv.weight"), False, 0.5)


def test_one_float_kernel_makes_a_layer_float() -> None:
    """Planted: a layer that two kernels compute counts as the less reduced of them, and one without any as none."""
    half = replace(INTEGER, kernel="Conv", precision="fp32", ms=0.25)
    (whole,), (mixed,), (lost,) = (match([LAYER], ops) for ops in ([INTEGER], [INTEGER, half], []))
    assert (whole.precision, whole.ms) == ("int8", 0.5)
    assert (mixed.precision, mixed.kernel, mixed.ms) == ("fp32", "QLinearConv+Conv", 0.75)
    assert (lost.precision, lost.kernel, lost.ms) == ("", "not found", None)
    assert [share_of_integers(k) for k in ((whole,), (mixed,), (lost,), ())] == [1.0, 0.0, 0.0, None]
    assert tell_integers(["conv", "none"], [INTEGER]) == {"conv": True, "none": False}
    assert tell_integers(["conv"], [INTEGER, half]) == {"conv": False}


def test_shares_of_time() -> None:
    kinds = ("int8", "fp32", "rounding", "other")
    operators = [replace(INTEGER, precision=kind, ms=ms) for kind, ms in zip(kinds, (1.0, 2.0, 4.0, 1.0), strict=True)]
    shares = [share_of_time(operators, [kind]) for kind in kinds]
    assert shares == [0.125, 0.25, 0.5, 0.125] and share_of_time([], ["int8"]) is None


def test_the_command_prints_what_the_function_returns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_int8("mixed", tmp_path / "q.onnx", "onnxruntime")
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as done:
            main.main(["audit", str(path), *more])
        assert done.value.code == 0
    printed = capsys.readouterr().out
    text, _, plain = printed.partition("\n{")
    assert text.startswith("q.onnx in ONNX Runtime, int8") and "- " in text
    assert json.loads("{" + plain)["kernels"][0]["layer"] == "stem"
