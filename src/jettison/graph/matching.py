"""Run the user's own forward with tagged integers and match every call that takes sizes to its node in the graph.

The same forward made the graph, so calls and nodes come in the same order: they are matched by operator family, the
user's line and the shape of the output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from jettison.core.errors import JettisonError
from jettison.graph.provenance import (
    Journal,
    Misfit,
    Place,
    Tagged,
    find_place,
    find_sources,
    is_user_file,
    tag_attributes,
)
from jettison.graph.sizes import FUNCTIONS, NODE_FAMILY, Call, list_slices
from jettison.graph.state import plain_attention
from jettison.graph.subgraphs import iterate_nodes
from jettison.graph.trace import Traced, shape_of, shapes_of


@dataclass
class Site:
    """A call that takes sizes, and the nodes it became (None for a part that needs no change)."""

    function: Any
    nodes: list[str | None]


class CallNodes:
    """The nodes of the graph that take sizes, in order, by family; those in `without` left out.

    `sliced` must know the sizes that slicing gave (`rewrite.refresh`).

    A call is met again by the submodule it is made in, or else by the user's line: a submodule with several names may
    go by another in the graph, and a graph that was decomposed may have lost either.
    """

    def __init__(self, module: fx.GraphModule, sliced: fx.GraphModule, without: Collection[str] = ()) -> None:
        self.sliced = {n.name: n for n in iterate_nodes(sliced)}
        self.waiting: dict[tuple[str, Place | str], list[fx.Node]] = {}
        self.taken: set[fx.Node] = set()
        self.modules: set[str] = set()
        for node in iterate_nodes(module):
            name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
            if node.op == "call_function" and name in NODE_FAMILY and node.name not in without:
                for key in (node_module(node), _node_place(node)):
                    self.waiting.setdefault((NODE_FAMILY[name], key), []).append(node)

    def take(self, family: str, module: str, place: Place, fits: Callable[[fx.Node], bool]) -> str | None:
        """Take the next node of that family and submodule, or line, that fits; those before it had no call."""
        for key in (module, place):
            waiting = self.waiting.get((family, key), [])
            for index, node in enumerate(waiting):
                if node not in self.taken and not self._is_foreign(node, module) and fits(node):
                    self.taken.update(waiting[: index + 1])
                    return node.name
        return None

    def _is_foreign(self, node: fx.Node, module: str) -> bool:
        """Tell whether a node was made outside `module`; a view may stand in a submodule of it that reads the view."""
        found = node_module(node)
        return found in self.modules and found != module and bool(module) and not found.startswith(f"{module}.")


_READ_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]


class Path(TorchFunctionMode):
    """The functions of torch that a forward calls, in order, with the numbers it gives them.

    Left out is what only reads a shape, and the whole numbers of calls that take sizes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[int | float]]] = []

    def note(self, function: Any, args: Any, kwargs: Any) -> None:
        """Note a call."""
        if function != _READ_SHAPE:
            kinds = (float,) if function in FUNCTIONS else (int, float)
            leaves = pytree.tree_leaves((args, kwargs))
            # int(): a tagged number would take part in the comparison of paths.
            numbers = [int(v) if isinstance(v, int) else v for v in leaves if isinstance(v, kinds)]
            self.calls.append((function, numbers))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class TaggedRun(TorchFunctionMode):
    """One run of a tagged copy: the first notes which node each call became, the second what its sizes must be.

    Only sizes are asked for, so the copy may be a shadow: on the meta device, where nothing is computed. `stopped` says
    what ended the run, `path` what it called.
    """

    def __init__(self, module: nn.Module, calls: CallNodes, traced: Traced, *, is_shadow: bool) -> None:
        super().__init__()
        self.module, self.calls, self.traced, self.is_shadow = module, calls, traced, is_shadow
        self.stopped: Misfit | None = None
        self.path = Path()
        self.journal = Journal()
        self.sites: dict[str, list[Site]] = {}
        self.opened: set[str] = set()
        self.sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.earlier: dict[str, Iterator[Site]] | None = None

    def run(self, earlier: TaggedRun | None) -> None:
        """Run the forward on the example inputs."""
        if earlier is not None:
            self.earlier = {path: iter(sites) for path, sites in earlier.sites.items()}
            self.journal = Journal(earlier.journal.answers)
        for path, module in self.module.named_modules():
            self.calls.modules.add(path)
            module.register_forward_pre_hook(self._enter(path))
            module.register_forward_hook(self._note_sizes(path), with_kwargs=True)
        inputs = self.traced.example
        place: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.is_shadow:
            inputs, place = tuple(x.to("meta") for x in inputs), torch.device("meta")
        args, kwargs = pytree.tree_unflatten(list(inputs), self.traced.in_spec)
        with tag_attributes(self.module, self.journal), plain_attention(), place:
            run_watched(self, self.module, args, kwargs, self.journal)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self.path.note(func, args, kwargs)
        self._note_reached(args, kwargs)
        if func is F.multi_head_attention_forward:
            self.opened.add(self.journal.module)
            with _opened(), self:
                return func(*args, **kwargs)
        if self.is_shadow and func is F.batch_norm:
            return torch.empty_like(args[0] if args else kwargs["input"])  # torch takes a while to say as much
        entry = FUNCTIONS.get(func)
        if entry is None:
            return func(*args, **kwargs)
        family, fix = entry
        if self.earlier is None:
            out = func(*args, **kwargs)
            self.sites.setdefault(self.journal.module, []).append(Site(func, self._match(family, args, out)))
            return out
        site = next(self.earlier.get(self.journal.module, iter(())), None)
        place = find_place()
        if site is None or site.function is not func:
            raise Misfit(
                f"The pruned network takes another way through its source than the original, at {place}. "
                "A condition there depends on a size. Take the graph result, which has no conditions.",
                self.journal.module,
            )
        nodes = [None if n is None else self.calls.sliced[n] for n in site.nodes]
        call = Call(func, list(args), kwargs, nodes, place, self.journal)
        fix(call)
        return call.function(*call.args, **call.kwargs)

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
        shapes = [tuple(t.shape) for t in out] if isinstance(out, (tuple, list)) else tuple(out.shape)
        return [self.calls.take(family, self.journal.module, place, lambda node: shapes_of(node) == shapes)]

    def _match_slice(self, dim: int, part: slice, x: Tensor, place: Place) -> str | None:
        size = x.shape[dim]
        kept = len(range(*part.indices(size)))
        if kept == size:
            return None

        def fits(node: fx.Node) -> bool:
            whole, cut = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
            return whole is not None and cut is not None and (size, kept) in zip(whole, cut, strict=True)

        return self.calls.take("slice", self.journal.module, place, fits)

    def _note_sizes(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.journal.stack.pop()
            self.sizes.setdefault(path, (_first_shape((args, kwargs)), _first_shape(output)))

        return note

    def _enter(self, path: str) -> Callable[..., None]:
        return lambda module, args: self.journal.stack.append(path)


def run_watched(
    mode: contextlib.AbstractContextManager[Any], module: nn.Module, args: Any, kwargs: Any, journal: Journal
) -> Any:
    """Run `module` in eval mode under `mode`; an error in the user's code becomes a Misfit with its line."""
    try:
        with torch.no_grad(), mode:
            return module.eval()(*args, **kwargs)
    except JettisonError:
        raise
    except Exception as error:
        raise Misfit(
            f"The sliced network cannot run in its own source: {(str(error).strip() or repr(error)).splitlines()[0]}. "
            f"It stopped at {_error_place(error)}. "
            "Write sizes from x.shape or attributes there, or take the graph result.",
            journal.module or _error_module(error, module),
        ) from error


@contextlib.contextmanager
def _opened() -> Iterator[None]:
    """Let a function of torch that is written in Python run its body, so that the calls in it are seen."""
    before = vars(F)["has_torch_function"]
    vars(F)["has_torch_function"] = lambda tensors: False
    try:
        yield
    finally:
        vars(F)["has_torch_function"] = before


def _error_place(error: BaseException) -> Place:
    place, trail = Place(), error.__traceback__
    while trail is not None:
        if is_user_file(trail.tb_frame.f_code.co_filename):
            place = Place(trail.tb_frame.f_code.co_filename, trail.tb_lineno)
        trail = trail.tb_next
    return place


def _error_module(error: BaseException, module: nn.Module) -> str:
    """Return the innermost submodule in whose methods an error was raised."""
    paths = {id(inner): path for path, inner in module.named_modules()}
    found, trail = "", error.__traceback__
    while trail is not None:
        found = paths.get(id(trail.tb_frame.f_locals.get("self")), found)
        trail = trail.tb_next
    return found


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


def node_module(node: fx.Node) -> str:
    """Return the innermost submodule that made a node; a later call of it is marked by a number."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return paths[-1].split("@")[0] if paths else ""
