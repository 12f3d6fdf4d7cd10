"""Run the user's own forward with tagged integers and match every call that takes sizes to its node in the graph.

The same forward made the graph, so calls and nodes come in the same order: they are matched by operator family, the
user's line and the shape of the output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from jettison.core.errors import FixedSize, JettisonError
from jettison.graph.provenance import (
    Journal,
    Place,
    Tagged,
    find_place,
    find_sources,
    is_user_file,
    tag_attributes,
)
from jettison.graph.sizes import FUNCTIONS, NODE_FAMILY, Call, list_slices
from jettison.graph.trace import Traced, hint, shape_of


@dataclass
class Site:
    """A call that takes sizes, and the nodes it became (None for a part that needs no change)."""

    function: Any
    nodes: list[str | None]


class CallNodes:
    """The nodes of the graph that take sizes, in order, by family and the user's line."""

    def __init__(self, module: fx.GraphModule, sliced: fx.GraphModule, shapes: Mapping[str, Any]) -> None:
        self.sliced = {n.name: n for n in sliced.graph.nodes}
        self.shapes = shapes
        self.waiting: dict[tuple[str, Place], list[fx.Node]] = {}
        for node in module.graph.nodes:
            name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
            if node.op == "call_function" and name in NODE_FAMILY:
                self.waiting.setdefault((NODE_FAMILY[name], _node_place(node)), []).append(node)

    def take(self, family: str, place: Place, fits: Callable[[fx.Node], bool]) -> str | None:
        """Take the next node of that family and line that fits; nodes before it had no call of their own."""
        waiting = self.waiting.get((family, place), [])
        for index, node in enumerate(waiting):
            if fits(node):
                del waiting[: index + 1]
                return node.name
        return None


class TaggedRun(TorchFunctionMode):
    """One run of a tagged copy: the first notes which node each call became, the second what its sizes must be."""

    def __init__(self, module: nn.Module, calls: CallNodes, traced: Traced) -> None:
        super().__init__()
        self.module, self.calls, self.traced = module, calls, traced
        self.journal = Journal()
        self.sites: list[Site] = []
        self.sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.earlier: Iterator[Site] | None = None

    def run(self, earlier: TaggedRun | None) -> None:
        """Run the forward on the example inputs."""
        if earlier is not None:
            self.earlier = iter(earlier.sites)
            self.journal = Journal(earlier.journal.answers)
        for path, module in self.module.named_modules():
            module.register_forward_hook(self._note_sizes(path), with_kwargs=True)
        args, kwargs = pytree.tree_unflatten(list(self.traced.example), self.traced.in_spec)
        with tag_attributes(self.module, self.journal):
            run_watched(self, self.module, args, kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self._note_reached(args, kwargs)
        entry = FUNCTIONS.get(func)
        if entry is None:
            return func(*args, **kwargs)
        family, fix = entry
        if self.earlier is None:
            out = func(*args, **kwargs)
            self.sites.append(Site(func, self._match(family, args, out)))
            return out
        site = next(self.earlier, None)
        place = find_place()
        if site is None or site.function is not func:
            raise FixedSize(
                f"The pruned network takes another way through its source than the original, at {place}. "
                "A condition there depends on a size. Take the graph result, which has no conditions."
            )
        nodes = [None if n is None else self.calls.sliced[n] for n in site.nodes]
        call = Call(list(args), kwargs, nodes, self.calls.shapes, place, self.journal)
        fix(call)
        return func(*call.args, **call.kwargs)

    def _note_reached(self, args: Any, kwargs: Any) -> None:
        """Note the attributes that reach this call; the bounds of a slice are arguments too."""
        leaves = pytree.tree_leaves((args, kwargs))
        for leaf in leaves + [b for s in leaves if isinstance(s, slice) for b in (s.start, s.stop)]:
            if isinstance(leaf, Tagged):
                self.journal.reached |= find_sources(leaf.expression)

    def _match(self, family: str, args: Any, out: Any) -> list[str | None]:
        place = find_place()
        if family == "slice":
            return [self._match_slice(dim, part, args[0], place) for dim, part in list_slices(args)]
        if family == "multi_head":
            return [None]
        shapes = [tuple(t.shape) for t in out] if isinstance(out, (tuple, list)) else tuple(out.shape)
        return [self.calls.take(family, place, lambda node: _node_shapes(node) == shapes)]

    def _match_slice(self, dim: int, part: slice, x: Tensor, place: Place) -> str | None:
        size = x.shape[dim]
        kept = len(range(*part.indices(size)))
        if kept == size:
            return None

        def fits(node: fx.Node) -> bool:
            whole, cut = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
            return whole is not None and cut is not None and (size, kept) in zip(whole, cut, strict=True)

        return self.calls.take("slice", place, fits)

    def _note_sizes(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.sizes.setdefault(path, (_first_shape((args, kwargs)), _first_shape(output)))

        return note


def run_watched(mode: contextlib.AbstractContextManager[Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run `module` in eval mode under `mode`; an error in the user's code becomes a FixedSize with its line."""
    try:
        with _plain_attention(), torch.no_grad(), mode:
            return module.eval()(*args, **kwargs)
    except JettisonError:
        raise
    except Exception as error:
        raise FixedSize(
            f"The sliced network cannot run in its own source: {str(error).strip() or repr(error)}. "
            f"It stopped at {_error_place(error)}. "
            "Write sizes from x.shape or attributes there, or take the graph result."
        ) from error


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # as when the graph was traced
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _error_place(error: BaseException) -> Place:
    place, trail = Place(), error.__traceback__
    while trail is not None:
        if is_user_file(trail.tb_frame.f_code.co_filename):
            place = Place(trail.tb_frame.f_code.co_filename, trail.tb_lineno)
        trail = trail.tb_next
    return place


def _node_shapes(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [tuple(map(hint, v.shape)) for v in value]
    return shape_of(node)


def _first_shape(value: Any) -> tuple[int, ...]:
    return next((tuple(t.shape) for t in pytree.tree_leaves(value) if isinstance(t, Tensor)), ())


def _node_place(node: fx.Node) -> Place:
    """Return the innermost line of the user's that made a node, as `find_place` sees it in the run."""
    place = Place()
    for frame in (node.meta.get("stack_trace") or "").splitlines():
        if frame.strip().startswith('File "'):
            file, line = frame.split('"')[1], frame.split("line ")[1].split(",")[0]
            if is_user_file(file):
                place = Place(file, int(line))
    return place
