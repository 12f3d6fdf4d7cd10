"""Mixed precision: units, losses measured one at a time, the choice against brute force, and what it is turned into."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import jettison as jt
from jettison.core.errors import BudgetError, InputError
from jettison.distill.losses import measure_divergence
from jettison.flow.mixing import UnitOptions, choose_bits, measure_units, solve_bits
from jettison.graph.trace import Batch, Traced, trace_module
from jettison.quantization import quantize
from jettison.quantization.bits import split_bits
from jettison.quantization.convert import fold
from jettison.quantization.fold import find_layers
from jettison.quantization.mixed import FLOAT, collect_histograms, count_bytes, find_units, round_unit
from jettison.quantization.ranges import span_mse
from jettison.targets.onnxruntime import scheme

SCHEME = scheme(frozenset({"avx512_vnni"}))
OPTIONS = (FLOAT, (8, 8), (4, 8))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Net(nn.Module):
    """Three convolutions of one size in a row, two of which read one tensor, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second, self.third = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.side = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        x = torch.relu(self.third(x)) + self.side(x)
        logits: Tensor = self.head(torch.relu(x).mean((2, 3)))
        return logits


def make_net() -> Net:
    torch.manual_seed(3)
    net = Net()
    with torch.no_grad():
        for layer in (net.first, net.second, net.third, net.side):
            layer.weight.mul_(2)
        net.head.weight.mul_(6)
    return net.eval()


def make_batches(count: int = 2, size: int = 24) -> list[Batch]:
    draw = torch.Generator().manual_seed(7)
    colours = [2 * torch.randn(size, 3, 1, 1, generator=draw) for _ in range(count)]
    return [(colour + torch.randn(size, 3, 8, 8, generator=draw),) for colour in colours]


@pytest.fixture(scope="module")
def traced() -> Traced:
    return trace_module(make_net(), make_batches()[0])


@pytest.fixture(scope="module")
def units(traced: Traced) -> tuple[UnitOptions, ...]:
    with torch.no_grad():
        return measure_units(traced, make_batches(), SCHEME, OPTIONS)


def draw_units(seed: int) -> list[UnitOptions]:
    draw = random.Random(seed)
    found = []
    for index in range(draw.randint(2, 6)):
        size = draw.randint(10, 400)
        losses = (0.0, draw.random() / 100, draw.random())
        found.append(
            UnitOptions(
                (f"layer{index}",), OPTIONS, losses, (4 * size, size, size // 2), 4 * size, (3.0, 1.5, 1.5), 3.0
            )
        )
    return found


def brute(units: list[UnitOptions], size: float) -> float | None:
    """Return the least loss of any choice that fits."""
    best = None
    for choice in itertools.product(range(len(OPTIONS)), repeat=len(units)):
        pairs = list(zip(units, choice, strict=True))
        loss = sum(u.losses[o] for u, o in pairs)
        if sum(u.sizes_bytes[o] for u, o in pairs) <= size and (best is None or loss < best):
            best = loss
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_that_of_brute_force(seed: int) -> None:
    units = draw_units(seed)
    whole = sum(u.float_bytes for u in units)
    for share in (0.1, 0.13, 0.2, 0.5, 1.0):
        expected = brute(units, share * whole)
        if expected is None:
            with pytest.raises(BudgetError) as caught:
                solve_bits(units, {"size": share})
            nearest = caught.value.result
            assert not nearest.feasible and nearest.size_bytes == sum(min(u.sizes_bytes) for u in units)
        else:
            plan = solve_bits(units, {"size": share})
            assert plan.size_bytes <= share * whole
            # One limit is solved over 4000 bins, and what rounding up leaves is spent: exact at these sizes.
            assert plan.loss == pytest.approx(expected)
            both = solve_bits(units, {"size": share, "latency": 1.0})
            assert both.loss == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_a_limit_on_loss_gives_the_least_size(seed: int) -> None:
    units = draw_units(seed)
    limit = 0.3 * sum(u.losses[2] for u in units)
    sizes = [
        sum(u.sizes_bytes[o] for u, o in zip(units, choice, strict=True))
        for choice in itertools.product(range(3), repeat=len(units))
        if sum(u.losses[o] for u, o in zip(units, choice, strict=True)) <= limit
    ]
    plan = solve_bits(units, {"loss": limit})
    assert plan.loss <= limit
    assert plan.size_bytes <= 1.01 * min(sizes)


def test_layers_that_read_one_tensor_choose_together(traced: Traced, units: tuple[UnitOptions, ...]) -> None:
    assert [u.layers for u in units] == [("stem",), ("first",), ("second",), ("third", "side"), ("head",)]
    whole = fold(traced.module, frozenset(SCHEME.weighted))
    assert units[1].sizes_bytes == (8 * 72 * 4 + 32, 8 * 72 + 64, 8 * 72 // 2 + 64)
    assert units[3].float_bytes == sum(count_bytes(whole, n, FLOAT, SCHEME) for n in ("third", "side"))


def test_losses_are_those_of_the_unit_alone(traced: Traced, units: tuple[UnitOptions, ...]) -> None:
    """Against post-training quantization of just that layer: the same grids for the weight and what it multiplies."""
    batches = make_batches()
    name = "second"
    others = [n for n in find_layers(traced.module, frozenset(SCHEME.weighted)) if n != name]
    alone = quantize(
        traced.module, batches, scheme=replace(SCHEME, bits={name: (4, 8)}), exclude=others, ranges="mse"
    ).module
    with torch.no_grad():
        outputs = [(alone(*b), traced.module(*b)) for b in batches]
    loss = sum(float(measure_divergence(o, t).sum()) for o, t in outputs) / 48
    # The converted layer also rounds its own output, to 8 bits: little beside 4-bit weights.
    assert units[2].losses[2] == pytest.approx(loss, rel=0.25)
    assert units[2].losses[0] == 0.0 and units[2].losses[1] < 0.1 * units[2].losses[2]


def test_rounding_a_unit_leaves_the_graph_alone(traced: Traced) -> None:
    folded = fold(traced.module, frozenset(SCHEME.weighted))
    before = {name: value.clone() for name, value in folded.state_dict().items()}
    found = find_units(folded, SCHEME)
    histograms = collect_histograms(folded, found, make_batches())
    alone = round_unit(folded, found[1], (2, 8), histograms[found[1].tensors[0]], SCHEME, span_mse)
    assert all(torch.equal(value, before[name]) for name, value in folded.state_dict().items())
    weight = alone.get_buffer("first.weight")
    assert all(len(row.unique()) <= 3 for row in weight)


def plant(net: Net, name: str) -> Net:
    """Give each channel of a layer one weight that all others are small beside, on an input that is always zero."""
    layer = getattr(net, name)
    with torch.no_grad():
        layer.weight[:, 0, 0, 0] = 60 * layer.weight.abs().amax()
    return net


@pytest.mark.parametrize("bad", ["first", "second"])
def test_a_planted_sensitive_layer_keeps_more_bits(bad: str) -> None:
    net, data = make_net(), [x for (x,) in make_batches()]
    with torch.no_grad():
        # The channel the large weights read is dead, so that the float function stays ordinary.
        net.stem.weight[0] = 0
        net.stem.bias[0] = -1.0  # type: ignore[index]
        net.first.weight[0] = 0
        net.first.bias[0] = -1.0  # type: ignore[index]
    plain = choose_bits(net, data, budget=jt.Budget(size=0.2))
    plan = choose_bits(plant(net, bad), data, budget=jt.Budget(size=0.2))
    before, after = (next(u.losses[2] for u in p.units if u.layers == (bad,)) for p in (plain, plan))
    assert after > 10 * before
    others = {"first", "second", "third"} - {bad}
    assert plan.bits[bad][0] > min(plan.bits[name][0] for name in others)


def test_a_plan_is_what_quantize_makes(traced: Traced) -> None:
    data = [x for (x,) in make_batches()]
    plan = choose_bits(make_net(), data, budget=jt.Budget(size=0.24))
    assert 4 in {pair[0] for pair in plan.bits.values()} and "No kernel" in plan.note
    bits, floats = split_bits(plan.bits)
    found = quantize(traced.module, make_batches(), scheme=replace(SCHEME, bits=bits), exclude=floats)
    assert {s.layer: s.bits for s in found.sites} == {name: pair[0] for name, pair in plan.bits.items()}
    assert isinstance(found.module, GraphModule)
    mixed = jt.quantize(make_net(), data, bits=plan.bits)
    assert mixed.sites == found.sites and "no kernel" in mixed.note
    with pytest.raises(InputError, match="narrowed"):
        jt.quantize(make_net(), data, bits={"stem": (8, 8)}, weight_bits=4)
    with pytest.raises(InputError, match="static"):
        jt.quantize(make_net(), data, bits={"stem": (8, 8)}, kind="dynamic")


def test_latency_comes_from_measured_layers() -> None:
    plan = choose_bits(make_net(), [x for (x,) in make_batches()], budget=jt.Budget(latency=1.0), samples=16)
    assert plan.latency_ms is not None and plan.loss == 0.0
    assert set(plan.bits.values()) == {FLOAT}, "with room for all, float loses least"
    assert all(len(u.latencies_ms) == 3 and u.latencies_ms[1] == u.latencies_ms[2] for u in plan.units)


def test_a_limit_that_cannot_be_kept_names_the_nearest() -> None:
    with pytest.raises(BudgetError, match="nearest") as caught:
        choose_bits(make_net(), [x for (x,) in make_batches()], budget=jt.Budget(size=0.01), samples=16)
    assert not caught.value.result.feasible
    assert set(caught.value.result.bits.values()) == {(4, 8)}


def test_limits_and_options_without_meaning_are_refused() -> None:
    net, data = make_net(), [x for (x,) in make_batches()]
    with pytest.raises(InputError, match="needs a limit"):
        choose_bits(net, data)
    with pytest.raises(InputError, match="Budget macs"):
        choose_bits(net, data, budget=jt.Budget(macs=0.5))
    with pytest.raises(InputError, match="loss=-1"):
        choose_bits(net, data, loss=-1)
    with pytest.raises(InputError, match=r"\(1, 8\)"):
        choose_bits(net, data, loss=1.0, options=((1, 8),))
    with pytest.raises(InputError, match="twice"):
        choose_bits(net, data, loss=1.0, options=((8, 8), (8, 8)))
