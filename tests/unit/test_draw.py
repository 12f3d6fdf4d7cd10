"""What is said of a graph: counts that hold, every member named, and text that fits a terminal."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jettison.core.plain import to_plain
from jettison.core.record import FrozenPart
from jettison.cost.macs import count
from jettison.graph import shares
from jettison.graph.analyse import Member
from jettison.graph.draw import WIDTH, draw_explanation, fold_groups
from jettison.graph.explain import Coupled, Explanation, Shares, Unknown, Worth, explain
from jettison.graph.groups import Graph, trace
from jettison.graph.rewrite import prune_graph
from jettison.graph.shares import list_quantities, sum_quantities
from jettison.testing import MODELS, build_model

torch.set_num_threads(1)
KINDS = ("macs", "parameters")


@cache
def traced(name: str) -> Graph:
    model, inputs = build_model(name)
    return trace(model, inputs)


@cache
def explained(name: str) -> Explanation:
    return explain(traced(name))


@cache
def halved(name: str) -> Graph:
    return prune_graph(traced(name), choose_half(traced(name)))


def choose_half(graph: Graph) -> dict[str, range]:
    return {g.name: range((g.size + 1) // 2) for g in graph.groups}


def count_all(graph: Graph) -> dict[str, int]:
    profile = count(graph.module)
    return {"macs": profile.macs, "parameters": profile.parameters}


def find_difference(name: str) -> int:
    """How far terms and the formulas of `cost.macs` are apart, at full width and at half."""
    graph = traced(name)
    quantities = list_quantities(graph)
    wrong = 0
    for keeps, actual in (({}, graph), (graph.keeps(choose_half(graph)), halved(name))):
        truth = count_all(actual)
        wrong += sum(abs(sum_quantities(quantities, kind, keeps) - truth[kind]) for kind in KINDS)
    return wrong


@pytest.mark.parametrize("name", MODELS)
def test_counts_by_terms_are_those_of_the_pruned_network(name: str) -> None:
    assert find_difference(name) == 0


@pytest.mark.parametrize("name", MODELS)
def test_worth(name: str) -> None:
    graph, found = traced(name), explained(name)
    totals = count_all(graph)
    half, pruned = choose_half(graph), count_all(halved(name))
    for kind in KINDS:
        assert getattr(found, kind) == totals[kind]
        assert getattr(found.worth.half, kind) == pytest.approx(1 - pruned[kind] / totals[kind], abs=1e-12)
        assert sum(getattr(row, kind) for row in found.rows) == totals[kind]
        assert sum(getattr(row, f"{kind}_at_half") for row in found.rows) == pruned[kind]
    first = found.groups[0]
    alone = count_all(prune_graph(graph, {first.name: half[first.name]}))
    assert first.worth.half.macs == pytest.approx(1 - alone["macs"] / totals["macs"], abs=1e-12)
    for worth in (found.worth, *(g.worth for g in found.groups)):
        for kind in KINDS:
            touched, half_gone, one_gone = (getattr(s, kind) for s in (worth.touched, worth.half, worth.one))
            assert 0 <= half_gone <= one_gone <= touched <= 1


class Wrapped(nn.Module):
    """A recurrent layer, a branch and a region under autocast: graphs in the graph, which read their own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.memory = nn.Linear(3, 6), nn.LSTM(6, 8, batch_first=True)
        self.left, self.right, self.leave = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.memory(self.enter(x))[0]
        y = torch.cond(y.sum() > 0, lambda v: self.left(v), lambda v: self.right(v), (y,))
        with torch.autocast("cpu", enabled=False):
            z: Tensor = self.leave(y)
        return z


def test_graphs_in_the_graph_count_too() -> None:
    graph = trace(Wrapped().eval(), torch.randn(2, 5, 3))
    found, truth = explain(graph), count_all(graph)
    assert {"macs": found.macs, "parameters": found.parameters} == truth
    assert {row.name for row in found.rows} >= {"enter", "memory", "left", "right", "leave"}
    assert found.macs > 5 * (3 * 6 + 6 * 32 + 8 * 32)


def test_a_wrong_formula_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_the_values(axes: Any, node: Any) -> Any:
        yield next(shares._attention(axes, node))

    monkeypatch.setitem(shares.FORMULAS, "scaled_dot_product_attention", forget_the_values)
    assert find_difference("attention") > 0


def test_a_term_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shares.count_kept

    def forget_groups(term: Any, keeps: Any) -> int:
        return whole(term, {})

    monkeypatch.setattr(shares, "count_kept", forget_groups)
    assert find_difference("residual") > 0


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_text_fits(name: str, every: bool) -> None:
    text = draw_explanation(explained(name), every=every)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("name", MODELS)
def test_every_member_is_named(name: str) -> None:
    found = explained(name)
    text = draw_explanation(found, every=True)
    for group in found.groups:
        assert group.members
        block = text[text.index(f"\n{group.name}\n  size {group.size},") :].split(" at one: ")[1]
        words = set(re.split(r"[,\s]+", re.split(r"\n\S", block)[0]))
        assert {f"{m.tensor}:{m.dim}" for m in group.members} <= words
    assert [(g.name, len(g.members)) for g in found.groups] == [(g.name, len(g.members)) for g in traced(name).groups]


def test_rows_say_who_makes_and_who_reads() -> None:
    found = explained("residual")
    names = [g.name for g in found.groups]
    rows = {row.name: {names[m.group]: m.role for m in row.marks} for row in found.rows}
    assert rows["stem"] == {"stem": "makes"}
    assert rows["a.0"] == {"a.0": "makes", "stem": "reads"}
    assert rows["a.3"] == {"stem": "makes", "a.0": "reads"}
    assert rows["head"] == {"stem": "reads"}
    assert next(row for row in found.rows if row.name == "stem").along == ("norm",)
    head = next(row for row in found.rows if row.name == "head")
    assert head.sides[0].frozen.startswith("an output of the network")
    assert head.sides[1].groups == (names.index("stem"),)


class Sorted(nn.Module):
    """An operator without a rule between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.linalg.matrix_exp(torch.diag_embed(self.a(x))).sum(-1))
        return y


def test_what_has_no_rule_is_named_with_its_line() -> None:
    found = explain(trace(Sorted().eval(), torch.randn(2, 3)))
    assert found.opaque
    assert all(__file__ in unknown.where for unknown in found.opaque)
    text = draw_explanation(found)
    for unknown in found.opaque:
        assert unknown.operator in text
        assert unknown.where.rpartition(":")[2] in text
    assert [row.opaque for row in found.rows if row.opaque]


def test_plain() -> None:
    plain = to_plain(explained("grouped_query"))
    assert plain["groups"][0]["members"][0].keys() == {"tensor", "dim"}
    assert plain["worth"]["half"].keys() == {"macs", "parameters"}


def make_group(name: str, members: int = 2, size: int = 8, half: float = 0.01) -> Coupled:
    parts = tuple(Member(f"{name}.{i}.weight", 0) for i in range(members))
    worth = Worth(Shares(half * 2, half * 2), Shares(half, half), Shares(half * 1.5, half * 1.5))
    return Coupled(name, size, True, (name,), parts, worth)


def make_explanation(*groups: Coupled) -> Explanation:
    return replace(explained("residual"), groups=groups, rows=())


def test_like_groups_share_a_line() -> None:
    lines = fold_groups([make_group(f"blocks.{i}.mlp.fc{j}") for i in range(12) for j in (1, 2)])
    assert [line.name for line in lines] == ["blocks.{0-11}.mlp.fc{1-2}"]
    assert len(lines[0].groups) == 24
    text = draw_explanation(make_explanation(*lines[0].groups))
    assert re.search(r"fc\{1-2\}\s+×24\s+8\s+yes\s+24\.0%\s+24\.0%\s+0\.weight:0, 1\.weight:0", text)


def test_a_line_stands_for_its_groups_and_no_others() -> None:
    names = ["blocks.1.1.fc", "blocks.2.0.fc", "blocks.2.1.fc", "blocks.2.4.fc"]
    groups = [make_group(name) for name in names]
    assert [line.name for line in fold_groups(groups)] == ["blocks.1.1.fc", "blocks.2.{0,1,4}.fc"]
    other = make_group("blocks.3.0.fc", size=9)
    assert [len(line.groups) for line in fold_groups([*groups, other])] == [1, 3, 1]


def test_a_long_table_is_cut_and_says_so() -> None:
    groups = [make_group(f"layer{i}.x", size=8 + i) for i in range(300)]
    text = draw_explanation(make_explanation(*groups))
    assert len(text.splitlines()) < 70
    assert "and 260 more groups: `jettison trace --all`" in text
    every = draw_explanation(make_explanation(*groups), every=True)
    assert all(f"\n{g.name}\n" in every for g in groups)


def test_long_names_fit_and_the_users_line_is_never_cut() -> None:
    where = "/home/someone/" + "a" * 70 + "/net.py:123"
    name = "backbone." + "block." * 30 + "conv"
    found = replace(
        make_explanation(make_group(name, members=40)),
        frozen=(FrozenPart(f"{name}.weight (dimension 0)", "a reason of many words " * 8, where),),
        opaque=(Unknown("aten.strange.default", where, "an operator without a rule", 3),),
    )
    text = draw_explanation(found)
    assert text.count(where) == 2
    assert "×3" in text
    assert all(len(line) <= WIDTH or where in line for line in text.splitlines())
    assert re.search(r"and \d+ more$", text, re.MULTILINE)


def test_percent_claims_neither_nothing_nor_all() -> None:
    text = draw_explanation(make_explanation(make_group("a.b", half=0.0001), make_group("c.d", half=0.49999)))
    assert "<0.1%" in text
    found = replace(explained("residual"), worth=Worth(Shares(1.0, 0.9996), Shares(0.5, 0.0), Shares(0.9, 0.1)))
    text = draw_explanation(found)
    assert re.search(r"touched by a group\s+100%\s+>99\.9%", text)
    assert re.search(r"keeps half\s+50\.0%\s+0%", text)


def test_nothing_to_prune() -> None:
    found = explain(trace(nn.Linear(3, 2).eval(), torch.randn(2, 3)))
    assert draw_explanation(found).startswith(
        "no prune groups; no opaque operators; batch free\nNothing can be pruned."
    )
    assert draw_explanation(found, every=True).count("\n\n") == 1
