"""Where the integers of a network come from: its integer attributes, followed through arithmetic.

Every integer attribute of every module is replaced by an `int` that remembers its module and name. Sums,
products and quotients of such integers remember how they were made, so that a size seen in a call can be
traced back to the attributes behind it, and an equation "this must become 3" solved for them.
"""

from __future__ import annotations

import contextlib
import linecache
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from jettison.core.errors import FixedSize


@dataclass(frozen=True)
class Source:
    """An integer attribute of a module, or one entry of a tuple of them."""

    module: str
    name: str
    index: int | None = None

    def __str__(self) -> str:
        text = f"{self.module}.{self.name}" if self.module else self.name
        return text if self.index is None else f"{text}[{self.index}]"


@dataclass(frozen=True)
class Operation:
    """Two expressions joined by an operator."""

    symbol: str
    left: Expression
    right: Expression


Expression = int | Source | Operation

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


@dataclass(frozen=True)
class Place:
    """A line of the user's source."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        if not self.file:
            return "a line inside torch"
        code = linecache.getline(self.file, self.line).strip()
        return f"{self.file}:{self.line}" + (f" (`{code}`)" if code else "")


@dataclass(frozen=True)
class Demand:
    """What an expression must be equal to in the pruned network, and the line and submodule that ask for it."""

    expression: Expression
    target: int
    place: Place
    module: str = ""


class Misfit(FixedSize):
    """A FixedSize that knows the innermost submodule whose source stands in the way."""

    def __init__(self, text: str, module: str) -> None:
        """Take the message and the submodule's path."""
        super().__init__(text)
        self.module = module


@dataclass
class Journal:
    """What one run of a tagged network left behind.

    The answers to `==` are kept per line. Given an earlier run's, an equality that held must hold again: where it does
    not, it is noted as a demand and answered as before, so that `assert channels == self.channels` passes.
    `stack` holds the submodules that are running, `misfits` the first thing each could not express.
    """

    earlier: Mapping[Place, Sequence[bool]] | None = None
    answers: dict[Place, list[bool]] = field(default_factory=dict)
    demands: list[Demand] = field(default_factory=list)
    reached: set[Source] = field(default_factory=set)
    stack: list[str] = field(default_factory=list)
    misfits: dict[str, Misfit] = field(default_factory=dict)
    closed: bool = False

    @property
    def module(self) -> str:
        """The innermost submodule that is running."""
        return self.stack[-1] if self.stack else ""

    def blame(self, text: str) -> None:
        """Note that the running submodule's source cannot express the pruned network; the run goes on."""
        self.misfits.setdefault(self.module, Misfit(text, self.module))

    def compare(self, tag: Tagged, other: int) -> bool:
        """Answer `tag == other`."""
        answer = int.__eq__(tag, other)
        if self.closed:
            return answer
        place = find_place()
        given = self.answers.setdefault(place, [])
        before = self.earlier.get(place, ()) if self.earlier is not None else ()
        if len(given) < len(before) and before[len(given)] and not answer:
            difference = Operation("-", tag.expression, express(other))
            self.demands.append(Demand(difference, 0, place, self.module))
            answer = True
        given.append(answer)
        return answer


class Tagged(int):
    """An int that remembers the expression it was computed by."""

    expression: Expression
    journal: Journal

    def __eq__(self, other: object) -> bool:
        return self.journal.compare(self, other) if isinstance(other, int) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self.journal.compare(self, other) if isinstance(other, int) else NotImplemented

    __hash__ = int.__hash__

    def __neg__(self) -> int:
        return 0 - self

    def __deepcopy__(self, memo: Any) -> Tagged:
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)


def make_tag(value: int, expression: Expression, journal: Journal) -> Tagged:
    """Return `value` as a `Tagged`."""
    tag = Tagged(value)
    tag.expression, tag.journal = expression, journal
    return tag


def express(value: int) -> Expression:
    """Return what is known of how an int was made."""
    return value.expression if isinstance(value, Tagged) else int(value)


def _add_arithmetic(symbol: str, name: str) -> None:
    plain: Any = getattr(int, f"__{name}__")
    plain_reflected: Any = getattr(int, f"__r{name}__")

    def forward(self: Tagged, other: Any) -> Any:
        value = plain(self, other)
        if not isinstance(other, int) or value is NotImplemented:
            return value
        return make_tag(value, Operation(symbol, self.expression, express(other)), self.journal)

    def reflected(self: Tagged, other: Any) -> Any:
        value = plain_reflected(self, other)
        if not isinstance(other, int) or value is NotImplemented:
            return value
        return make_tag(value, Operation(symbol, express(other), self.expression), self.journal)

    setattr(Tagged, f"__{name}__", forward)
    setattr(Tagged, f"__r{name}__", reflected)


for _symbol, _name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv"), ("%", "mod")):
    _add_arithmetic(_symbol, _name)


def read_attributes(model: nn.Module) -> dict[Source, int]:
    """List the integer attributes of every module, its class's included and bools left out, with their values."""
    found: dict[Source, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in {**_class_attributes(type(module)), **vars(module)}.items():
            if type(value) is int:
                found[Source(path, name)] = value
            elif _is_int_sequence(value):
                found.update({Source(path, name, i): v for i, v in enumerate(value)})
    return found


def _class_attributes(kind: type) -> dict[str, Any]:
    """List the public attributes that a module's classes below nn.Module give to all their instances."""
    lines = kind.__mro__[: kind.__mro__.index(nn.Module)]
    found = {name: value for line in reversed(lines) for name, value in vars(line).items()}
    return {name: value for name, value in found.items() if not name.startswith("_")}


def write_attributes(model: nn.Module, values: Mapping[Source, int]) -> None:
    """Set integer attributes of the instances, past any `__setattr__`; tuples stay tuples, lists lists."""
    for source, value in values.items():
        module = model.get_submodule(source.module)
        if source.index is None:
            vars(module)[source.name] = value
        else:
            before = getattr(module, source.name)
            items = list(before)
            items[source.index] = value
            vars(module)[source.name] = items if isinstance(before, list) else tuple(items)


@contextlib.contextmanager
def tag_attributes(model: nn.Module, journal: Journal) -> Iterator[None]:
    """Within the block every integer attribute of `model` carries its provenance; afterwards all is as before."""
    before = [(vars(m), dict(vars(m))) for m in model.modules()]
    values = read_attributes(model)
    try:
        write_attributes(model, {s: make_tag(v, s, journal) for s, v in values.items()})
        yield
    finally:
        journal.closed = True
        for attributes, old in before:
            for name in {s.name for s in values}:
                if name in old:
                    attributes[name] = old[name]
                else:
                    attributes.pop(name, None)


def _is_int_sequence(value: Any) -> bool:
    return type(value) in (tuple, list, torch.Size) and len(value) > 0 and all(type(v) is int for v in value)


# With the separator: torchvision lies beside torch, and its lines are the user's.
_LIBRARY = str(Path(torch.__file__).parent) + os.sep
_OWN = str(Path(__file__).parent) + os.sep


def is_user_file(file: str) -> bool:
    """Tell whether a source file is neither torch's nor of this room."""
    return not file.startswith((_LIBRARY, _OWN, "<"))


def find_place() -> Place:
    """Return the innermost line on the stack that is the user's: neither torch's nor of this room."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OWN) and frame.f_code.co_name == "run_watched":
            return Place()
        if is_user_file(file):
            return Place(file, frame.f_lineno)
        frame = frame.f_back
    return Place()


def evaluate_expression(expression: Expression, values: Mapping[Source, int]) -> int | None:
    """Compute an expression; None for a division by zero."""
    if isinstance(expression, Source):
        return values[expression]
    if isinstance(expression, int):
        return expression
    left, right = (evaluate_expression(e, values) for e in (expression.left, expression.right))
    if left is None or right is None or (right == 0 and expression.symbol in ("//", "%")):
        return None
    return _OPERATORS[expression.symbol](left, right)


def find_sources(expression: Expression) -> set[Source]:
    """List the attributes an expression is made of."""
    if isinstance(expression, Source):
        return {expression}
    if isinstance(expression, int):
        return set()
    return find_sources(expression.left) | find_sources(expression.right)


def solve_demands(demands: Sequence[Demand], old: Mapping[Source, int]) -> dict[Source, int]:
    """Return the value of each attribute in `demands` under which all of them hold.

    Pruning only makes sizes smaller, so an attribute is sought between 1 and its old value; where several values
    will do, the old one is kept, or else the smallest is taken. Raises FixedSize where no value does.
    """
    values: dict[Source, int] = {}
    waiting = [d for d in dict.fromkeys(demands) if find_sources(d.expression)]
    while waiting:
        allowed: dict[Source, set[int]] = {}
        for demand in waiting:
            unknown = find_sources(demand.expression) - values.keys()
            if len(unknown) == 1:
                (source,) = unknown
                found = _solve_one(demand, source, {**values}, old[source])
                both = found & allowed.get(source, found)
                if not both:
                    raise _no_value(demand, source, old[source])
                allowed[source] = both
        certain = {s: next(iter(v)) for s, v in allowed.items() if len(v) == 1}
        if certain:
            values |= certain
        elif allowed:
            source, found = next(iter(allowed.items()))
            values[source] = old[source] if old[source] in found else min(found)
        elif waiting:
            values |= _change_one(waiting[0], values, old)
        waiting = [d for d in waiting if find_sources(d.expression) - values.keys()]
    for demand in demands:
        _check(demand, values)
    return values


def _solve_one(demand: Demand, source: Source, values: dict[Source, int], old: int) -> set[int]:
    if demand.expression == source:
        return {demand.target}
    return {
        value
        for value in (range(1, old + 1) if old > 0 else (old,))
        if evaluate_expression(demand.expression, {**values, source: value}) == demand.target
    }


def _change_one(demand: Demand, values: Mapping[Source, int], old: Mapping[Source, int]) -> dict[Source, int]:
    """Keep all unknowns of a demand but one at their old value: the first whose change satisfies it."""
    unknown = sorted(find_sources(demand.expression) - values.keys(), key=str)
    base = {**values, **{s: old[s] for s in unknown}}
    if evaluate_expression(demand.expression, base) == demand.target:
        return {s: old[s] for s in unknown}
    for source in unknown:
        found = _solve_one(demand, source, base, old[source])
        if found:
            return {**{s: old[s] for s in unknown}, source: min(found)}
    raise _no_value(demand, unknown[0], old[unknown[0]])


def _check(demand: Demand, values: Mapping[Source, int]) -> None:
    if evaluate_expression(demand.expression, values) != demand.target:
        source = min(find_sources(demand.expression), key=str)
        raise _no_value(demand, source, values[source])


def _no_value(demand: Demand, source: Source, value: int) -> Misfit:
    return Misfit(
        f"No single value of the attribute {str(source)!r} (now {value}) gives every size the pruned network needs. "
        f"The line that cannot be met is {demand.place}, where the size must become {demand.target}. "
        "Use one attribute per size there, or read it from x.shape; or take the graph result, which needs neither.",
        demand.module,
    )
