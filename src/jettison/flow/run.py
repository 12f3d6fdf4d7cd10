"""What every stage of one run shares: the traced original, the data, the settings and the folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from jettison.core.budget import Budget
from jettison.core.errors import NonFiniteError, ShapeError
from jettison.core.plan import Plan
from jettison.core.recipe import Recipe
from jettison.flow.calibration import Calibration, list_digests
from jettison.flow.evaluation import Predict
from jettison.flow.folder import RunFolder
from jettison.graph.groups import Graph
from jettison.graph.rewrite import refresh, slice_graph
from jettison.graph.trace import Batch, Traced


@dataclass(frozen=True)
class Run:
    """One compression under way."""

    graph: Graph
    calibration: Calibration
    budget: Budget
    recipe: Recipe
    target: ModuleType
    threads: int
    seed: int
    folder: RunFolder

    @cached_property
    def batches(self) -> list[Batch]:
        """Calibration batches that statistics, ranges and fits are made from."""
        return self._taken[0]

    @cached_property
    def judges(self) -> list[Batch]:
        """Calibration batches that only judge; the fitting ones where there are no more."""
        return self._taken[1] or self._taken[0]

    def iterate_training(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches that may be learnt from: all but the judges, who decide whether learning has helped."""
        return self.calibration.iterate_without(self._judged, epoch)

    @cached_property
    def _judged(self) -> frozenset[int]:
        return list_digests(self._taken[1])

    @cached_property
    def targets(self) -> list[tuple[Tensor, ...]]:
        """The original's outputs on the judges."""
        with torch.no_grad():
            return [self.graph.module(*batch) for batch in self.judges]

    @cached_property
    def _taken(self) -> tuple[list[Batch], list[Batch]]:
        recipe = self.recipe
        taken = self.calibration.take(recipe.samples + recipe.judges)
        self._check_outputs(taken)
        total = sum(len(b[0]) for b in taken)
        # With little data the judges still get their share.
        fitting = min(recipe.samples, max(1, total * recipe.samples // (recipe.samples + recipe.judges)))
        if self.calibration.fixed is not None:
            fitting = max(1, round(fitting / self.calibration.fixed)) * self.calibration.fixed
        return split_samples(taken, fitting)

    def _check_outputs(self, batches: Sequence[Batch]) -> None:
        with torch.no_grad():
            for index, batch in enumerate(batches):
                for output in self.graph.module(*batch):
                    if output.is_floating_point() and not bool(torch.isfinite(output).all()):
                        raise NonFiniteError(
                            f"The network's own output holds NaN or infinity on calibration batch {index}, which is "
                            "sound itself. Repair the network, or leave such inputs out."
                        )

    def file(self, name: str) -> Path:
        """Return the path of a form of the network in the run's folder, as the target stores it."""
        return self.folder.path / f"{name}{self.target.SUFFIX}"

    @property
    def target_name(self) -> str:
        """The target's name in TARGETS."""
        return self.target.__name__.rpartition(".")[2]

    @property
    def bits(self) -> int:
        """8 where the result computes in integers, else 32."""
        return 8 if self.recipe.quantize else 32

    @property
    def sample(self) -> Batch:
        """One sample, as latency is measured; the whole traced batch where the network fixes it."""
        traced = self.graph.traced
        batch = self.judges[0]
        return tuple(x[:1] for x in batch) if traced.dynamic_batch else traced.example

    def slice(self, plan: Plan) -> fx.GraphModule:
        """Return the original without the positions the plan drops; weights are shared until replaced."""
        keeps = self.graph.keeps(plan.kept)
        module = slice_graph(self.graph, keeps)
        refresh(module, self.graph, keeps)  # quantizing and exporting read sizes off the nodes
        return module


def split_samples(batches: Sequence[Batch], first: int) -> tuple[list[Batch], list[Batch]]:
    """Split batches after the `first` samples."""
    left: list[Batch] = []
    right: list[Batch] = []
    for batch in batches:
        take = max(0, min(first, len(batch[0])))
        if take:
            left.append(tuple(x[:take] for x in batch))
        if take < len(batch[0]):
            right.append(tuple(x[take:] for x in batch))
        first -= take
    return left, right


def split_judges(data: Calibration, recipe: Recipe) -> tuple[list[Batch], list[Batch]]:
    """Return batches to fit to and batches that only judge; the same ones where there are no more."""
    taken = data.take(recipe.samples + recipe.judges)
    total = sum(len(b[0]) for b in taken)
    first = max(1, total * recipe.samples // (recipe.samples + recipe.judges))
    if data.fixed is not None:
        first = max(1, round(first / data.fixed)) * data.fixed
    fitting, judges = split_samples(taken, first)
    return fitting, judges or fitting


def export_file(run: Run, module: fx.GraphModule, path: Path) -> None:
    """Write a flat graph, float or converted, as the target's file."""
    traced = run.graph.traced
    outputs = [f"output{i}" if i else "output" for i in range(traced.out_spec.num_leaves)]
    run.target.export(
        module,
        traced.example,
        path,
        input_names=list(traced.input_names),
        output_names=outputs,
        dynamic_batch=traced.dynamic_batch,
    )


def make_predict(run: Run, path: Path) -> Predict:
    """Return a callable that runs a deployed file and takes and returns what the caller's network does."""
    session = run.target.load(path, threads=run.threads)
    return nest_predict(run.graph.traced, lambda inputs: run.target.predict(session, inputs))


def nest_predict(traced: Traced, compute: Any) -> Predict:
    """Wrap a function of flat tensors so that it takes and returns the network's own nesting."""

    def predict(*args: Any, **kwargs: Any) -> Any:
        leaves = _flatten_call(traced, args, kwargs)
        return pytree.tree_unflatten(list(compute(leaves)), traced.out_spec)

    return predict


def _flatten_call(traced: Traced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """Return a call's tensors in the graph's order; keywords may come in any order."""
    if kwargs:
        order = [k for k in traced.input_names if k in kwargs]
        kwargs = {k: kwargs[k] for k in order + [k for k in kwargs if k not in order]}
    leaves = tuple(v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor))
    if len(leaves) != len(traced.input_names):
        raise ShapeError(
            f"The network was called with {len(leaves)} tensors, but takes {len(traced.input_names)}: "
            f"{', '.join(traced.input_names)}. Call it as it was called on the calibration inputs."
        )
    return leaves
