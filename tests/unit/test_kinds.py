"""Dynamic int8, weight-only and sixteen-bit storage as graphs; what runtimes make of them is in tests/targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import jettison
from jettison.core.errors import InputError, NonFiniteError, UnknownName
from jettison.flow.kinds import check_kind
from jettison.graph.trace import trace_module
from jettison.quantization.dynamic import quantize_dynamic
from jettison.quantization.half import find_overflows, refuse_overflow, store_half
from jettison.quantization.recurrent import SMALLEST
from jettison.quantization.weight_only import choose_group, quantize_weights, round_weight
from jettison.targets.integer import Levels
from jettison.targets.operators import GROUP_KERNELS, choose_dynamic, dequantize_groups, round_groups

INT8 = Levels(-127, 127, True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Net(nn.Module):
    """A convolution, two linear layers of odd widths, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 70)
        self.mix = nn.Conv1d(9, 9, 3, padding=1)
        self.a, self.norm, self.b = nn.Linear(70, 97), nn.LayerNorm(97), nn.Linear(97, 70, bias=False)
        self.head = nn.Linear(70, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.embed(x))
        scores: Tensor = self.head(y + self.b(nn.functional.gelu(self.norm(self.a(y)))))
        return scores


def draw() -> Tensor:
    return torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def net() -> GraphModule:
    torch.manual_seed(0)
    return trace_module(Net().eval(), (draw(),), {}).module.requires_grad_(False)


def measure_db(wanted: Tensor, given: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (wanted - given).square().sum()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_are_rounded_one_by_one(bits: int, symmetric: bool) -> None:
    weight = torch.randn(70, 12) * torch.logspace(-2, 2, 70)[:, None]
    integers, scale, zero_point = round_weight(weight, bits=bits, group=32, symmetric=symmetric)
    assert integers.shape == (70, 12) and scale.shape == (3, 12)
    assert (zero_point is None) == symmetric and integers.dtype == (torch.int8 if symmetric else torch.uint8)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert low <= int(integers.min()) and int(integers.max()) <= high
    back = dequantize_groups(integers, scale, zero_point, 32)
    for first in (0, 32, 64):
        part = slice(first, min(70, first + 32))
        alone = round_weight(weight[part], bits=bits, group=32, symmetric=symmetric)
        own = dequantize_groups(*alone, 32)
        # Small groups are rounded as finely as if they stood alone, but for a floor of 2^-12 of the largest.
        assert float((back[part] - own).abs().max()) <= float(scale.max()) * 2.0**-12
    assert measure_db(weight[64:], back[64:]) > 6.0 * bits - 10


def test_searched_scales_are_no_worse_than_the_span() -> None:
    weight = torch.randn(64, 40) ** 3
    for symmetric in (True, False):
        found = dequantize_groups(*round_weight(weight, bits=4, group=32, symmetric=symmetric), 32)
        rows = weight.unflatten(0, (2, 32))
        if symmetric:
            step = rows.abs().amax(1, keepdim=True) / 7
            plain = (torch.round(rows / step).clamp(-8, 7) * step).flatten(0, 1)
        else:
            low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
            step = (high - low) / 15
            zero = torch.round(-low / step)
            plain = ((torch.round(rows / step) + zero).clamp(0, 15).sub(zero) * step).flatten(0, 1)
        assert float((found - weight).square().sum()) < float((plain - weight).square().sum())


def test_activations_are_rounded_in_groups() -> None:
    x = torch.randn(2, 3, 70)
    rounded = round_groups(x, 32)
    assert rounded.shape == x.shape
    for first in (0, 32, 64):
        part = x[..., first : first + 32]
        step = part.abs().amax(-1, keepdim=True) / 127
        assert float((rounded[..., first : first + 32] - part).abs().div(step).max()) <= 0.5 + 1e-4
    assert torch.equal(round_groups(torch.zeros(1, 40), 32), torch.zeros(1, 40))


def test_a_dynamic_range_is_that_of_the_whole_call() -> None:
    step, zero = choose_dynamic(torch.tensor([[-1.0, 0.5], [4.1, 0.0]]))
    assert float(step) == pytest.approx(5.1 / 255) and float(zero) == 50
    step, zero = choose_dynamic(torch.tensor([2.0, 3.0]))
    assert float(step) == pytest.approx(3 / 255) and float(zero) == 0
    assert [float(v) for v in choose_dynamic(torch.zeros(3))] == [1.0, 0.0]


@pytest.mark.parametrize(("bits", "symmetric", "least"), [(4, True, 18), (4, False, 19), (8, True, 38), (8, False, 38)])
def test_weight_only_networks_are_near(net: GraphModule, bits: int, symmetric: bool, least: float) -> None:
    x = draw()
    found = quantize_weights(net, bits=bits, symmetric=symmetric)
    assert measure_db(net(x)[0], found.module(x)[0]) > least
    assert {site.layer: site.bits for site in found.sites} == {"mix": 32, "a": bits, "b": bits, "head": bits}
    state = found.module.state_dict()
    assert state["a.weight"].shape == (70, 97) and state["a.weight"].dtype in (torch.int8, torch.uint8)


def test_a_tied_embedding_stays_float(net: GraphModule) -> None:
    for found in (quantize_weights(net), quantize_dynamic(net, levels=INT8)):
        tied = [n for n, v in found.module.state_dict().items() if v.shape == (40, 70) and v.is_floating_point()]
        assert len(tied) == 1
        (embedding,) = (n for n in found.module.graph.nodes if "embedding" in str(n.target))
        assert embedding.args[0].target == tied[0]


def test_nothing_is_left_over_and_the_caller_keeps_the_network(net: GraphModule) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for found in (quantize_weights(net), quantize_dynamic(net, levels=INT8), store_half(net, dtype="fp16")):
        held = {str(n.target) for n in found.module.graph.nodes if n.op == "get_attr"}
        assert set(found.module.state_dict()) == held
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_excluded_layers_stay_float(net: GraphModule) -> None:
    for found in (quantize_weights(net, exclude=["a"]), quantize_dynamic(net, levels=INT8, exclude=["a"])):
        assert {site.layer: site.bits for site in found.sites}["a"] == 32
        assert found.module.state_dict()["a.weight"].dtype == torch.float32
    assert store_half(net, dtype="bf16", exclude=["a"]).module.state_dict()["a.weight"].dtype == torch.float32


def test_a_runtime_that_takes_whole_groups_gets_them(net: GraphModule) -> None:
    assert [choose_group(width, 128) for width in (256, 96, 48, 40, 97)] == [128, 32, 16, None, None]
    found = quantize_weights(net, kernels=GROUP_KERNELS["openvino"])
    assert {site.layer: site.bits for site in found.sites} == {"mix": 32, "a": 32, "b": 32, "head": 32}
    layer = trace_module(nn.Linear(48, 5).eval(), (torch.randn(2, 48),), {}).module
    module = quantize_weights(layer, kernels=GROUP_KERNELS["openvino"], group=32).module
    (node,) = (n for n in module.graph.nodes if "linear_groups" in str(n.target))
    assert node.args[5:] == (16, 4, 0)  # groups of 16, which OpenVINO multiplies with float activations


def test_dynamic_networks_are_near_and_layers_that_are_not_linear_float(net: GraphModule) -> None:
    x = draw()
    found = quantize_dynamic(net, levels=INT8)
    assert measure_db(net(x)[0], found.module(x)[0]) > 38
    assert {site.layer: site.bits for site in found.sites} == {"mix": 32, "a": 8, "b": 8, "head": 8}
    assert int(found.module.state_dict()["a.weight"].abs().max()) <= 127
    narrow = quantize_dynamic(net, levels=Levels(-63, 63, True))
    assert int(narrow.module.state_dict()["a.weight"].abs().max()) <= 63 and narrow.sites[1].bits == 7


@pytest.mark.parametrize(("dtype", "least"), [("fp16", 65), ("bf16", 48)])
def test_halves_are_stored_and_small_tensors_kept(net: GraphModule, dtype: str, least: float) -> None:
    x = draw()
    found = store_half(net, dtype=dtype)
    state = found.module.state_dict()
    assert (
        state["a.weight"].itemsize == state["embed.weight" if "embed.weight" in state else "head.weight"].itemsize == 2
    )
    assert state["norm.weight"].dtype == state["a.bias"].dtype == torch.float32
    assert measure_db(net(x)[0], found.module(x)[0]) > least
    assert dtype in found.note and {site.bits for site in found.sites} == {16}


def test_overflow_is_found_and_named() -> None:
    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            nn.init.eye_(self.a.weight)
            nn.init.eye_(self.b.weight)
            with torch.no_grad():
                self.a.weight[0, 0] = 70000.0

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x))
            return y

    graph = trace_module(Loud().eval(), (torch.ones(2, 4),), {}).module.requires_grad_(False)
    with pytest.raises(NonFiniteError, match=r"a\.weight.*70000.*exclude=\['a'\]"):
        store_half(graph, dtype="fp16")
    assert store_half(graph, dtype="fp16", exclude=["a"]).sites[0].bits == 32
    store_half(graph, dtype="bf16")
    found = find_overflows(graph, [(torch.ones(2, 4),)])
    assert [(f.where, f.value) for f in found] == [
        ("a.weight", 70000.0),
        ("a output", 70000.0),
        ("b output", 70000.0),
    ]
    assert find_overflows(graph, [(torch.ones(2, 4),)], dtype="bf16") == ()
    with pytest.raises(InputError, match=r"a\.weight reaches 70000, more than fp16 can hold; so do 2 others"):
        refuse_overflow(found, "fp16")
    refuse_overflow((), "fp16")


def test_the_public_function_takes_every_kind() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)).eval().requires_grad_(False)
    x = torch.randn(8, 64)
    for kind, bits in (("static", 8), ("dynamic", 8), ("weight-only", 4), ("fp16", 16), ("bf16", 16)):
        found = jettison.quantize(model, x, kind=kind)
        assert {site.bits for site in found.sites} == {bits}
        assert measure_db(model(x), found.module(x)) > (15 if bits == 4 else 30)
    assert {s.bits for s in jettison.quantize(model, x, kind="weight-only", weight_bits=8, group_size=64).sites} == {8}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(8, 6, batch_first=True), nn.GRU(6, 6, batch_first=True)
        self.rnn, self.fc = nn.RNN(6, 6, batch_first=True, nonlinearity="relu"), nn.Linear(6, 3)
        self.narrow = nn.LSTM(6, 6, batch_first=True, proj_size=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.rnn(self.gru(self.lstm(x)[0])[0])[0]
        return self.fc(y), self.narrow(y)[0]


def test_recurrent_layers_are_rounded_where_it_pays() -> None:
    x = torch.randn(2, 5, 8)
    graph = trace_module(Recurrent().eval(), (x,), {}).module.requires_grad_(False)
    names = ["lstm", "gru", "rnn", "fc", "narrow"]
    for smallest, bits in ((SMALLEST, [8, 32, 32, 8, 32]), (dict.fromkeys(SMALLEST, 6), [8, 8, 8, 8, 32])):
        found = quantize_dynamic(graph, levels=INT8, smallest=smallest)
        assert [(site.layer, site.bits) for site in found.sites] == list(zip(names, bits, strict=True))
        assert all(measure_db(w, g) > 30 for w, g in zip(graph(x), found.module(x), strict=True))
        held = {str(n.target) for n in found.module.graph.nodes if n.op == "get_attr"}
        assert set(found.module.state_dict()) == held and "lstm.weight_ih_l0" not in held
    kept = quantize_dynamic(graph, levels=INT8, exclude=["lstm", "fc"])
    assert {site.bits for site in kept.sites} == {32}
    with pytest.raises(UnknownName, match="gru"):
        quantize_dynamic(graph, levels=INT8, exclude=["grue"])
    assert {site.bits for site in quantize_weights(graph).sites if site.layer != "fc"} == {32}


def test_gates_stand_where_the_exported_layer_has_them() -> None:
    """Weights of one value for each gate: in another order, the cells would compute something else."""
    for layer in (nn.LSTM(4, 3), nn.GRU(4, 3)):
        for parameter in layer.parameters():
            gates = parameter.shape[0] // 3
            rows = torch.linspace(-1.0, 1.0, gates).repeat_interleave(3)
            parameter.data = rows.view(-1, *[1] * (parameter.dim() - 1)).expand_as(parameter).clone()
        x = torch.randn(5, 2, 4)
        graph = trace_module(layer.eval(), (x,), {}).module.requires_grad_(False)
        found = quantize_dynamic(graph, levels=INT8, smallest=dict.fromkeys(SMALLEST, 1))
        assert measure_db(graph(x)[0], found.module(x)[0]) > 30


def test_bad_questions(net: GraphModule) -> None:
    with pytest.raises(InputError, match="no kernel for 3 bits in groups of 32"):
        quantize_weights(net, bits=3)
    with pytest.raises(InputError, match="groups of 48"):
        quantize_weights(net, group=48)
    for call in (
        lambda: quantize_weights(net, exclude=["aa"]),
        lambda: quantize_dynamic(net, levels=INT8, exclude=["x"]),
    ):
        with pytest.raises(UnknownName):
            call()
    with pytest.raises(UnknownName, match="bf16"):
        store_half(net, dtype="bf61")
    model, x = nn.Linear(8, 8).eval(), torch.randn(2, 8)
    with pytest.raises(UnknownName, match="weight-only"):
        jettison.quantize(model, x, kind="weight_only")
    with pytest.raises(InputError, match="weight_bits=4 with kind='dynamic'"):
        jettison.quantize(model, x, kind="dynamic", weight_bits=4)
    with pytest.raises(InputError, match="so are rungs="):
        jettison.quantize(model, x, kind="dynamic", rungs=["bias"])
    with pytest.raises(InputError, match="Use kind='weight-only'"):
        check_kind("dynamic", "openvino")
    with pytest.raises(InputError, match="cannot be written for target='litert'"):
        check_kind("weight-only", "litert")
    check_kind("static", "litert")
    spoiled = trace_module(model, (x,), {}).module.requires_grad_(False)
    next(iter(spoiled.parameters())).view(-1)[0] = float("nan")
    for kind in (lambda: quantize_weights(spoiled), lambda: store_half(spoiled, dtype="fp16")):
        with pytest.raises(NonFiniteError):
            kind()
