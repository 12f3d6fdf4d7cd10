"""Scores of a deployed network: the caller's `evaluate`, or agreement with the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from jettison.core.errors import EvaluateError, InputError, JettisonError
from jettison.core.record import Drop, Score
from jettison.flow.statistics import CONFIDENCE, bound_drop

Predict = Callable[..., Any]
"""Takes a batch of inputs as the network does and returns its outputs, from whatever runtime."""
Evaluate = Callable[[Predict], "float | Sequence[float] | Tensor"]
"""Scores a network in 0..1, higher is better: one number, or one per sample (then the drop gets a bound)."""


@dataclass(frozen=True)
class Outcome:
    """What an evaluation returned: its mean, and the scores per sample if it gave any."""

    metric: str
    value: float
    samples: tuple[float, ...] | None

    @property
    def score(self) -> Score:
        """The Score that a Record keeps."""
        return Score(self.metric, self.value, None if self.samples is None else len(self.samples))


def accuracy(batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluate:
    """Return an `evaluate` that scores 1 for each sample whose largest output is its label, else 0.

    `batches` is a re-iterable of `(inputs, labels)`, labels of shape `(batch,)`. Raises InputError where it
    yields nothing or can be read only once.
    """
    if isinstance(batches, Iterator):
        raise InputError("accuracy() got an iterator that can be read only once. Give a list or a DataLoader.")

    def evaluate(predict: Predict) -> Tensor:
        outcomes = []
        for item in batches:
            *inputs, labels = item
            output = predict(*inputs)
            outcomes.append((output.argmax(1).cpu() == labels.cpu()).float())
        if not outcomes:
            raise InputError("accuracy() got no batches. Give at least one (inputs, labels) pair.")
        return torch.cat(outcomes)

    evaluate.__name__ = "accuracy"
    return evaluate


def agreement(original: Predict, batches: Iterable[tuple[Tensor, ...]]) -> Evaluate:
    """Return an `evaluate` that scores 1 for each sample where a network names the class that `original` names."""

    def evaluate(predict: Predict) -> Tensor:
        outcomes = []
        for inputs in batches:
            mine, theirs = _first(predict(*inputs)), _first(original(*inputs))
            if theirs.dim() < 2 or theirs.shape[1] < 2:
                raise InputError(
                    f"Agreement needs class scores, but the output has shape {tuple(theirs.shape)}. "
                    "Pass evaluate= with a function that scores this network."
                )
            same = mine.argmax(1) == theirs.argmax(1)
            outcomes.append(same.flatten(1).float().mean(1) if same.dim() > 1 else same.float())
        return torch.cat(outcomes)

    evaluate.__name__ = "agreement"
    return evaluate


def run_evaluate(evaluate: Evaluate, predict: Predict, what: str) -> Outcome:
    """Call the caller's `evaluate`; raises EvaluateError where it raises or returns no score in 0..1.

    Every call starts from the same random state, so that a shuffling loader pairs the same samples.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            found = evaluate(predict)
    except JettisonError:
        raise
    except Exception as error:
        raise EvaluateError(
            f"evaluate raised {type(error).__name__}: {error} (on the {what}). It must take a callable that maps "
            "inputs to outputs and return a float or one score per sample."
        ) from error
    values: Any = found.tolist() if isinstance(found, (Tensor, np.ndarray, np.generic)) else found
    single = isinstance(values, (int, float))
    try:
        scores = [float(values)] if single else [float(v) for v in pytree.tree_leaves(list(values))]
    except (TypeError, ValueError) as error:
        raise EvaluateError(
            f"evaluate returned a {type(found).__name__} on the {what}. It must return a float or one score per sample."
        ) from error
    wrong = [s for s in scores if not 0 <= s <= 1]
    if wrong or not scores:
        raise EvaluateError(
            f"evaluate returned {wrong[:3] or 'no score'} on the {what}; scores must be in 0..1, higher is better. "
            "Divide percentages by 100."
        )
    name = str(getattr(evaluate, "__name__", "evaluate"))
    name = name if name.isidentifier() else "evaluate"  # a lambda says nothing
    return Outcome(name, sum(scores) / len(scores), None if single else tuple(scores))


def compare(original: Outcome, compressed: Outcome) -> Drop:
    """Return the drop between two outcomes of the same evaluation, bounded where samples are paired."""
    if original.samples is not None and compressed.samples is not None:
        if len(original.samples) != len(compressed.samples):
            raise EvaluateError(
                f"evaluate returned {len(original.samples)} scores for the original and "
                f"{len(compressed.samples)} for the compressed network. It must score the same samples each time."
            )
        return bound_drop(original.samples, compressed.samples, original.metric)
    return Drop(original.metric, 100 * (original.value - compressed.value), None, CONFIDENCE, None)


def _first(output: Any) -> Tensor:
    return next(v for v in pytree.tree_leaves(output) if isinstance(v, Tensor))
