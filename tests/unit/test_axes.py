"""The axis algebra by itself: refinement, unification, masks."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.graph.axes import (
    ONE,
    Atom,
    Cat,
    Prod,
    Reason,
    Term,
    count_kept,
    evaluate_mask,
    flag,
    freeze,
    is_touched,
    iterate_atoms,
    make_axis,
    regroup,
    resolve,
    split_product,
    split_sum,
    unify,
)
from jettison.testing.oracles import permute_positions

WHY = Reason("a test")


def _mask(*kept: int) -> Tensor:
    return torch.tensor(kept, dtype=torch.bool)


def _frozen(term: Term) -> bool:
    return any(atom.frozen for atom in iterate_atoms(term))


def test_sizes_add_and_multiply() -> None:
    a, b = Atom(3), Atom(4)
    assert Cat((a, b)).size == 7
    assert Prod((a, b)).size == 12
    assert ONE.size == 1
    assert make_axis(1) is ONE


def test_resolving_flattens_and_drops_what_is_one() -> None:
    a, b, c = Atom(2), Atom(3), Atom(4)
    flat = resolve(Prod((a, Prod((ONE, b)), c)))
    assert isinstance(flat, Prod) and flat.factors == (a, b, c)
    joined = resolve(Cat((Cat((a, b)), c)))
    assert isinstance(joined, Cat) and joined.parts == (a, b, c)
    assert resolve(Prod((ONE, a))) is a


def test_atoms_unify_and_carry_reason_and_flags() -> None:
    a, b, c = Atom(4), Atom(4), Atom(4)
    flag(a, "normalised")
    unify(a, b, WHY)
    unify(b, c, WHY)
    assert resolve(a) is resolve(b) is resolve(c)
    root = resolve(a)
    assert isinstance(root, Atom) and root.flags == {"normalised"}
    freeze(c, WHY)
    assert _frozen(a)


def test_a_frozen_atom_freezes_what_it_becomes() -> None:
    a, parts = Atom(5, frozen=WHY), Cat((Atom(2), Atom(3)))
    unify(a, parts, WHY)
    assert all(atom.frozen is WHY for atom in iterate_atoms(parts))


def test_products_refine_to_common_factors() -> None:
    a, b = Atom(12), Atom(5)
    x, y = Atom(3), Atom(20)
    unify(Prod((a, b)), Prod((x, y)), WHY)
    factors = resolve(a)
    assert isinstance(factors, Prod) and [f.size for f in factors.factors] == [3, 4]
    assert resolve(x) is factors.factors[0]
    whole = resolve(y)
    assert isinstance(whole, Prod) and whole.factors == (factors.factors[1], resolve(b))
    assert not _frozen(a)


def test_products_without_common_factors_freeze() -> None:
    left, right = Prod((Atom(4), Atom(9))), Prod((Atom(6), Atom(6)))
    unify(left, right, WHY)
    assert all(atom.frozen for term in (left, right) for atom in iterate_atoms(term))


def test_sums_refine_at_both_boundaries() -> None:
    a, b = Atom(5), Atom(4)
    x, y = Atom(3), Atom(6)
    unify(Cat((a, b)), Cat((x, y)), WHY)
    parts = resolve(a)
    assert isinstance(parts, Cat) and [p.size for p in parts.parts] == [3, 2]
    tail = resolve(y)
    assert isinstance(tail, Cat) and tail.parts == (parts.parts[1], resolve(b))


def test_a_product_meets_a_sum_at_the_boundaries_of_its_leading_factor() -> None:
    heads, size = Atom(5), Atom(4)
    a, b = Atom(8), Atom(12)
    unify(Prod((heads, size)), Cat((a, b)), WHY)
    assert not _frozen(heads)
    first, second = resolve(a), resolve(b)
    assert isinstance(first, Prod) and isinstance(second, Prod)
    assert [f.size for f in first.factors] == [2, 4]
    assert first.factors[1] is second.factors[1] is resolve(size)


def test_a_boundary_inside_the_inner_factor_freezes() -> None:
    heads, a = Atom(5), Atom(7)
    unify(Prod((heads, Atom(4))), Cat((a, Atom(13))), WHY)
    assert _frozen(heads) and _frozen(a)


def test_an_axis_cannot_be_part_of_itself() -> None:
    a = Atom(6)
    halves = split_sum(a, 3)
    assert halves is not None
    b = Atom(3)
    unify(a, Cat((b, b)), WHY)  # both halves are the same positions: no cycle
    assert not _frozen(a)
    unify(resolve(b), b, WHY)
    c = Atom(4)
    unify(c, Prod((ONE, c)), WHY)
    assert not _frozen(c)


def test_unequal_sizes_freeze() -> None:
    a, b = Atom(3), Atom(4)
    unify(a, b, WHY)
    assert _frozen(a) and _frozen(b)


def test_splitting_what_cannot_be_split() -> None:
    assert split_product(Atom(6), 4) is None
    assert split_sum(Atom(6), 6) is None
    assert split_sum(Prod((Atom(3), Atom(4))), 6) is None


def test_a_sum_read_as_a_product_couples_its_parts() -> None:
    left, right = Atom(4), Atom(4)
    halves = split_product(Cat((left, right)), 2)  # channel shuffle: view(n, 2, 4, ...)
    assert halves is not None
    assert resolve(left) is resolve(right) is resolve(halves[1])
    assert _frozen(halves[0]) and not _frozen(left)


def test_regrouping_follows_row_major_order() -> None:
    a, b = Atom(6), Atom(4)
    dims = regroup([a, b], [2, 3, 4])
    assert dims is not None and [d.size for d in dims] == [2, 3, 4]
    assert dims[2] is b
    back = regroup(dims, [1, 6, 4])
    assert back is not None and back[0] is ONE and resolve(back[1]) is not ONE
    keeps = {atom: torch.ones(atom.size, dtype=torch.bool) for atom in iterate_atoms(a)}
    assert len(keeps) == 2
    assert regroup([Cat((Atom(3), Atom(4))), Atom(2)], [2, 7]) is None


def test_masks_concatenate_and_multiply() -> None:
    a, b = Atom(2), Atom(3)
    keeps = {a: _mask(1, 0), b: _mask(0, 1, 1)}
    assert evaluate_mask(Cat((a, b)), keeps).tolist() == [True, False, False, True, True]
    assert evaluate_mask(Prod((a, b)), keeps).tolist() == [False, True, True, False, False, False]
    assert evaluate_mask(ONE, keeps).tolist() == [True]
    assert evaluate_mask(Atom(2), keeps).tolist() == [True, True]


def test_counts_are_sums_of_masks() -> None:
    a, b, c = Atom(2), Atom(3), Atom(4)
    keeps = {a: _mask(1, 0), b: _mask(0, 1, 1)}
    for term in (a, Cat((a, b, c)), Prod((a, b)), Prod((Cat((a, b)), c)), ONE):
        assert count_kept(term, keeps) == int(evaluate_mask(term, keeps).sum())
    assert is_touched(Prod((a, c)), keeps) and not is_touched(c, keeps)


def test_permuting_positions_follows_the_term() -> None:
    a, b = Atom(3), Atom(2)
    order = torch.tensor([2, 0, 1])
    assert permute_positions(Prod((a, b)), a, order).tolist() == [4, 5, 0, 1, 2, 3]
    assert permute_positions(Prod((b, a)), a, order).tolist() == [2, 0, 1, 5, 3, 4]
    assert permute_positions(Cat((b, a)), a, order).tolist() == [0, 1, 4, 2, 3]
    assert permute_positions(Cat((b, b)), a, order).tolist() == [0, 1, 2, 3]
