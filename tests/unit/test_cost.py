"""MACs against torch's own flop counter, parameters, activation memory, and honesty about what is not counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jettison.core.errors import InputError
from jettison.cost import count
from jettison.cost import macs as macs_module


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def trace(model: nn.Module, *inputs: Tensor, dynamic: bool = True) -> fx.GraphModule:
    """Export with the first dimension of each input free, or fixed."""
    free = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    shapes = ((free,) if isinstance(model, Call) else free) if dynamic else None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.export's own deprecations
        program = torch.export.export(model.eval(), inputs, dynamic_shapes=shapes)
        module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


CASES: dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...]]] = {
    "conv1d": (nn.Conv1d(6, 8, 5, stride=2, padding=1), ((2, 6, 21),)),
    "conv2d": (nn.Conv2d(3, 8, 3, padding=1), ((2, 3, 9, 7),)),
    "conv2d grouped": (nn.Conv2d(8, 12, 3, groups=4, dilation=2), ((2, 8, 9, 9),)),
    "conv2d depthwise": (nn.Conv2d(8, 8, 3, groups=8), ((2, 8, 9, 9),)),
    "conv2d same": (nn.Conv2d(4, 6, 3, padding="same"), ((2, 4, 9, 9),)),
    "conv3d": (nn.Conv3d(2, 4, (1, 3, 3)), ((2, 2, 5, 6, 7),)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2), ((2, 6, 5, 5),)),
    "linear": (nn.Linear(10, 7), ((2, 10),)),
    "linear over tokens": (nn.Linear(10, 7, bias=False), ((2, 5, 10),)),
    "bmm": (Call(torch.bmm), ((2, 3, 4), (2, 4, 5))),
    "baddbmm": (Call(torch.baddbmm), ((2, 3, 5), (2, 3, 4), (2, 4, 5))),
    "matmul": (Call(torch.matmul), ((2, 3, 4, 5), (2, 3, 5, 6))),
    "einsum": (Call(lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b)), ((2, 3, 4, 5), (2, 3, 6, 5))),
    "attention": (Call(F.scaled_dot_product_attention), ((2, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 8))),
}


def flops_of_one(model: nn.Module, shapes: tuple[tuple[int, ...], ...]) -> int:
    """FLOPs by torch's registry, for one sample; it knows attention on the CPU only as the products it is made of."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(*(torch.randn(1, *shape[1:]) for shape in shapes))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("dynamic", [True, False], ids=["free batch", "fixed batch"])
@pytest.mark.parametrize("name", CASES)
def test_two_macs_are_flops(name: str, dynamic: bool) -> None:
    model, shapes = CASES[name]
    profile = count(trace(model, *(torch.randn(shape) for shape in shapes), dynamic=dynamic))
    assert profile.macs > 0
    assert 2 * profile.macs == flops_of_one(model, shapes)
    assert not profile.uncounted


def test_the_flop_oracle_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted mistake: a convolution that forgets its groups."""
    model, shapes = CASES["conv2d grouped"]
    monkeypatch.setitem(macs_module.FORMULAS, "conv2d", lambda n, s: 4 * macs_module._convolution(n, s))
    assert 2 * count(trace(model, *(torch.randn(s) for s in shapes))).macs != flops_of_one(model, shapes)


class Residual(nn.Module):
    """A shared weight, a residual and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        y = F.relu(self.norm(self.conv(y)) + x)
        return self.head(y.mean((2, 3)))


def test_parameters_and_totals() -> None:
    model = Residual()
    profile = count(trace(model, torch.randn(2, 4, 6, 6)))
    assert profile.parameters == sum(p.numel() for p in model.parameters())
    assert profile.parameter_bytes == 4 * profile.parameters
    assert sum(n.parameters for n in profile.nodes) == profile.parameters, "a shared weight counts once"
    assert profile.macs == 2 * 4 * 4 * 9 * 36 + 4 * 3
    assert profile.uncounted == {}


def test_peak_activation_by_hand() -> None:
    """At the second convolution's end: x for the residual, y, and the result, each 4*6*6 floats."""
    profile = count(trace(Residual(), torch.randn(2, 4, 6, 6)))
    assert profile.peak_activation_bytes == 3 * 4 * 36 * 4


def test_views_take_no_memory() -> None:
    model = Call(lambda x: x.reshape(x.shape[0], 2, 8).transpose(1, 2).relu())
    assert count(trace(model, torch.randn(3, 16))).peak_activation_bytes == 2 * 16 * 4


def test_other_symbols_keep_their_traced_size() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        program = torch.export.export(nn.Linear(8, 4), (torch.randn(3, 5, 8),), dynamic_shapes=(free,))
        module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    assert count(module).macs == 5 * 8 * 4


def test_says_what_it_did_not_count() -> None:
    profile = count(trace(Call(lambda x: torch.fft.rfft(x).abs() + torch.cumsum(x, 1)[:, :9]), torch.randn(2, 16)))
    assert profile.uncounted == {"aten.fft_rfft.default": 1, "aten.cumsum.default": 1}
    assert profile.macs == 0
    three = Call(lambda a, b, c: torch.einsum("bi,bj,bk->bijk", a, b, c))
    assert count(trace(three, *(torch.randn(2, 3) for _ in range(3)))).uncounted == {"aten.einsum.default": 1}


def test_a_graph_without_shapes_is_refused() -> None:
    with pytest.raises(InputError, match=r"torch\.export"):
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_function(torch.ops.aten.mm.default, (x, x)))
        count(fx.GraphModule(nn.Module(), graph))


@pytest.mark.parametrize("batch", [1, 4])
def test_transformer_layer_counts_fully(batch: int) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    profile = count(trace(layer, torch.randn(batch, 7, 16), dynamic=False))
    products = 7 * 16 * 48 + 7 * 16 * 16 + 2 * 7 * 16 * 32 + 2 * 2 * 7 * 7 * 8
    assert profile.macs == products or profile.uncounted, "a fused operator must at least be named"
