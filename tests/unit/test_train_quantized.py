"""`train_quantized` from the front: nearer to the original, resumable, pruned networks, ternary and binary weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import jettison as jt
from jettison.core.errors import CheckpointError, InputError, UnknownName
from jettison.flow.qat import train_quantized
from jettison.graph.trace import Batch, trace_module
from jettison.quantization import quantize
from jettison.quantization.bits import find_ends
from jettison.quantization.convert import fold
from jettison.quantization.fold import find_layers
from jettison.quantization.qat import convert_trained, make_trainable
from jettison.targets.onnxruntime import scheme
from jettison.testing import build_model


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Net(nn.Module):
    """A stem, a residual step, a concatenation with a moved tensor, a mean over the picture and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.side, self.after = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 8, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(x + self.bn2(self.deep(x)))
        z = torch.cat([y, self.side(y)], 1)
        y = torch.relu(self.after(self.pool(z))).mean((2, 3))
        logits: Tensor = self.head(y)
        return logits


def make_net() -> Net:
    torch.manual_seed(1)
    net = Net()
    with torch.no_grad():
        for _ in range(5):
            net(2 * torch.randn(16, 3, 8, 8) + 0.5)
        net.head.weight.mul_(8)  # so that the classes differ
    return net.eval()


def make_batches(count: int = 4, size: int = 16) -> list[Batch]:
    draw = torch.Generator().manual_seed(7)
    colours = [2 * torch.randn(size, 3, 1, 1, generator=draw) for _ in range(count)]
    return [(colour + torch.randn(size, 3, 8, 8, generator=draw),) for colour in colours]


RECIPE = jt.Recipe(samples=48, judges=32, steps=40, learning_rate=5e-3, half=False)


def measure_distance(a: nn.Module, b: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((a(*x) - b(*x)).pow(2).mean()) for x in make_batches())


def test_training_brings_the_network_nearer_to_the_original(tmp_path: Path) -> None:
    net, data = make_net(), [x for (x,) in make_batches(8)]
    state = copy.deepcopy(net.state_dict())
    plain = train_quantized(net, data, weight_bits=3, activation_bits=3, recipe=replace(RECIPE, steps=0))
    found = train_quantized(net, data, weight_bits=3, activation_bits=3, recipe=RECIPE, out=tmp_path / "run")
    assert measure_distance(found.module, net) < 0.8 * measure_distance(plain.module, net)
    assert {s.layer: s.bits for s in found.sites} == {"stem": 8, "deep": 3, "side": 3, "after": 3, "head": 8}
    assert "no kernel" in found.note and "after 40 steps" in found.note
    again = train_quantized(net, data, weight_bits=3, activation_bits=3, recipe=RECIPE, out=tmp_path / "run")
    assert all(torch.equal(v, again.module.state_dict()[k]) for k, v in found.module.state_dict().items())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    with pytest.raises(CheckpointError, match="bits"):
        train_quantized(net, data, weight_bits=4, activation_bits=3, recipe=RECIPE, out=tmp_path / "run")


@pytest.mark.parametrize("form", ["ternary", "binary"])
def test_coarse_weights_go_through_the_same_loop(form: str) -> None:
    net, data = make_net(), [x for (x,) in make_batches(8)]
    found = train_quantized(net, data, weights=form, recipe=RECIPE)  # type: ignore[arg-type]
    whole = found.module.get_buffer("deep.weight")
    values = set(whole.unique().tolist())
    assert values <= {-1, 0, 1} and (form == "ternary" or values == {-1, 1} or "no nearer" in found.note)


@pytest.mark.filterwarnings("ignore:The result")
def test_a_pruned_network_learns_from_its_larger_original() -> None:
    net, data = make_net(), [x for (x,) in make_batches(8)]
    small = jt.prune(net, data[0], keep=0.75, criterion="magnitude", recipe=jt.Recipe(multiple=1))
    found = train_quantized(small, data, weight_bits=4, activation_bits=4, teacher=net, recipe=RECIPE)
    plain = train_quantized(small, data, weight_bits=4, activation_bits=4, teacher=net, recipe=replace(RECIPE, steps=0))
    assert found.module.get_buffer("deep.weight").shape[0] < 8
    assert measure_distance(found.module, net) < measure_distance(plain.module, net)


@pytest.mark.parametrize("name", ["tied", "transposed", "depthwise", "shared"])
def test_other_networks_start_as_converted_and_come_back(name: str) -> None:
    """With an embedding tied to the head, transposed and depthwise convolutions, a layer that runs twice."""
    chosen = scheme(frozenset({"avx512_vnni"}))
    traced = trace_module(*build_model(name))
    folded = fold(traced.module, frozenset(chosen.weighted))
    inner = set(find_layers(folded, frozenset(chosen.weighted))) - find_ends(folded, chosen)
    few = replace(chosen, bits=dict.fromkeys(inner, (4, 4)))
    converted = quantize(traced.module, [traced.example], scheme=few).module
    student = make_trainable(converted, traced.module, few)
    back = convert_trained(student, converted, few)
    with torch.no_grad():
        outputs = [module(*traced.example)[0] for module in (converted, student, back)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    student(*traced.example)[0].float().pow(2).sum().backward()
    assert [n for n, p in student.named_parameters() if p.grad is None] == []


def test_an_embedding_tied_to_the_head_stays_float() -> None:
    chosen = scheme(frozenset({"avx512_vnni"}))
    traced = trace_module(*build_model("tied"))
    converted = quantize(traced.module, [traced.example], scheme=chosen).module
    with torch.no_grad():
        found, wanted = converted(*traced.example)[0], traced.module(*traced.example)[0]
    assert float((found - wanted).abs().max()) < 0.03 * float(wanted.abs().max())


def test_bad_settings_are_refused() -> None:
    net, data = make_net(), [x for (x,) in make_batches(1)]
    with pytest.raises(InputError, match="weight_bits=1"):
        train_quantized(net, data, weight_bits=1)
    with pytest.raises(InputError, match="weights='octal'"):
        train_quantized(net, data, weights="octal")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no integer kernels"):
        train_quantized(net, data, target="eager")
    with pytest.raises(UnknownName, match="deeep"):
        train_quantized(net, data, bits={"deeep": (4, 4)})
    with pytest.raises(InputError, match="bits of layer 'deep'"):
        train_quantized(net, data, bits={"deep": (9, 4)})
