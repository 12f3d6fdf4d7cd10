"""Why a quantized network is worse than its float original, tensor by tensor, from inputs alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

import torch
from torch import nn

from jettison.core.errors import InputError
from jettison.distill.losses import measure_divergence
from jettison.flow.calibration import make_calibration
from jettison.flow.reading import Data, fit_batch
from jettison.flow.schemes import find_scheme
from jettison.graph.trace import trace_module
from jettison.quantization import quantize as quantize_graph
from jettison.quantization.diagnose import Diagnosis as Diagnosed
from jettison.quantization.diagnose import diagnose as diagnose_graph
from jettison.report.diagnosis import draw_diagnosis


class Diagnosis(Diagnosed):
    """A diagnosis that prints itself as a table."""

    def __str__(self) -> str:
        return draw_diagnosis(self)


def diagnose(
    model: nn.Module,
    calibration: Data,
    *,
    target: str = "onnxruntime",
    samples: int = 512,
    judged: int = 16,
    exclude: Collection[str] = (),
    ranges: str = "mse",
    seed: int = 0,
) -> Diagnosis:
    """Quantize a network as `quantize` does, and return what each quantized tensor costs, why, and what mends it.

    Ranges come from `samples` calibration inputs; the network is judged on the first `judged` of them, each tensor by
    leaving it out: about half a run of the network for each. `exclude` names layers that stay float. Raises
    CalibrationError without inputs, UnknownName for a target, layer or range estimator that is none.
    """
    scheme = find_scheme(target)
    if isinstance(judged, bool) or not isinstance(judged, int) or judged < 1:
        raise InputError(f"judged={judged!r} must be a whole number, at least 1. It is how many inputs to judge on.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        data, arguments, keywords = make_calibration(calibration, model, seal=False, seed=seed, device=device)
        traced = trace_module(model, arguments, keywords)
        data = fit_batch(data, traced)
        found = quantize_graph(traced.module, data.take(samples), scheme=scheme, exclude=exclude, ranges=ranges)
        plain = diagnose_graph(
            traced.module, found.module, data.take(judged), scheme=scheme, divergence=measure_divergence
        )
    return Diagnosis(**{field.name: getattr(plain, field.name) for field in fields(plain)})
