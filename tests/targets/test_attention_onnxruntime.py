"""Attention's own products on integers in ONNX Runtime: the file computes what the module does, in integer kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jettison
from jettison.core.errors import InputError
from jettison.graph.trace import trace_module
from jettison.quantization import Quantized
from jettison.quantization.dynamic import quantize_dynamic
from jettison.targets import onnxruntime as target

pytestmark = [pytest.mark.slow, pytest.mark.skipif(target.why_missing() is not None, reason=str(target.why_missing()))]

ONE_STEP = 5e-3
"""Relative to the largest output: a value that lies between two integers may go to the other one."""
CONSTANT = torch.randn(1, 1, 10, 10, generator=torch.Generator().manual_seed(5))
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def spell_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / 4.0, -1) @ v


def batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2))
    return torch.bmm(torch.softmax(scores, -1), flat[2]).view(q.shape)


FORMS: dict[str, Attend] = {
    "fused": F.scaled_dot_product_attention,
    "scaled": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.2),
    "added mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=CONSTANT),
    "boolean mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=CONSTANT > -1),
    "spelled out": spell_out,
    "batched": batch,
}


class Net(nn.Module):
    """Attention over 10 tokens in 4 heads of 8, between two linear layers."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.qkv, self.out, self.attend = nn.Linear(32, 96), nn.Linear(32, 32), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return y


def quantize(attend: Attend, attention: bool = True) -> tuple[Quantized, Tensor, nn.Module]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, x = Net(attend).eval().requires_grad_(False), torch.randn(3, 10, 32)
    return jettison.quantize(net, x, kind="dynamic", attention=attention), x, net


@pytest.mark.parametrize("form", FORMS)
def test_the_file_computes_what_the_module_does(form: str, tmp_path: Path) -> None:
    found, x, net = quantize(FORMS[form])
    assert found.note == "2 products of two activations are on integers, 0 stayed float."
    path = jettison.export(found.module, x, tmp_path / "net.onnx")
    session = target.load(path, threads=1)
    for rows in (1, 3, 20):
        x = torch.randn(rows, 10, 32) * 2
        wanted, given, exact = found.module(x), target.predict(session, (x,))[0], net(x)
        assert float((wanted - given).abs().max() / wanted.abs().max()) < ONE_STEP
        assert 0 < float((wanted - exact).abs().max() / exact.abs().max()) < 0.05
    kinds = [operator.kernel for operator in target.list_operators(path, None, threads=1)]
    products = sum(kinds.count(k) for k in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"))
    assert products == 4 and not {"MatMul", "FusedMatMul", "Gemm", "MatMulInteger"} & set(kinds)


def test_float_products_in_the_module_would_be_noticed(tmp_path: Path) -> None:
    found, x, _ = quantize(spell_out)
    path = jettison.export(found.module, x, tmp_path / "net.onnx")
    plain = quantize(spell_out, attention=False)[0]
    assert plain.note == ""
    given = target.predict(target.load(path, threads=1), (x,))[0]
    error = float((plain.module(x) - given).abs().max() / given.abs().max())
    assert error > float((found.module(x) - given).abs().max() / given.abs().max()) * 10


def test_what_is_not_known_stays_float() -> None:
    """Causal attention in one operator, and a product with a constant, which is no product of two activations."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True) @ self.table

    x = torch.randn(2, 4, 6, 8)
    graph = trace_module(Odd().eval().requires_grad_(False), (x,), {}).module
    found = quantize_dynamic(graph, levels=target.scheme().weight, attention=True)
    assert found.note == "0 products of two activations are on integers, 2 stayed float."
    assert torch.equal(found.module(x)[0], graph(x)[0])


def test_other_kinds_have_no_such_products() -> None:
    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    for kind in ("static", "weight-only", "fp16"):
        with pytest.raises(InputError, match="dynamic"):
            jettison.quantize(net, x, kind=kind, attention=True)
