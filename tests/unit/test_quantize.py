"""Rounding, ranges, folding, placement and diagnosis of int8; the runtime itself is tested in tests/targets."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

import jettison as jt
from jettison.core.errors import CalibrationError, NonFiniteError, UnknownName
from jettison.quantization import measure_sqnr, quantize
from jettison.quantization.convert import fold
from jettison.quantization.fold import find_layers, name_operator
from jettison.quantization.ranges import HALF_BINS, Histogram, choose_scale, choose_weight_scale, span_minmax, span_mse
from jettison.targets.integer import IntegerScheme, Levels, fake_quantize, quantize_linear, quantize_operator
from jettison.targets.onnxruntime import scheme

UINT8, INT8 = Levels(0, 255, False), Levels(-127, 127, True)
SCHEME = scheme(frozenset({"avx512_vnni"}))
FOLD_TOLERANCE = 1e-5
"""Relative; float32 weights folded in float64 lose at most a few roundings per layer."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Net(nn.Module):
    """A residual step, a clamp, a concatenation, a mean over the picture and a two-layer head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.side = nn.Conv2d(8, 4, 1)
        self.act = nn.ReLU6()
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        y = torch.relu(x + self.bn2(self.deep(x)))
        z = torch.cat([y, torch.relu(self.side(y))], 1).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(z)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_batch_norm_folds_into_every_convolution(rank: int, groups: int) -> None:
    """Transposed ones have their outputs second, and a share of them for each group; one is called twice."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](4, 8, 3, padding="same", groups=groups)
    up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    twice = up(6, 6, 3, padding=1, groups=groups, bias=False)
    net = nn.Sequential(conv, norm(8), up(8, 6, 2, stride=2, groups=groups), norm(6), nn.ReLU(), twice, norm(6), twice)
    x = torch.randn(2, 4, *[4] * rank)
    graph = trace(net, x)
    folded = fold(graph, frozenset(SCHEME.weighted))
    assert not [n for n in folded.graph.nodes if name_operator(n) == "aten.batch_norm.default"]
    wanted, given = graph(x)[0], folded(x)[0]
    assert float((wanted - given).abs().max() / wanted.abs().max()) < FOLD_TOLERANCE
    given = quantize(graph, [(x,)], scheme=SCHEME).module(x)[0]
    assert float((wanted - given).abs().max() / wanted.abs().max()) < 0.1, "PT2E finds nothing left to fold"


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


@pytest.fixture(scope="module")
def net() -> GraphModule:
    torch.manual_seed(0)
    return trace(Net(), torch.randn(4, 3, 8, 8))


def batches(count: int = 3, size: int = 16) -> list[tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(7)
    return [(torch.randn(size, 3, 8, 8, generator=draw),) for _ in range(count)]


def reference(x: Fraction, scale: Fraction, zero_point: int, levels: Levels) -> int:
    """The contract in whole numbers: Python's round is half to even."""
    return max(levels.q_min, min(levels.q_max, round(x / scale) + zero_point))


def test_rounding_equals_the_whole_number_reference_on_a_grid_with_ties() -> None:
    scale = 0.125  # a power of two, so that quotients and ties are exact in float32
    x = torch.arange(-(2**15), 2**15) * (scale / 4)
    for zero_point in (0, 3, 128, 255):
        q = quantize_linear(x, torch.tensor([scale]), zero_point, UINT8).long().tolist()
        expected = [reference(Fraction(v), Fraction(scale), zero_point, UINT8) for v in x.tolist()]
        assert q == expected
    assert quantize_linear(torch.tensor([0.5, 1.5, 2.5]), torch.ones(1), 0, UINT8).tolist() == [0, 2, 2]


def test_half_away_from_zero_would_fail_that_grid() -> None:
    x = torch.tensor([0.0625, 0.3125])
    planted = torch.floor(x / 0.125 + 0.5).long().tolist()
    assert planted != [reference(Fraction(v), Fraction(0.125), 0, UINT8) for v in x.tolist()]


def test_the_operator_divides() -> None:
    x = torch.arange(0, 400_000) * 1.7e-5
    scale = float(torch.tensor(0.1))
    q = quantize_operator()(x, scale, 5, 0, 255, torch.uint8)
    assert torch.equal(q.float(), quantize_linear(x, torch.tensor([scale]), 5, UINT8))
    multiplied = torch.round(torch.linspace(0, 6, 3_000_001) * (1 / torch.tensor(0.1)))
    assert not torch.equal(multiplied, torch.round(torch.linspace(0, 6, 3_000_001) / torch.tensor(0.1)))


def test_zero_is_exact_and_symmetric_levels_have_zero_point_zero() -> None:
    for low, high in ((-1.3, 2.9), (0.4, 2.0), (-3.0, -1.0), (0.0, 0.0)):
        scale, zero_point = choose_scale(torch.tensor([low]), torch.tensor([high]), UINT8)
        assert fake_quantize(torch.zeros(1), scale, zero_point, UINT8).item() == 0.0
    assert choose_scale(torch.tensor([-2.0]), torch.tensor([1.0]), INT8)[1].item() == 0


def test_histogram_grows_without_losing_a_value() -> None:
    histogram = Histogram()
    values = torch.randn(5000) * torch.logspace(-3, 3, 5000)
    for part in values.split(100):
        histogram.add(part, "here")
    assert histogram.counts is not None and int(histogram.counts.sum()) == 5000
    centres = (torch.arange(2 * HALF_BINS) - HALF_BINS + 0.5) * histogram.width
    mean = float((centres.double() * histogram.counts).sum() / 5000)
    assert abs(mean - float(values.double().mean())) < histogram.width
    assert (histogram.low, histogram.high) == (float(values.min()), float(values.max()))


def test_clipping_beats_minmax_on_a_tail_and_changes_nothing_without_one() -> None:
    tail, flat = torch.cat([torch.randn(1_000_000), torch.tensor([10.0])]), torch.linspace(0, 1, 20_000)
    for values, factor in ((tail, 0.75), (flat, 1.0001)):
        histogram = Histogram()
        histogram.add(values, "here")
        errors = []
        for span in (span_mse, span_minmax):
            low, high = span(histogram, UINT8)
            scale, zero_point = choose_scale(torch.tensor([low]), torch.tensor([high]), UINT8)
            errors.append(float((fake_quantize(values, scale, zero_point, UINT8) - values).square().sum()))
        assert errors[0] < factor * errors[1] + 1e-9


def test_weight_scales_are_never_worse_than_the_largest_value() -> None:
    weight = torch.randn(6, 50) * torch.logspace(-2, 2, 6)[:, None]
    weight[0, 0] = 20.0
    scale = choose_weight_scale(weight, 0, Levels(-7, 7, True))
    plain = weight.abs().amax(1) / 7

    def error(s: Tensor) -> Tensor:
        return (fake_quantize(weight, s[:, None], 0, Levels(-7, 7, True)) - weight).square().sum(1)

    assert bool((error(scale) <= error(plain)).all()) and float(error(scale).sum()) < float(error(plain).sum())
    assert bool((choose_weight_scale(torch.zeros(3, 4), 0, INT8) == 1).all())


def test_folding_keeps_the_function_and_the_callers_module(net: GraphModule) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    code, x = net.code, torch.randn(5, 3, 8, 8)
    folded = fold(net, frozenset(SCHEME.weighted))
    wanted, given = net(x)[0], folded(x)[0]
    assert float((wanted - given).abs().max() / wanted.abs().max()) < FOLD_TOLERANCE
    assert not any(name_operator(n) == "aten.batch_norm.default" for n in folded.graph.nodes)
    quantize(net, batches(), scheme=SCHEME)
    assert net.code == code and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_wrong_fold_is_noticed(net: GraphModule) -> None:
    folded, x = fold(net, frozenset(SCHEME.weighted)), torch.randn(5, 3, 8, 8)
    folded.stem.bias.mul_(1.01)  # type: ignore[operator, union-attr]
    wanted, given = net(x)[0], folded(x)[0]
    assert float((wanted - given).abs().max() / wanted.abs().max()) > FOLD_TOLERANCE


def test_every_layer_is_int8_and_no_activation_function_remains(net: GraphModule) -> None:
    result = quantize(net, batches(), scheme=SCHEME)
    assert [(s.layer, s.bits) for s in result.sites] == [(n, 8) for n in ("stem", "deep", "side", "fc1", "fc2")]
    state = result.module.state_dict()
    assert {state[f"{n}.weight"].dtype for n in ("stem", "deep", "fc1")} == {torch.int8}
    assert {state[f"{n}.bias"].dtype for n in ("stem", "deep", "fc1")} == {torch.int32}
    assert min(int(v.min()) for k, v in state.items() if k.endswith(".weight")) >= -127
    assert not {"aten.relu.default", "aten.hardtanh.default"} & {name_operator(n) for n in result.module.graph.nodes}
    # 8 bits throughout a net of this depth: noise of about 1 % of the signal's power at the very most.
    assert min(measure_sqnr(net, result.module, batches(1)).values()) > 20


def test_scales_bias_concat_and_pass_through_follow_the_scheme(net: GraphModule) -> None:
    module = quantize(net, batches(), scheme=SCHEME).module
    layers = find_layers(module, frozenset(SCHEME.weighted))
    for name, node in layers.items():
        step = node.args[0].args[1]
        bias_scale = module.get_buffer(f"{name}.bias_scale")
        assert torch.equal(bias_scale, torch.tensor(step) * module.get_buffer(f"{name}.weight_scale"))
    (cat,) = (n for n in module.graph.nodes if name_operator(n) == "aten.cat.default")
    (after,) = cat.users
    assert {tuple(a.args[1:3]) for a in cat.args[0]} == {tuple(after.args[1:3])}
    (flat,) = (n for n in module.graph.nodes if name_operator(n) == "aten.flatten.using_ints")
    (after,) = flat.users
    assert tuple(flat.args[0].args[1:3]) == tuple(after.args[1:3])
    (add,) = (n for n in module.graph.nodes if name_operator(n) == "aten.add.Tensor")
    (after,) = add.users
    assert len({a.args[1] for a in (*add.args, after)}) == 3


def test_batch_stays_free(net: GraphModule) -> None:
    module, x = quantize(net, batches(), scheme=SCHEME).module, torch.randn(7, 3, 8, 8)
    together = module(x)[0]
    assert torch.allclose(together, torch.cat([module(row)[0] for row in x.split(1)]), atol=1e-3)
    assert not module.training and module.eval() is module


def test_excluded_layers_stay_float(net: GraphModule) -> None:
    result = quantize(net, batches(), scheme=SCHEME, exclude=["deep", "fc2"])
    assert {s.layer: s.bits for s in result.sites} == {"stem": 8, "deep": 32, "side": 8, "fc1": 8, "fc2": 32}
    assert result.module.get_buffer("deep.weight").dtype == torch.float32


def test_seven_bits_where_sums_would_saturate(net: GraphModule) -> None:
    narrow = scheme(frozenset({"avx2"}))
    result = quantize(net, batches(), scheme=narrow)
    assert {s.bits for s in result.sites} == {7}
    assert int(result.module.get_buffer("stem.weight").abs().max()) <= 63
    assert "saturate" in narrow.why and "exact" in SCHEME.why


def test_a_layer_used_twice_gets_one_scale_per_use() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.relu(self.conv(x)))

    graph = trace(Twice(), torch.randn(2, 3, 8, 8))
    result = quantize(graph, batches(), scheme=SCHEME)
    assert [s.layer for s in result.sites] == ["conv", "conv@2"]
    assert measure_sqnr(graph, result.module, batches(1))["conv@2"] > 25


def test_in_place_calls_become_ordinary_ones() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.relu(x)
            x = nn.functional.hardswish(self.b(x), inplace=True) + x
            x += 1.0
            return x

    graph = trace(InPlace(), torch.randn(2, 3, 8, 8))
    x = batches(1)[0]
    folded = fold(graph, frozenset(SCHEME.weighted))
    assert not any("_." in str(n.target) for n in folded.graph.nodes if n.op == "call_function")
    assert torch.allclose(folded(*x)[0], graph(*x)[0], atol=1e-6)
    result = quantize(graph, [x], scheme=SCHEME).module
    assert not any("relu" in name_operator(n) for n in result.graph.nodes)
    assert float((result(*x)[0] - graph(*x)[0]).abs().max()) < 0.1
    assert min(measure_sqnr(graph, result, [x]).values()) > 25


def test_a_dead_channel_with_a_bias_survives() -> None:
    """A channel whose weights BatchNorm has shrunk to nothing: its bias must not overflow int32."""
    conv = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        conv.weight[1] = 1e-30
        conv.bias[1] = 5.0  # type: ignore[index]
    graph = trace(conv, torch.randn(2, 3, 8, 8))
    x = batches(1)[0]
    module = quantize(graph, [x], scheme=SCHEME).module
    assert torch.allclose(module(*x)[0][:, 1], torch.tensor(5.0), atol=0.05)


def test_sqnr_finds_the_planted_bad_layer(net: GraphModule) -> None:
    result = quantize(net, batches(), scheme=SCHEME)
    good = measure_sqnr(net, result.module, batches(1))
    weight = result.module.get_buffer("fc2.weight")
    weight.copy_(torch.round(weight / 90.0) * 90)
    bad = measure_sqnr(net, result.module, batches(1))
    assert min(bad, key=bad.__getitem__) == "fc2" and bad["fc2"] < good["fc2"] - 10
    assert all(bad[name] == good[name] for name in good if name != "fc2")


def test_sqnr_of_equal_graphs_is_infinite(net: GraphModule) -> None:
    assert set(measure_sqnr(net, net, batches(1)).values()) == {float("inf")}


def test_bad_questions(net: GraphModule) -> None:
    with pytest.raises(CalibrationError, match="no calibration"):
        quantize(net, [], scheme=SCHEME)
    with pytest.raises(CalibrationError):
        quantize(net, [(torch.zeros(0, 3, 8, 8),)], scheme=SCHEME)
    with pytest.raises(NonFiniteError, match="NaN or infinity at"):
        quantize(net, [(torch.full((2, 3, 8, 8), float("nan")),)], scheme=SCHEME)
    with pytest.raises(UnknownName, match="'stem'"):
        quantize(net, batches(), scheme=SCHEME, exclude=["stemm"])
    with pytest.raises(UnknownName, match="mse"):
        quantize(net, batches(), scheme=SCHEME, ranges="mze")
    with pytest.raises(CalibrationError):
        measure_sqnr(net, net, [])
    spoiled = fold(net, frozenset(SCHEME.weighted))
    spoiled.get_buffer("fc1.weight")[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"fc1\.weight"):
        quantize(spoiled, batches(), scheme=SCHEME)


def test_scheme_is_plain_data() -> None:
    assert isinstance(SCHEME, IntegerScheme) and SCHEME.weight == INT8 and SCHEME.activation == UINT8


class Summed(nn.Module):
    """Parts added by Python's `sum`, which starts with 0, and copies that change nothing."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.parts, self.head = nn.ModuleList(nn.Conv2d(3, 8, 3, padding=1) for _ in range(2)), nn.Linear(8, 5)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            y = torch.relu(self.parts[0](x) + self.parts[1](x)).mean((2, 3))
        else:
            y = torch.relu(sum(part(x) for part in self.parts)).contiguous().clone()  # type: ignore[union-attr]
            y = (y / 1).to(x.dtype)[:, :8, 0:].mean((2, 3)) * 1
        logits: Tensor = self.head(y)
        return logits


def test_what_changes_no_number_leaves_no_rounding_behind() -> None:
    torch.manual_seed(0)
    model, x = Summed(plain=False).eval(), torch.randn(8, 3, 6, 6)
    same = Summed(plain=True).eval()
    same.load_state_dict(model.state_dict())
    found, wanted = (jt.quantize(m, [x, x + 0.1]).module for m in (model, same))
    assert [str(n.target) for n in found.graph.nodes if n.op == "call_function"] == [
        str(n.target) for n in wanted.graph.nodes if n.op == "call_function"
    ]
    assert torch.equal(found(x), wanted(x))


class Turned(nn.Module):
    """A copy that a view needs, since it puts the turned axes in order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1).contiguous() + 0
        logits: Tensor = self.head(torch.relu(y).view(len(x), -1))
        return logits


def test_a_copy_that_a_view_needs_stays() -> None:
    torch.manual_seed(0)
    model, x = Turned().eval(), torch.randn(8, 3, 6, 6)
    with torch.no_grad():
        wanted, found = model(x), jt.quantize(model, [x, x + 0.1]).module(x)
    assert found.sub(wanted).norm() < 0.05 * wanted.norm()


class PreActivated(nn.Module):
    """A convolution that a BatchNorm and the shortcut read: folding one into the other would change the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        nn.init.uniform_(self.norm.running_var, 2, 9)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(torch.relu(self.norm(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_a_norm_beside_a_shortcut_is_left_alone() -> None:
    torch.manual_seed(0)
    model, x = PreActivated().eval(), torch.randn(16, 3, 6, 6)
    found = jt.quantize(model, [x, x + 0.1])
    assert [str(n.target) for n in found.module.graph.nodes].count("aten.batch_norm.default") == 1
    assert [site.bits for site in found.sites] == [8, 8, 8]
    with torch.no_grad():
        assert found.module(x).sub(model(x)).norm() < 0.03 * model(x).norm()
