"""Recurrent layers on integers in ONNX Runtime: the file computes what the module computes, in integer kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from jettison.graph.trace import Traced, trace_module
from jettison.quantization import Quantized
from jettison.quantization.dynamic import quantize_dynamic
from jettison.targets import onnx_file
from jettison.targets import onnxruntime as target
from jettison.targets.audit import match
from jettison.targets.onnx_layers import list_layers

pytestmark = [pytest.mark.slow, pytest.mark.skipif(target.why_missing() is not None, reason=str(target.why_missing()))]

SAME_INTEGERS = 2e-6
"""Absolute, of outputs between -1 and 1: the integers are the same, float32 sums and sigmoids differ in last bits."""
ONE_STEP = 2e-2
"""The most by which a state may be off after a value between two integers went to the other one at an earlier step.
That happens: the range of a saturated state is -1 to 1, and its ends lie in the middle between two of the 255 steps."""
ANY_SIZE = dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), 1)
LAYERS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN, "relu": nn.RNN}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "deep, both ways, batch first": {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.1},
}


class Net(nn.Module):
    """A recurrent layer; its outputs and last states, in one tuple."""

    def __init__(self, kind: str, form: str, units: int = 24) -> None:
        super().__init__()
        options = {"nonlinearity": "relu"} if kind == "relu" else {}
        self.layer = LAYERS[kind](16, units, **options, **FORMS[form])

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        y, last = self.layer(x, states if len(states) == 2 else states[0] if states else None)
        return (y, *last) if isinstance(last, tuple) else (y, last)


def trace(net: nn.Module, *inputs: Tensor) -> Traced:
    torch.set_num_threads(1)
    return trace_module(net.eval().requires_grad_(False), inputs, {})


def quantize(traced: Traced, exclude: tuple[str, ...] = ()) -> Quantized:
    return quantize_dynamic(traced.module, levels=target.scheme().weight, exclude=exclude, smallest=ANY_SIZE)


def write(traced: Traced, found: Quantized, path: Path) -> Path:
    names = [f"y{i}" for i in range(traced.out_spec.num_leaves)]
    options = {"input_names": list(traced.input_names), "output_names": names, "dynamic_batch": traced.dynamic_batch}
    onnx_file.export(found.module, traced.example, path, **options)  # type: ignore[arg-type]
    return path


def compare(found: Quantized, path: Path, *inputs: Tensor) -> list[Tensor]:
    given = target.predict(target.load(path, threads=1), inputs)
    return [(w - g).abs() for w, g in zip(found.module(*inputs), given, strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_file_computes_what_the_module_does(kind: str, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    traced = trace(Net(kind, form), torch.randn(6, 6, 16))
    found = quantize(traced)
    assert [site.bits for site in found.sites] == [8]
    path = write(traced, found, tmp_path / "net.onnx")
    # Where the batch stands second, torch.export cannot leave the first dimension free.
    batches = (1, 6, 9) if traced.dynamic_batch else (6,)
    for batch in batches:
        for scale in (0.1, 1.0, 10.0):
            for off in compare(found, path, torch.randn(batch, 6, 16) * scale):
                limit = max(1.0, scale) if kind == "relu" else 1.0
                assert float(off.max()) < ONE_STEP * limit
                assert scale > 1 or float(off.median()) < SAME_INTEGERS
    assert target.audit(path, ["layer", "none"]) == {"layer": True, "none": False}


@pytest.mark.parametrize("kind", LAYERS)
def test_one_step_is_the_same_integer_for_integer(kind: str, tmp_path: Path) -> None:
    """From given states, with many rows: nothing is handed on that could be off."""
    torch.manual_seed(0)
    x, h = torch.randn(1, 500, 16), torch.randn(1, 500, 24)
    inputs = (x, h, torch.randn(1, 500, 24)) if kind == "lstm" else (x, h)
    traced = trace(Net(kind, "plain"), *inputs)
    path = write(traced, found := quantize(traced), tmp_path / "net.onnx")
    for off in compare(found, path, *inputs):
        assert float(off.max()) < 2 * SAME_INTEGERS  # states reach beyond 1 here


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("which", ["int8_ih_l0", "scale_hh_l0", "bias_l0"])
def test_other_numbers_are_noticed(kind: str, which: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 6, 16)
    traced = trace(Net(kind, "plain"), x)
    path = write(traced, found := quantize(traced), tmp_path / "net.onnx")
    value = found.module.get_buffer(f"layer.{which}")
    value.copy_(value.roll(1, -1) if which.startswith("int8") else value * 1.5)
    assert float(compare(found, path, x)[0].max()) > ONE_STEP


def test_first_states_are_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    form = "deep, both ways, batch first"
    x, h, c = torch.randn(3, 6, 16), torch.randn(4, 3, 24), torch.randn(4, 3, 24)
    traced = trace(Net("lstm", form), x, h, c)
    path = write(traced, found := quantize(traced), tmp_path / "net.onnx")
    assert all(float(off.max()) < ONE_STEP for off in compare(found, path, x, h, c))
    swapped = target.predict(target.load(path, threads=1), (x, h.flip(0), c))[0]
    assert float((swapped - found.module(x, h, c)[0]).abs().max()) > ONE_STEP


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_threads_share_sequences_and_their_ranges(kind: str, tmp_path: Path) -> None:
    """The LSTM's kernel takes a range for the sequences of one thread: near, and no longer the same integers."""
    torch.manual_seed(0)
    x = torch.randn(6, 6, 16)
    traced = trace(Net(kind, "deep, both ways, batch first"), x)
    path = write(traced, found := quantize(traced), tmp_path / "net.onnx")
    for threads in (1, 2):
        (given, *_) = target.predict(target.load(path, threads=threads), (x,))
        off = (given - found.module(x)[0]).abs()
        assert float(off.max()) < ONE_STEP
        assert (float(off.median()) < SAME_INTEGERS) == (threads == 1 or kind == "gru")


class Twice(nn.Module):
    """One LSTM called twice, another one, a GRU and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.other = nn.LSTM(16, 16, batch_first=True), nn.LSTM(16, 8, batch_first=True)
        self.gru, self.head = nn.GRU(8, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gru(self.other(self.same(self.same(x)[0])[0])[0])[0])
        return y


def test_the_audit_tells_integers_from_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 16)
    traced = trace(Twice(), x)
    whole, mixed = quantize(traced), quantize(traced, exclude=("other", "same@2"))
    assert [site.layer for site in whole.sites] == ["same", "same@2", "other", "gru", "head"]
    assert [site.bits for site in mixed.sites] == [8, 32, 32, 8, 8]
    names = ["same", "other", "gru", "head"]
    path = write(traced, whole, tmp_path / "whole.onnx")
    assert target.audit(path, names) == dict.fromkeys(names, True)
    assert float(compare(whole, path, x)[0].max()) < ONE_STEP
    path = write(traced, mixed, tmp_path / "mixed.onnx")
    assert float(compare(mixed, path, x)[0].max()) < ONE_STEP
    assert target.audit(path, names) == {"same": True, "other": False, "gru": True, "head": True}


def test_layers_of_a_file_are_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 16)
    traced = trace(Twice(), x)
    path = write(traced, quantize(traced), tmp_path / "net.onnx")
    kernels = match(list_layers(path, [x.shape]), target.list_operators(path, [x.numpy()], threads=1, runs=3))
    assert {(k.stored, k.precision, k.weights_only) for k in kernels} == {("int8", "int8", False)}
    rows = 3 * 6
    lstms, gru = rows * (2 * 64 * 32 + 32 * 24), rows * 36 * 20
    assert sum(k.macs for k in kernels) == lstms + gru + rows * 12 * 3


def test_steps_in_float_would_be_noticed(tmp_path: Path) -> None:
    """A Scan whose body multiplies floats is not an integer one."""
    torch.manual_seed(0)
    traced = trace(Net("gru", "plain"), torch.randn(6, 6, 16))
    path = write(traced, quantize(traced), tmp_path / "net.onnx")
    model = onnx.load(path)
    (scan,) = (node for node in model.graph.node if node.op_type == "Scan")
    (body,) = (a.g for a in scan.attribute if a.name == "body")
    (weight,) = (i for i in body.initializer if i.name.endswith("int8_hh_l0"))
    floats = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).astype("float32"), weight.name)
    weight.CopyFrom(floats)
    kept = [n for n in body.node if n.op_type != "DynamicQuantizeLinear" and "h_scale" not in n.output]
    for node in kept:
        if node.op_type == "MatMulInteger":
            node.op_type = "MatMul"
            node.input[:] = ["h", weight.name]
        elif node.op_type == "Cast":
            node.op_type = "Identity"
            node.ClearField("attribute")
        elif "h_scaled" in node.output:
            node.input[1] = next(i.name for i in body.initializer if list(i.dims) == [72])
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in kept]
    del body.node[:]
    body.node.extend(copies)
    onnx.save(model, path)
    assert target.audit(path, ["layer"]) == {"layer": False}
