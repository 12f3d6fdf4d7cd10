"""The axis algebra: terms that say what the positions of a dimension are, and when two dimensions share them.

A **term** is an `Atom` (positions of their own), a `Cat` (sizes add up) or a `Prod` (sizes multiply, the last
factor running fastest). `unify` states that two terms of equal size are the same positions and refines their
structure until they are, or freezes both: wrong is impossible, less is honest. `evaluate_mask` turns a choice of
kept positions per atom into a boolean mask for any term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reason:
    """Why an atom is frozen: in words, with the operator and the user's file and line."""

    text: str
    operator: str = ""
    where: str = ""


@dataclass(eq=False)
class Atom:
    """An axis of its own; `link` points to the term it was unified with, `frozen` forbids pruning it."""

    size: int
    link: Term | None = None
    frozen: Reason | None = None
    flags: set[str] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Cat:
    """Positions of the parts one after the other."""

    parts: tuple[Term, ...]

    @property
    def size(self) -> int:
        """The number of positions."""
        return sum(p.size for p in self.parts)


@dataclass(frozen=True, eq=False)
class Prod:
    """Positions of all combinations, the last factor running fastest; without factors, the one position."""

    factors: tuple[Term, ...]

    @property
    def size(self) -> int:
        """The number of positions."""
        return math.prod(f.size for f in self.factors)


Term = Atom | Cat | Prod
ONE = Prod(())
"""The term of a dimension of size one."""


def make_axis(size: int, frozen: Reason | None = None) -> Term:
    """Return a fresh atom of `size` positions, or `ONE` where there is nothing to choose."""
    return ONE if size == 1 else Atom(size, frozen=frozen)


def resolve(term: Term) -> Term:
    """Follow links, flatten `Cat` in `Cat` and `Prod` in `Prod`, and drop factors of size one."""
    if isinstance(term, Atom):
        if term.link is None:
            return term
        term.link = resolve(term.link)
        return term.link
    if isinstance(term, Cat):
        parts: list[Term] = []
        for part in map(resolve, term.parts):
            parts += part.parts if isinstance(part, Cat) else ([part] if part.size else [])
        return parts[0] if len(parts) == 1 else Cat(tuple(parts))
    factors: list[Term] = []
    for factor in map(resolve, term.factors):
        factors += factor.factors if isinstance(factor, Prod) else [factor]
    factors = [f for f in factors if f.size != 1]
    return factors[0] if len(factors) == 1 else Prod(tuple(factors))


def iterate_atoms(term: Term) -> Iterator[Atom]:
    """Yield the root atoms of a term from left to right, with repeats."""
    term = resolve(term)
    if isinstance(term, Atom):
        yield term
    else:
        for inner in term.parts if isinstance(term, Cat) else term.factors:
            yield from iterate_atoms(inner)


def freeze(term: Term, reason: Reason) -> None:
    """Forbid pruning any atom of `term`; the first reason stays."""
    for atom in iterate_atoms(term):
        atom.frozen = atom.frozen or reason


def flag(term: Term, name: str) -> None:
    """Mark every atom of `term`, for instance as "normalised"."""
    for atom in iterate_atoms(term):
        atom.flags.add(name)


def unify(a: Term, b: Term, reason: Reason) -> None:
    """State that `a` and `b` are the same positions; where no common refinement exists, freeze both with `reason`."""
    a, b = resolve(a), resolve(b)
    if a is b or a.size == b.size == 1:
        return
    if a.size != b.size:
        freeze(a, reason)
        freeze(b, reason)
    elif isinstance(a, Atom):
        _bind(a, b, reason)
    elif isinstance(b, Atom):
        _bind(b, a, reason)
    elif isinstance(a, Prod) and isinstance(b, Prod):
        _align(a.factors, b.factors, split_product, reason)
    elif isinstance(a, Cat) and isinstance(b, Cat):
        _align(a.parts, b.parts, split_sum, reason)
    else:
        prod, cat = (a, b) if isinstance(a, Prod) and isinstance(b, Cat) else (b, a)
        assert isinstance(prod, Prod) and isinstance(cat, Cat)
        _unify_prod_with_cat(prod, cat, reason)


def _bind(atom: Atom, term: Term, reason: Reason) -> None:
    if any(inner is atom for inner in iterate_atoms(term)):
        freeze(term, reason)  # an axis cannot be a proper part of itself
        return
    if atom.frozen:
        freeze(term, atom.frozen)
    for inner in iterate_atoms(term):
        inner.flags |= atom.flags
    atom.link = term


Splitter = Callable[[Term, int], tuple[Term, Term] | None]


def split_product(term: Term, size: int) -> tuple[Term, Term] | None:
    """Refine `term` into `size` leading positions times a rest; None if that cannot be done."""
    term = resolve(term)
    if size == 0 or term.size % size:
        return None
    if isinstance(term, Atom):
        first, rest = Atom(size, frozen=term.frozen), Atom(term.size // size, frozen=term.frozen)
        first.flags |= term.flags
        rest.flags |= term.flags
        term.link = Prod((first, rest))
        return first, rest
    if isinstance(term, Prod):
        return _take(term.factors, size, split_product, Prod)
    return _fold(term, size)


MATCHING = Reason("parts that are read as one dimension have to match")


def _fold(cat: Cat, size: int) -> tuple[Term, Term] | None:
    """Read `size` equally long runs of a `Cat` as a product: each run then loses the same positions."""
    length = cat.size // size
    runs: list[Term] = []
    rest: Term = cat
    while rest.size > length:
        halves = split_sum(rest, length)
        if halves is None:
            return None
        runs.append(halves[0])
        rest = resolve(halves[1])
    for run in runs:
        unify(run, rest, MATCHING)
    return Atom(size, frozen=MATCHING), resolve(rest)


def split_sum(term: Term, size: int) -> tuple[Term, Term] | None:
    """Refine `term` into `size` leading positions followed by a rest; None if that cannot be done."""
    term = resolve(term)
    if not 0 < size < term.size:
        return None
    if isinstance(term, Atom):
        first, rest = Atom(size, frozen=term.frozen), Atom(term.size - size, frozen=term.frozen)
        first.flags |= term.flags
        rest.flags |= term.flags
        term.link = Cat((first, rest))
        return first, rest
    if isinstance(term, Cat):
        return _take(term.parts, size, split_sum, Cat)
    inner = term.size // resolve(term.factors[0]).size
    if size % inner:
        return None
    halves = split_sum(term.factors[0], size // inner)
    if halves is None:
        return None
    rest_factors = term.factors[1:]
    return Prod((halves[0], *rest_factors)), Prod((halves[1], *rest_factors))


def _take(
    items: Sequence[Term], size: int, split: Splitter, kind: Callable[[tuple[Term, ...]], Term]
) -> tuple[Term, Term] | None:
    """Take leading items worth `size`, splitting the one that lies across the boundary."""
    taken: list[Term] = []
    rest = list(items)
    have = kind(()).size
    while have != size:
        if not rest:
            return None
        item = rest.pop(0)
        missing = size // have if kind is Prod else size - have
        if kind is Prod and size % have:
            return None
        if item.size > missing:
            halves = split(item, missing)
            if halves is None:
                return None
            item, remainder = halves
            rest.insert(0, remainder)
        taken.append(item)
        have = kind(tuple(taken)).size
    return kind(tuple(taken)), kind(tuple(rest))


def _align(a: Sequence[Term], b: Sequence[Term], split: Splitter, reason: Reason) -> None:
    """Walk two lists from the left, unifying equal sizes and splitting the larger where they differ."""
    left, right = [resolve(t) for t in a], [resolve(t) for t in b]
    while left and right:
        x, y = resolve(left.pop(0)), resolve(right.pop(0))
        if x.size != y.size:
            larger, smaller, rest = (x, y, left) if x.size > y.size else (y, x, right)
            halves = split(larger, smaller.size)
            if halves is None:
                for term in (x, y, *left, *right):
                    freeze(term, reason)
                return
            x, y = halves[0], smaller
            rest.insert(0, halves[1])
        unify(x, y, reason)
    for term in (*left, *right):
        if term.size != 1:
            freeze(term, reason)


def _unify_prod_with_cat(prod: Prod, cat: Cat, reason: Reason) -> None:
    rest: Term = prod
    for part in cat.parts[:-1]:
        halves = split_sum(rest, part.size)
        if halves is None:
            freeze(prod, reason)
            freeze(cat, reason)
            return
        unify(halves[0], part, reason)
        rest = halves[1]
    unify(rest, cat.parts[-1], reason)


def regroup(terms: Sequence[Term], sizes: Sequence[int]) -> list[Term] | None:
    """Read the positions of `terms` (row-major) as dimensions of `sizes`; None if a boundary cannot be placed."""
    rest: Term = resolve(Prod(tuple(terms)))
    out: list[Term] = []
    for index, size in enumerate(sizes):
        if size == 1:
            out.append(ONE)
        elif math.prod(sizes[index:]) == size:
            out.append(rest)
            rest = ONE
        else:
            factors = rest.factors if isinstance(rest, Prod) else (rest,)
            halves = _take(factors, size, split_product, Prod)
            if halves is None:
                return None
            out.append(resolve(halves[0]))
            rest = resolve(halves[1])
    return out


Keeps = Mapping[Atom, Tensor]
"""A boolean vector per root atom; atoms that are absent keep everything."""


def evaluate_mask(term: Term, keeps: Keeps) -> Tensor:
    """Return the boolean keep-mask over the positions of `term`."""
    term = resolve(term)
    if isinstance(term, Atom):
        kept = keeps.get(term)
        return torch.ones(term.size, dtype=torch.bool) if kept is None else kept
    if isinstance(term, Cat):
        return torch.cat([evaluate_mask(p, keeps) for p in term.parts])
    mask = torch.ones(1, dtype=torch.bool)
    for factor in term.factors:
        mask = (mask[:, None] & evaluate_mask(factor, keeps)[None, :]).flatten()
    return mask


def count_kept(term: Term, keeps: Keeps) -> int:
    """Return how many positions of `term` stay, without building the mask."""
    term = resolve(term)
    if isinstance(term, Atom):
        kept = keeps.get(term)
        return term.size if kept is None else int(kept.sum())
    if isinstance(term, Cat):
        return sum(count_kept(p, keeps) for p in term.parts)
    return math.prod(count_kept(f, keeps) for f in term.factors)


def is_touched(term: Term, keeps: Keeps) -> bool:
    """Tell whether any atom of `term` loses positions."""
    return any(atom in keeps and not bool(keeps[atom].all()) for atom in iterate_atoms(term))
