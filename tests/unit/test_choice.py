"""What may be kept: counts, names, ties; and positions of slabs, proven a symmetry and shown to lose less."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jettison as jt
from jettison.core.errors import InputError, UnknownName, VerificationError
from jettison.core.recipe import Recipe
from jettison.graph.axes import Atom
from jettison.graph.check import check_masked
from jettison.graph.groups import Graph, Group, trace
from jettison.graph.layers import find_owners
from jettison.graph.rewrite import prune_graph, slice_graph
from jettison.graph.slabs import Slabs, check_slabs, find_slabs, permute_slabs
from jettison.graph.trace import set_tensor
from jettison.graph.unroll import unroll
from jettison.pruning.choice import balance, choose_counts, make_width, match_groups, rank_slabs, read_widths
from jettison.pruning.criteria import order_by_magnitude
from jettison.testing import MODELS, build_model, draw_kept, randomise

SYMMETRY = 1e-12
"""Relative, in float64: the same sums in another order, through a small network."""


class Attend(nn.Module):
    """Self-attention with a norm over head_dim where asked for, a residual, and an MLP."""

    def __init__(self, heads: int = 4, size: int = 8, *, norm: bool = False, rotary: bool = False) -> None:
        super().__init__()
        self.heads, self.size, self.scale, width = heads, size, size**-0.5, 12
        self.qkv, self.out = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)
        self.norm = nn.RMSNorm(size) if norm else nn.Identity()
        self.register_buffer("wave", torch.rand(5, size) if rotary else None)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.norm(q), self.norm(k)
        if self.wave is not None:
            q = q * self.wave
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).reshape(b, n, -1)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(x)))


class GroupedNet(nn.Module):
    """ResNeXt in small: a convolution of four groups between two others, norms that know groups."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.b = nn.Conv2d(32, 32, 3, padding=1, groups=groups)
        self.split = nn.GroupNorm(groups, 32)
        self.c = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.split(self.b(F.relu(self.norm(self.a(x)))))))


@functools.cache
def _attention(**kwargs: Any) -> tuple[Graph, Tensor]:
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))
    return trace(randomise(Attend(**kwargs)), x), x


@functools.cache
def _grouped() -> tuple[Graph, Tensor]:
    x = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return trace(randomise(GroupedNet()), x), x


def _draw_orders(slabs: Slabs, seed: int) -> Tensor:
    """Another order in each slab than in the one before it."""
    first = torch.randperm(slabs.group.size, generator=torch.Generator().manual_seed(seed))
    return torch.stack([first.roll(i) for i in range(slabs.count)])


def _balanced(graph: Graph) -> list[Slabs]:
    return [s for g in graph.groups if (s := find_slabs(graph, g)).atoms]


# Slabs


SLABS = {"attention", "encoder", "grouped", "grouped_query", "norms", "sequence", "transposed"}
"""The small networks that have slabs; in the others every axis stands alone somewhere."""


@pytest.mark.parametrize("name", MODELS)
def test_each_slab_may_have_an_order_of_its_own(name: str) -> None:
    graph = trace(*build_model(name))
    found = _balanced(graph)
    assert bool(found) == (name in SLABS)
    for slabs in found:
        permuted = permute_slabs(graph, {slabs.group.name: _draw_orders(slabs, 3)})
        assert check_slabs(graph, permuted, graph.traced.example) <= SYMMETRY
        state = permuted.module.state_dict()
        assert any(not torch.equal(state[n], t) for n, t in graph.module.state_dict().items())
    everywhere = {s.group.name for s in found}
    kept = {n: k for n, k in draw_kept(graph, seed=2).items() if n in everywhere}
    if kept:
        pruned = prune_graph(permuted, kept)
        assert check_masked(permuted, pruned.module, permuted.keeps(kept), graph.traced.example).passed


def test_a_member_left_in_its_order_is_noticed() -> None:
    graph, x = _attention()
    slabs = next(s for s in _balanced(graph) if s.group.members[-1].tensor == "out.weight")
    permuted = permute_slabs(graph, {slabs.group.name: _draw_orders(slabs, 0)})
    permuted.module.get_submodule("out").register_parameter("weight", graph.module.get_parameter("out.weight"))
    with pytest.raises(VerificationError, match="Reordering"):
        check_slabs(graph, permuted, (x,))


@pytest.mark.parametrize("alone", ["norm", "rotary"])
def test_an_axis_that_also_stands_alone_is_refused(alone: str) -> None:
    """One weight for all heads has one order; that orders of their own would be wrong is shown by forcing them."""
    graph, x = _attention(**{alone: True})
    refused = find_slabs(graph, _find_by(graph, 8, qkv_weight=0, out_weight=1))
    assert not refused.atoms and ("norm.weight" if alone == "norm" else "wave") in refused.refusal
    with pytest.raises(InputError, match="orders of their own"):
        permute_slabs(graph, {refused.group.name: torch.arange(8).expand(4, -1)})
    forced = Slabs(refused.group, (_find_by(graph, 4, qkv_weight=0, out_weight=1).atom,))
    permuted = slice_graph(graph, {})
    from jettison.graph import slabs as module

    orders = _draw_orders(forced, 0)
    for name, dims in graph.axes.tensors.items():
        if name.startswith(("qkv", "out")):
            value = module._permute(graph.module.get_parameter(name), dims, forced, orders)
            set_tensor(permuted, name, value)
    with torch.no_grad():
        assert float((permuted(x)[0] - graph.module(x)[0]).abs().max()) > 1e-3


class Mixing(nn.Module):
    """Heads that a softmax, a norm or a sum with a neighbour mix: no head stands by itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b, self.mix = how, nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).view(-1, 3, 4)
        if self.how == "softmax":
            y = y * y.softmax(1)
        elif self.how == "cumsum":
            y = y.cumsum(1)
        elif self.how == "norm":
            y = F.layer_norm(y.transpose(1, 2), (3,)).transpose(1, 2)
        elif self.how == "linear":
            y = y + self.mix(y.transpose(1, 2)).transpose(1, 2)
        elif self.how == "flip":
            y = y + y.flip(1)
        return self.b(y.reshape(-1, 12))


@pytest.mark.parametrize("how", ["none", "softmax", "cumsum", "norm", "linear", "flip"])
def test_slabs_that_are_mixed_have_one_order(how: str) -> None:
    graph = trace(randomise(Mixing(how)), torch.randn(3, 6))
    inner = [find_slabs(graph, g) for g in graph.groups if g.size == 4]
    assert all(bool(s.atoms) == (how == "none") for s in inner)


def _score(graph: Graph, slabs: Slabs, kept: list[list[int]]) -> float:
    """The energy of what is kept, in the measure the magnitude criterion ranks by."""
    view, groups = unroll(graph, slabs, slice_graph(graph, {}))
    if len(groups) < slabs.count:
        kept = [[i * slabs.group.size + p for i, positions in enumerate(kept) for p in positions]]
    total = 0.0
    for group, positions in zip(groups, kept, strict=True):
        for member in group.members:
            tensor = view.module.state_dict()[member.tensor].double()
            if tensor.dim() > 1:
                owners = find_owners(view.axes.tensors[member.tensor][member.dim], group.atom)
                energy = tensor.pow(2).transpose(0, member.dim).flatten(1).sum(1)
                mine = torch.zeros(group.size, dtype=torch.float64)
                mine.index_add_(0, owners[owners >= 0], energy[owners >= 0])
                total += float((mine / mine.mean())[positions].sum())
    return total


@pytest.mark.parametrize("make", [_attention, _grouped])
def test_ranking_inside_slabs_keeps_more(make: Any) -> None:
    graph, x = make()
    balanced_errors: list[float] = []
    plain_errors: list[float] = []
    found = _balanced(graph)
    for slabs in found:
        order = order_by_magnitude(graph, slabs.group, {}, 0)
        orders = rank_slabs(graph, slabs, order_by_magnitude, {}, 0)
        for count in range(1, slabs.group.size):
            common = [order[:count].tolist()] * slabs.count
            assert _score(graph, slabs, orders[:, :count].tolist()) >= _score(graph, slabs, common) - 1e-9
        count = slabs.group.size // 2
        permuted, done = balance(graph, [slabs.group.name], order_by_magnitude, {}, 0)
        assert done == {slabs.group.name}
        for errors, whole, kept in (
            (balanced_errors, permuted, range(count)),
            (plain_errors, graph, order[:count].tolist()),
        ):
            small = prune_graph(whole, {slabs.group.name: kept})
            assert check_masked(whole, small.module, whole.keeps({slabs.group.name: kept}), (x,)).passed
            with torch.no_grad():
                errors.append(float((small.module(x)[0] - graph.module(x)[0]).pow(2).mean()))
    assert found and sum(balanced_errors) < sum(plain_errors)


def test_a_slab_s_columns_are_those_of_all_heads_that_read_it() -> None:
    graph = trace(*build_model("grouped_query"))  # two value heads of size 4, each for two query heads
    slabs = find_slabs(graph, _find_by(graph, 4, v_weight=0, out_weight=1))
    view, groups = unroll(graph, slabs, slice_graph(graph, {}))
    columns = [find_owners(view.axes.tensors["out.weight"][1], g.atom).tolist() for g in groups]
    none, some = [-1] * 8, [0, 1, 2, 3] * 2
    assert columns == [some + none, none + some]


def test_of_axes_that_number_each_other_one_is_put_in_order() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Any:
            return self.b(self.a(x).view(-1, 3, 4).tanh().reshape(-1, 12))

    graph = trace(randomise(Both()), torch.randn(3, 5))
    names = [g.name for g in graph.groups]
    assert len(_balanced(graph)) == 2
    _, done = balance(graph, names, order_by_magnitude, {}, 0)
    assert len(done) == 1


@pytest.mark.parametrize("make", [Attend, GroupedNet])
def test_prune_balances_and_stays_the_caller_s_class(make: Any) -> None:
    x = torch.randn(4, 5, 12) if make is Attend else torch.randn(4, 3, 6, 6)
    model = randomise(make())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    inner = {s.group.name: s.group.size // 2 for s in _balanced(trace(model, x))}
    for criterion, calibration in (("magnitude", None), ("obs", x), ("random", None)):
        small = jt.prune(model, x, keep=inner, criterion=criterion, calibration=calibration)
        plain = jt.prune(
            model, x, keep=inner, criterion=criterion, calibration=calibration, recipe=Recipe(balance=False)
        )
        assert type(small) is make and type(plain) is make
        shapes = [[t.shape for t in m.state_dict().values()] for m in (small, plain)]
        assert shapes[0] == shapes[1]
        if criterion == "magnitude":
            with torch.no_grad():
                errors = [float((m(x) - model(x)).pow(2).mean()) for m in (small, plain)]
            assert errors[0] < errors[1]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# Whole heads, whole groups


def _find_by(graph: Graph, size: int, **dims: int) -> Group:
    wanted = {(n.replace("_", "."), d) for n, d in dims.items()}
    return next(g for g in graph.groups if g.size == size and wanted <= {(m.tensor, m.dim) for m in g.members})


def _check_removed(graph: Graph, group: Group, kept: list[int], shapes: dict[str, tuple[int, ...]]) -> None:
    pruned = prune_graph(graph, {group.name: kept})
    keeps = graph.keeps({group.name: kept})
    assert check_masked(graph, pruned.module, keeps, graph.traced.example).passed
    assert {n: tuple(pruned.module.state_dict()[n].shape) for n in shapes} == shapes


def test_whole_heads_and_groups_come_away() -> None:
    graph, _ = _attention()
    heads = _find_by(graph, 4, qkv_weight=0, out_weight=1)
    _check_removed(graph, heads, [0, 3], {"qkv.weight": (3 * 2 * 8, 12), "out.weight": (12, 16)})
    graph, _ = _grouped()
    groups = _find_by(graph, 4, a_weight=0, b_weight=0, split_weight=0, c_weight=1)
    _check_removed(
        graph, groups, [1, 2, 3], {"a.weight": (24, 3, 3, 3), "b.weight": (24, 8, 3, 3), "c.weight": (5, 24, 1, 1)}
    )


def test_a_key_value_head_takes_its_query_heads_along() -> None:
    graph = trace(*build_model("grouped_query"))  # four query heads of size 4 over two key and value heads
    shared = _find_by(graph, 2, q_weight=0, k_weight=0, v_weight=0, out_weight=1)
    _check_removed(
        graph, shared, [1], {"q.weight": (8, 6), "k.weight": (4, 6), "v.weight": (4, 6), "out.weight": (6, 8)}
    )


# Counts and names


def test_steps_follow_what_a_position_holds() -> None:
    graph, _ = _attention(heads=4, size=6)
    widths = read_widths(graph, Recipe(multiple=4))
    heads, inner = _find_by(graph, 4, qkv_weight=0, out_weight=1), _find_by(graph, 6, out_weight=1)
    assert widths[heads.name].step == 2  # of 6 positions each, two heads make a multiple of four
    assert widths[inner.name].step == 4 and widths["up"].step == 4
    assert read_widths(graph, Recipe(multiple=1))["up"].step == 1
    graph, _ = _attention(heads=4, size=8)
    assert read_widths(graph, Recipe(multiple=8))[_find_by(graph, 4, out_weight=1).name].step == 1


def test_all_is_a_count_too() -> None:
    width = make_width(10, 8, Recipe())
    assert [width.round_share(s) for s in (1.0, 0.95, 0.9, 0.8, 0.1)] == [10, 10, 8, 8, 8]
    assert width.list_counts((0.95, 0.5)) == (10, 8)


@pytest.mark.parametrize(("multiple", "expected"), [(1, 7), (4, 8), (8, 8), (16, 16)])
def test_shares_are_rounded_and_counts_are_not(multiple: int, expected: int) -> None:
    graph, _ = _attention()
    recipe = Recipe(multiple=multiple)
    assert choose_counts(graph, {"up": 0.3}, recipe)["up"] == expected
    assert choose_counts(graph, {"up": 3}, recipe) == {g.name: 3 if g.name == "up" else g.size for g in graph.groups}


def test_smallest_widths() -> None:
    graph, _ = _attention()
    assert choose_counts(graph, {"up": 0.01}, Recipe(multiple=1))["up"] == 3  # an eighth of 24
    assert choose_counts(graph, {"up": 0.01}, Recipe(multiple=1, least=0.5))["up"] == 12
    assert choose_counts(graph, {"up": 0.01}, Recipe(multiple=4, minimum=9))["up"] == 12
    assert choose_counts(graph, {"up": 0.01}, Recipe(minimum=99))["up"] == 24


def _counts(graph: Graph, keep: Any = 0.5, **settings: Any) -> dict[str, int]:
    return choose_counts(graph, keep, Recipe(multiple=1, **settings))


def test_protection_by_group_module_and_pattern() -> None:
    graph = trace(*build_model("residual"))
    names = [g.name for g in graph.groups]
    assert names == ["stem", "a.0", "b.0"]

    def whole(*protect: str) -> set[str]:
        return {n for n, c in _counts(graph, protect=protect).items() if c == graph.find(n).size}

    assert whole() == set()
    assert whole("stem") == {"stem"} and whole("a.0") == {"a.0"}  # a group's own name
    assert whole("a") == {"stem", "a.0"} == whole("a*") == whole("a.0.*")  # a module and what it is tied to
    assert whole("head*") == {"stem"} and whole("?.0") == {"stem", "a.0", "b.0"}
    assert whole("a.2") == set()  # a module without tensors
    with pytest.raises(UnknownName, match=r"'a\.3'"):
        whole("a.33")
    with pytest.raises(UnknownName, match="module or prune group"):
        match_groups(graph, "backbone.*")
    with pytest.raises(InputError, match="protected"):
        _counts(graph, {"a.0": 3}, protect=("a.0",))


class Blocks(nn.Module):
    def __init__(self, *hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, h), nn.ReLU(), nn.Linear(h, 6)) for h in hidden)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_tied_groups_keep_one_count() -> None:
    graph = trace(randomise(Blocks(16, 16, 16)), torch.randn(2, 6))
    tie = (("blocks.*.0",),)
    assert set(_counts(graph, {"blocks.1.0": 5}, tie=tie).values()) == {5}
    assert set(_counts(graph, {"blocks.1.0": 5}, tie=(("blocks.0.0", "blocks.1.0"),)).values()) == {5, 16}
    chained = (("blocks.0.0", "blocks.1.0"), ("blocks.1.0", "blocks.2.0"))
    assert set(_counts(graph, {"blocks.0.0": 5}, tie=chained).values()) == {5}
    assert set(_counts(graph, tie=tie, protect=("blocks.2.0",)).values()) == {16}
    with pytest.raises(InputError, match="different counts"):
        _counts(graph, {"blocks.0.0": 4, "blocks.1.0": 5}, tie=tie)
    with pytest.raises(UnknownName):
        _counts(graph, tie=(("block.*",),))
    uneven = trace(randomise(Blocks(16, 12)), torch.randn(2, 6))
    with pytest.raises(InputError, match="unequal sizes"):
        _counts(uneven, tie=tie)
    with pytest.raises(InputError, match="tuple of tuples"):
        Recipe(tie=("blocks.*.0",))  # type: ignore[arg-type]


# Freed outputs


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        low = F.relu(self.a(x))
        high = F.relu(self.b(low))
        return {"low": low, "high": high, "score": self.head(high.mean((2, 3)))}


def test_outputs_may_be_freed() -> None:
    model, x = randomise(Features()), torch.randn(2, 3, 8, 8)
    assert not {"a", "b", "head"} & {g.name for g in trace(model, x).groups}
    # Outputs are numbered as they come: low, high, score.
    assert [g.name for g in trace(model, x, free_outputs=(1,)).groups] == ["b"]
    graph = trace(model, x, free_outputs=True)
    assert [g.name for g in graph.groups] == ["a", "b", "head"]
    kept = {"a": [0, 2, 5], "b": [1, 3, 4], "head": [2, 3]}
    pruned = prune_graph(graph, kept)
    check = check_masked(graph, pruned.module, graph.keeps(kept), (x,))
    assert check.passed and pruned.traced.free_outputs == (0, 1, 2)
    assert [tuple(y.shape) for y in pruned.module(x)] == [(2, 3, 6, 6), (2, 3, 4, 4), (2, 2)]
    wrong = {**kept, "a": [0, 1, 5]}
    assert not check_masked(graph, pruned.module, graph.keeps(wrong), (x,)).passed  # another choice is not this one
    small = jt.prune(model, x, keep={"b": 4}, criterion="magnitude", free_outputs=(1,))
    assert type(small) is Features and small(x)["high"].shape == (2, 4, 4, 4)
    with pytest.raises(InputError, match="there are 3"):
        trace(model, x, free_outputs=(3,))


def test_nothing_frozen_by_its_operator_is_freed() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Any:
            return self.embed(x).softmax(-1)

    graph = trace(randomise(Tokens()), torch.randn(2, 3, 4), free_outputs=True)
    assert graph.groups == () and all(isinstance(a, Atom) for a in graph.axes.tensors["embed.weight"])
