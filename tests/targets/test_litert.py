"""What is LiteRT's own: float ends on an integer file, no layout changes inside, integers between all roundings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.targets.networks import Pictures, Tokens, trace_trained, write
from torch import Tensor, nn

from jettison.core.errors import InputError
from jettison.graph.trace import Traced, trace_module
from jettison.quantization import quantize
from jettison.targets import litert as target

pytestmark = [pytest.mark.slow, pytest.mark.skipif(target.why_missing() is not None, reason=str(target.why_missing()))]

WITHIN_ONE_STEP = 0.9999
"""Share of outputs that may differ by at most one 8-bit step of the output's range (algorithms.md 4.1)."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def export_integers(traced: Traced, path: Path) -> tuple[Tensor, Tensor]:
    """Write the int8 form; returns inputs and what its simulation gives."""
    torch.manual_seed(3)
    x = torch.randn(32, *traced.example[0].shape[1:])
    found = quantize(traced.module, [(x,)], scheme=target.scheme())
    write(target, found.module, path, x)
    return x, found.module(x)[0]


def test_pictures_change_layout_once_and_round_at_the_ends_only(tmp_path: Path) -> None:
    path = tmp_path / "int8.tflite"
    export_integers(trace_trained(Pictures), path)
    operators = target.list_operators(path, None, threads=1)
    kinds = [o.kernel for o in operators]
    assert kinds[:2] == ["QUANTIZE", "TRANSPOSE"] and kinds[-1] == "DEQUANTIZE"
    assert kinds.count("TRANSPOSE") == kinds.count("QUANTIZE") == kinds.count("DEQUANTIZE") == 1
    assert all(o.precision in ("int8", "other") for o in operators[1:-1])


def test_gelu_and_means_over_tokens_are_integers(tmp_path: Path) -> None:
    path = tmp_path / "int8.tflite"
    export_integers(trace_trained(Tokens), path)
    found = [(o.kernel, o.precision) for o in target.list_operators(path, None, threads=1)]
    assert ("GELU", "int8") in found and found[-3][0] in ("MEAN", "RESHAPE") and ("MEAN", "int8") in found


class Gated(nn.Module):
    """A squeeze-and-excitation gate, a concatenation, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.b, self.c, self.fc = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.a(x))
        x = x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        x = torch.cat([torch.relu(self.b(x)), torch.relu(self.c(x))], 1)
        return torch.softmax(self.fc(x.mean((2, 3))), -1)


def test_gates_stay_float_and_right(tmp_path: Path) -> None:
    """LiteRT's integer sigmoid and softmax want output scales of their own, which a calibrated one is not."""
    torch.manual_seed(0)
    traced = trace_module(Gated().eval(), (torch.randn(4, 3, 12, 12),))
    path = tmp_path / "int8.tflite"
    x, wanted = export_integers(traced, path)
    given = target.predict(target.load(path, threads=1), (x,))[0]
    step = (wanted.max() - wanted.min()) / 255
    assert float(((wanted - given).abs() <= step).float().mean()) >= WITHIN_ONE_STEP
    found = {o.kernel: o.precision for o in target.list_operators(path, None, threads=1)}
    assert found["LOGISTIC"] == found["SOFTMAX"] == "fp32" and found["CONCATENATION"] == "int8"


def test_whole_number_inputs(tmp_path: Path) -> None:
    """The converter makes int32 of int64; the session takes what the network took."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(48, 3)).eval()
    ids = torch.randint(0, 20, (4, 6))
    path = write(target, trace_module(net, (ids,)).module, tmp_path / "ids.tflite", ids)
    given = target.predict(target.load(path, threads=1), (ids,))[0]
    assert torch.allclose(given, net(ids), atol=1e-6)


def test_there_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no profiler"):
        target.profile(tmp_path / "x.tflite", [], threads=1)


def test_peak_memory_grows_with_the_network(tmp_path: Path) -> None:
    x = torch.zeros(1, 512)
    grown = []
    for width in (64, 8192):
        traced = trace_module(nn.Sequential(nn.Linear(512, width), nn.ReLU(), nn.Linear(width, 4)).eval(), (x,))
        path = write(target, traced.module, tmp_path / f"{width}.tflite", x, dynamic=False)
        grown.append(target.measure_peak_memory(path, threads=1))
    assert grown[1] - grown[0] > 512 * (8192 - 64) * 4 * 0.8  # most of the 17 MB of weights
