"""Criteria and least squares against closed forms and against networks whose right answer is known."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from jettison.core.errors import UnknownName
from jettison.graph.axes import Keeps
from jettison.graph.groups import Graph, trace
from jettison.graph.layers import find_layers
from jettison.graph.rewrite import prune_graph, slice_graph
from jettison.graph.trace import Batch, get_tensor, set_tensor
from jettison.pruning.criteria import CRITERIA, DAMPING, find_criterion, order_by_magnitude, order_by_obs
from jettison.pruning.moments import Moments, collect_moments, make_moments
from jettison.pruning.recalibrate import recalibrate, refit_consumers, solve_ridge
from jettison.testing import build_model, draw_kept, randomise

LOSSLESS = 1e-6
"""float32 rounding, relative to the largest output."""
LOSSLESS_DOUBLE = 1e-9
"""float64: the ridge of 1e-8 pulls towards old weights by about this much."""
ALL = 10**6
"""More positions than any test has."""


class Small(nn.Module):
    """One hidden convolution between two others, every channel of it in use."""

    def __init__(self, hidden: int = 6, groups: int = 1, norm: bool = False) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, hidden, 3, padding=1)
        self.norm = nn.BatchNorm2d(hidden) if norm else nn.Identity()
        self.b = nn.Conv2d(hidden, 4, 3, padding=1, groups=groups)
        self.c = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.relu(self.b(torch.relu(self.norm(self.a(x))))))
        return y


def _pictures(count: int, size: int = 4, *, seed: int = 3, dtype: torch.dtype = torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 6, 6, generator=generator, dtype=dtype),) for _ in range(count)]


def _copy(graph: Graph, kept: dict[str, list[int]]) -> tuple[fx.GraphModule, Keeps]:
    """Slice with tensors of its own, nodes named as in the original."""
    keeps = graph.keeps(kept)
    pruned = slice_graph(graph, keeps)
    for name, tensor in dict(pruned.state_dict()).items():
        set_tensor(pruned, name, tensor.clone())
    return pruned, keeps


def _error(graph: Graph, pruned: fx.GraphModule, batches: list[Batch]) -> float:
    """Mean squared error over the outputs' variance."""
    with torch.no_grad():
        pairs = [(graph.module(*b)[0], pruned(*b)[0]) for b in batches]
    expected, found = (torch.cat([p[i] for p in pairs]) for i in (0, 1))
    return float((expected - found).pow(2).mean() / expected.var())


def _moments(graph: Graph, batches: list[Batch]) -> dict[fx.Node, Moments]:
    return collect_moments(graph.module, find_layers(graph.module), batches, positions=ALL, seed=0)


def _with_twin(dtype: torch.dtype) -> nn.Module:
    """A network whose channel 5 repeats channel 2, and where every other channel is weaker than these two."""
    model = randomise(Small())
    with torch.no_grad():
        model.get_parameter("a.weight")[[2, 5]] *= 3
        for name in ("a.weight", "a.bias"):
            tensor = model.get_parameter(name)
            tensor[5] = tensor[2]
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_repeated_channel_costs_nothing(dtype: torch.dtype) -> None:
    graph = trace(_with_twin(dtype), _pictures(1, dtype=dtype)[0])
    batches = _pictures(4, dtype=dtype)
    group = graph.find("a")
    moments = _moments(graph, batches)
    order = order_by_obs(graph, group, moments, 0)
    assert int(order[-1]) in (2, 5)
    assert int(order_by_magnitude(graph, group, moments, 0)[-1]) not in (2, 5)  # it cannot see redundancy
    tolerance = LOSSLESS if dtype == torch.float32 else LOSSLESS_DOUBLE
    errors = {}
    for name, dropped in (
        ("obs", int(order[-1])),
        ("magnitude", int(order_by_magnitude(graph, group, moments, 0)[-1])),
    ):
        pruned, keeps = _copy(graph, {"a": [i for i in range(6) if i != dropped]})
        ridge = 1e-7 if dtype == torch.float32 else 1e-11
        refit_consumers(graph, pruned, keeps, moments, ridge=ridge)
        with torch.no_grad():
            expected, found = graph.module(*batches[0])[0], pruned(*batches[0])[0]
        errors[name] = float((expected - found).abs().max() / expected.abs().max())
    assert errors["obs"] <= 10 * tolerance
    assert errors["magnitude"] > 1e-2


class Thin(nn.Module):
    """Eight hidden features that lie in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.tanh(self.b(self.a(x))))
        return y


def test_inputs_of_rank_three_need_three_channels() -> None:
    model = randomise(Thin()).double()
    with torch.no_grad():
        low = torch.randn(8, 3, dtype=torch.float64) @ torch.randn(3, 5, dtype=torch.float64)
        model.get_parameter("a.weight").copy_(low)
    batches: list[Batch] = [(torch.randn(32, 5, dtype=torch.float64),) for _ in range(4)]
    graph = trace(model, batches[0])
    moments = _moments(graph, batches)
    order = order_by_obs(graph, graph.find("a"), moments, 0)
    errors = []
    for count in (3, 2):
        pruned, keeps = _copy(graph, {"a": sorted(order[:count].tolist())})
        refit_consumers(graph, pruned, keeps, moments, ridge=1e-11)
        errors.append(_error(graph, pruned, batches))
    assert errors[0] < LOSSLESS_DOUBLE < 1e-3 < errors[1]


def _ridge(x: Tensor, y: Tensor, w: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The textbook solution, from the data themselves."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    gram = xc.T @ xc / len(x)
    strength = ridge * gram.diagonal().mean()
    left = gram + strength * torch.eye(len(gram), dtype=x.dtype)
    solved = torch.linalg.solve(left, xc.T @ yc / len(x) + strength * w.T).T
    return solved, y.mean(0) - solved @ x.mean(0)


def test_refitting_is_the_closed_form() -> None:
    model = randomise(Thin()).double()
    batches: list[Batch] = [(torch.randn(20, 5, dtype=torch.float64),) for _ in range(3)]
    graph = trace(model, batches[0])
    kept = [0, 2, 3, 6]
    pruned, keeps = _copy(graph, {"a": kept})
    refit_consumers(graph, pruned, keeps, _moments(graph, batches), ridge=1e-2)
    with torch.no_grad():
        hidden = model.get_submodule("a")(torch.cat([b[0] for b in batches]))
        target = model.get_submodule("b")(hidden)
    weight, bias = _ridge(hidden[:, kept], target, model.get_parameter("b.weight")[:, kept].detach(), 1e-2)
    assert torch.allclose(get_tensor(pruned, "b.weight"), weight, atol=1e-10)
    assert torch.allclose(get_tensor(pruned, "b.bias"), bias, atol=1e-10)
    assert torch.equal(get_tensor(graph.module, "b.weight"), model.get_parameter("b.weight"))


def test_obs_greedy_scores_are_the_losses_of_least_squares() -> None:
    """The first channel OBS takes is the one without which ridge least squares does best."""
    model = randomise(Thin()).double()
    batches: list[Batch] = [(torch.randn(64, 5, dtype=torch.float64),) for _ in range(2)]
    graph = trace(model, batches[0])
    moments = _moments(graph, batches)
    order = order_by_obs(graph, graph.find("a"), moments, 0)
    layer = next(y for y in find_layers(graph.module) if y.name == "b")
    found = moments[layer.node]
    weight = model.get_parameter("b.weight").detach()
    gram = found.xx[0] / found.count
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(8, dtype=gram.dtype)
    losses = []
    for gone in range(8):
        rest = [i for i in range(8) if i != gone]
        best = torch.linalg.solve(damped[rest][:, rest], damped[rest] @ weight.T).T
        change = -weight.clone()
        change[:, rest] += best
        losses.append(float(((change @ damped) * change).sum()))
    assert int(order[-1]) == min(range(8), key=losses.__getitem__)


def test_ridge_candidates_are_judged_on_other_data() -> None:
    fit, judge = (make_moments(1, 3, 2, torch.device("cpu")) for _ in range(2))
    x, w = torch.randn(200, 1, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    y = x @ w.T + 0.5
    fit.add(x[:150], y[:150])
    judge.add(x[150:], y[150:])
    start = w[None] + torch.randn(1, 2, 3, dtype=torch.float64)
    solved, shift, error = solve_ridge(fit, judge, start, centred=True)
    assert (
        error < 1e-6 and torch.allclose(solved[0], w, atol=1e-3) and torch.allclose(shift, shift * 0 + 0.5, atol=1e-3)
    )
    kept, _, _ = solve_ridge(fit, judge, w[None], centred=True, ridges=())
    assert torch.equal(kept[0], w)  # the weight as given competes


def _residual_case() -> tuple[Graph, dict[str, list[int]], list[Batch]]:
    model, _ = build_model("residual")
    batches = _pictures(8, 8)
    graph = trace(model, batches[0])
    return graph, draw_kept(graph, seed=2, share=0.7), batches


def test_recalibrating_reduces_the_error() -> None:
    graph, kept, batches = _residual_case()
    pruned, keeps = _copy(graph, kept)
    fresh = _pictures(4, 8, seed=77)
    before = _error(graph, pruned, fresh)
    shares = recalibrate(graph, pruned, keeps, batches, positions=ALL, seed=0)
    assert _error(graph, pruned, fresh) < 0.5 * before
    assert set(shares) == {y.name for y in find_layers(graph.module)}
    assert all(share >= -1e-9 for share in shares.values())


def test_recalibrating_is_deterministic() -> None:
    graph, kept, batches = _residual_case()
    states = []
    for _ in range(2):
        pruned, keeps = _copy(graph, kept)
        recalibrate(graph, pruned, keeps, batches, positions=300, seed=5)
        states.append(pruned.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_recalibrating_leaves_the_original_alone() -> None:
    graph, kept, batches = _residual_case()
    before = {k: v.clone() for k, v in graph.module.state_dict().items()}
    pruned, keeps = _copy(graph, kept)
    recalibrate(graph, pruned, keeps, batches, positions=ALL, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in graph.module.state_dict().items())


@pytest.mark.parametrize(
    "name", ["depthwise", "grouped", "sequence", "gates", "cross_stage", "attention", "transposed"]
)
def test_every_kind_of_layer(name: str) -> None:
    model, inputs = build_model(name)
    generator = torch.Generator().manual_seed(1)
    batches: list[Batch] = [(torch.randn(8, *inputs[0].shape[1:], generator=generator),) for _ in range(8)]
    graph = trace(model, inputs)
    pruned, keeps = _copy(graph, draw_kept(graph, seed=4, share=0.75))
    before = _error(graph, pruned, batches)
    shares = recalibrate(graph, pruned, keeps, batches, positions=ALL, seed=0)
    assert set(shares) == {y.name for y in find_layers(graph.module)}
    assert _error(graph, pruned, batches) < 0.9 * before


def test_batches_of_unequal_sizes() -> None:
    graph, kept, _ = _residual_case()
    batches = [_pictures(1, size, seed=size)[0] for size in (7, 1, 5, 3, 8)]
    pruned, keeps = _copy(graph, kept)
    before = _error(graph, pruned, batches)
    recalibrate(graph, pruned, keeps, batches, positions=ALL, seed=0)
    assert _error(graph, pruned, batches) < before
    count = {m.count for m in _moments(graph, batches).values()}
    assert 24 in count  # the classifier saw every sample once


def test_layers_used_twice_keep_their_weights() -> None:
    model, inputs = build_model("shared")
    graph = trace(model, inputs)
    kept = draw_kept(graph, seed=0)
    pruned, keeps = _copy(graph, kept)
    before = {k: v.clone() for k, v in pruned.state_dict().items()}
    shares = recalibrate(graph, pruned, keeps, [(torch.randn(16, 4),) for _ in range(4)], positions=ALL, seed=0)
    assert "twice" not in shares and "first" in shares and "out" in shares
    for name in ("twice.weight", "twice.bias", "mirror.weight"):
        assert torch.equal(before[name], pruned.state_dict()[name])
    assert not torch.equal(before["out.weight"], pruned.state_dict()["out.weight"])


class Tokens(nn.Module):
    """BatchNorm over tokens (dimension 1), as many of them as the layer before has features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 5, bias=False)
        self.norm, self.out = nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.relu(self.norm(self.b(torch.relu(self.a(x))))))
        return y


def test_a_norm_over_tokens_takes_no_shift_of_features() -> None:
    model = randomise(Tokens())
    batches: list[Batch] = [(torch.randn(8, 5, 4),) for _ in range(6)]
    graph = trace(model, batches[0])
    pruned, keeps = _copy(graph, {"a": [0, 1, 2, 4]})
    mean = get_tensor(pruned, "norm.running_mean").clone()
    before = _error(graph, pruned, batches)
    recalibrate(graph, pruned, keeps, batches, positions=ALL, seed=0)
    assert torch.equal(get_tensor(pruned, "norm.running_mean"), mean)
    assert _error(graph, pruned, batches) < before


def test_a_norm_behind_a_layer_takes_its_shift() -> None:
    graph, kept, batches = _residual_case()
    pruned, keeps = _copy(graph, kept)
    mean = get_tensor(pruned, "norm.running_mean").clone()
    recalibrate(graph, pruned, keeps, batches, positions=ALL, seed=0)
    assert get_tensor(pruned, "norm.running_mean").shape == mean.shape


@functools.cache
def _criterion_case() -> tuple[Graph, dict[fx.Node, Moments]]:
    graph = trace(*build_model("attention"))
    return graph, _moments(graph, [(torch.randn(4, 3, 8, 8),) for _ in range(2)])


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_orders_every_group(name: str) -> None:
    graph, moments = _criterion_case()
    for group in graph.groups:
        order = CRITERIA[name](graph, group, moments, 3)
        assert sorted(order.tolist()) == list(range(group.size))
        assert torch.equal(order, CRITERIA[name](graph, group, moments, 3))


def test_criteria_put_a_dead_channel_last() -> None:
    model = randomise(Small())
    with torch.no_grad():
        model.get_parameter("b.weight")[:, 1] = 0
        model.get_parameter("a.weight")[1] *= 1e-3
        model.get_parameter("a.bias")[1] = 0
    graph = trace(model, _pictures(1)[0])
    moments = _moments(graph, _pictures(2))
    for name in ("obs", "activation", "magnitude"):
        assert int(CRITERIA[name](graph, graph.find("a"), moments, 0)[-1]) == 1


def test_criteria_by_name_or_function() -> None:
    assert find_criterion("obs") is order_by_obs
    assert find_criterion(order_by_magnitude) is order_by_magnitude
    with pytest.raises(UnknownName, match="magnitude"):
        find_criterion("magnitud")


def test_positions_are_limited_and_drawn_by_seed() -> None:
    graph = trace(randomise(Small()), _pictures(1)[0])
    layers, batches = find_layers(graph.module), _pictures(3)
    some, same, other = (collect_moments(graph.module, layers, batches, positions=60, seed=s) for s in (0, 0, 1))
    for layer in layers:
        assert some[layer.node].count == 63  # 60 // 3 + 1 of each batch
        assert torch.equal(some[layer.node].xx, same[layer.node].xx)
        assert not torch.equal(some[layer.node].xx, other[layer.node].xx)


def test_pruned_graphs_go_on_pruning() -> None:
    graph: Any = trace(randomise(Small()), _pictures(1)[0])
    once = prune_graph(graph, {"a": [0, 1, 3, 5]})
    order = order_by_obs(once, once.find("a"), _moments(once, _pictures(2)), 0)
    assert len(order) == 4
