"""What a user does with a result afterwards: train it, copy, export, compile, wrap and save it, whatever its kind."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jettison as jt
from jettison.core.errors import FixedSize
from jettison.flow.delivering import Delivered, deliver_kept, load, save_module
from jettison.graph.groups import Graph, trace
from jettison.graph.rewrite import prune_graph
from jettison.testing import MODELS, build_model, check_quantized_round_trip, draw_kept, randomise


class Literal(nn.Module):
    """A convolution, BatchNorm and dropout with the channels written into its source."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return self.drop(self.norm(self.conv(x).reshape(n, 8, h, w))).relu()


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), Literal()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.body(x)).mean((2, 3)))


CASES = [
    ("residual", "eager"),
    ("residual", "graph"),
    ("attention", "hybrid"),
    ("attention", "graph"),
    ("transposed", "eager"),
    ("encoder", "hybrid"),
    ("several", "eager"),
    ("partly", "hybrid"),
    ("partly", "graph"),
]
Life = tuple[nn.Module, Delivered, tuple[Any, ...], Graph, Any]


class Wrapped(nn.Module):
    """A network below the top, so that one whose own source holds a literal gives a hybrid."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Any:
        return self.inner(*inputs)


def build(name: str, kind: str) -> tuple[nn.Module, tuple[Any, ...]]:
    if name == "partly":
        return randomise(Partly()), (torch.randn(2, 3, 6, 6),)
    model, inputs = build_model(name)
    return (Wrapped(model).eval() if kind == "hybrid" else model), inputs


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}", scope="module")
def life(request: pytest.FixtureRequest) -> Life:
    name, kind = request.param
    torch.manual_seed(0)
    model, inputs = build(name, kind)
    graph = trace(model, inputs)
    kept = draw_kept(graph, seed=1, least=2)
    final = prune_graph(graph, kept).module
    delivered = deliver_kept(model, graph, kept, final, result="graph" if kind == "graph" else "auto")
    assert delivered.kind == kind, delivered.note
    return model, delivered, inputs, graph, final


def leaves(value: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)]


def assert_same(found: Any, expected: Any, *, tolerance: float = 0.0) -> None:
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_it_trains(life: Life) -> None:
    _, delivered, inputs, _, _ = life
    module = copy.deepcopy(delivered.module).train()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    sum((y * torch.randn_like(y)).sum() for y in leaves(module(*inputs))).backward()
    assert all(p.grad is not None for p in module.parameters())
    optimizer.step()
    still = [n for n, p in module.named_parameters() if torch.equal(p, before[n])]
    # A bias before a BatchNorm in train mode, or a key's before a softmax, changes nothing and has no gradient.
    assert all(name.endswith("bias") for name in still)


@pytest.mark.parametrize("kind", ["hybrid", "graph"])
def test_batch_norm_and_dropout_follow_the_mode(kind: str) -> None:
    torch.manual_seed(0)
    model, inputs = build("partly", kind)
    graph = trace(model, inputs)
    kept = draw_kept(graph, seed=1, least=2)
    final = prune_graph(graph, kept).module
    module = deliver_kept(model, graph, kept, final, result="graph" if kind == "graph" else "auto").module
    state = {n: t.clone() for n, t in module.state_dict().items()}
    x = torch.randn(4, 3, 6, 6)
    calm = module(x)
    assert_same(module(x), calm)
    module.train()
    assert not torch.equal(module(x), module(x)), "dropout is off"
    moved = [n for n, t in module.state_dict().items() if "running" in n and not torch.equal(t, state[n])]
    assert {n for n in moved if n.startswith("body")} and {n for n in moved if n.startswith("norm")}
    module.load_state_dict(state)
    assert_same(module.eval()(x), calm)
    again = copy.deepcopy(module.train())
    assert again.training and not torch.equal(again(x), again(x))


def test_it_copies(life: Life) -> None:
    _, delivered, inputs, _, _ = life
    again = copy.deepcopy(delivered.module)
    assert list(again.state_dict()) == list(delivered.module.state_dict())
    assert_same(again(*inputs), delivered.module(*inputs))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert any(bool(p.any()) for p in delivered.module.parameters())


def test_it_runs_in_mixed_precision(life: Life) -> None:
    _, delivered, inputs, _, _ = life
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = delivered.module(*inputs)
    with torch.no_grad():
        expected = delivered.module(*inputs)
    # bfloat16 keeps 8 bits: 0.4 % per rounding, over a handful of layers.
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        assert float((a.float() - b).abs().max()) <= 0.1 * (1 + float(b.abs().max()))


def test_it_exports(life: Life) -> None:
    _, delivered, inputs, _, _ = life
    program = torch.export.export(delivered.module, inputs, strict=False)
    with torch.no_grad():
        # The exporter may take other kernels; float32 rounds at 6e-8 per sum.
        assert_same(program.module()(*inputs), delivered.module(*inputs), tolerance=1e-4)


@pytest.mark.slow
def test_it_compiles(life: Life) -> None:
    _, delivered, inputs, _, _ = life
    torch._dynamo.reset()
    compiled = torch.compile(delivered.module, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(*inputs), delivered.module(*inputs), tolerance=1e-4)


def test_saved_and_loaded_it_is_the_same(life: Life, tmp_path: Path) -> None:
    model, delivered, inputs, graph, final = life
    save_module(delivered, graph, final, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".pkl", ".bin")]
    fresh = None if delivered.kind == "graph" else randomise(copy.deepcopy(model), seed=9)
    again = load(tmp_path, fresh)
    assert list(again.state_dict()) == list(delivered.module.state_dict())
    with torch.no_grad():
        assert_same(again(*inputs), delivered.module(*inputs))
        # Two ways to the same numbers, through other kernels.
        assert_same(load(tmp_path)(*inputs), delivered.module(*inputs), tolerance=1e-4)


@pytest.mark.slow
def test_it_is_quantized_and_reloaded(life: Life, tmp_path: Path) -> None:
    """What pruning gives goes into `quantize` as it is, and comes back from disk bit for bit."""
    _, delivered, inputs, _, _ = life
    found = jt.quantize(delivered.module, [inputs])
    assert any(site.bits < 32 for site in found.sites)
    check = check_quantized_round_trip(found, inputs, tmp_path)
    assert check.passed, check


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("gloo") / "store"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_it_wraps_in_ddp(life: Life, process_group: None) -> None:
    _, delivered, inputs, _, _ = life
    module = copy.deepcopy(delivered.module)
    parallel = nn.parallel.DistributedDataParallel(module)
    assert_same(parallel(*inputs), delivered.module(*inputs))
    sum(y.sum() for y in leaves(parallel(*inputs))).backward()
    assert all(p.grad is not None for p in module.parameters())


class TestChoosing:
    """`result=` of `prune`."""

    def prune(self, make: Callable[[], nn.Module], **settings: Any) -> nn.Module:
        return jt.prune(randomise(make()), torch.randn(2, 3, 8, 8), keep=0.5, criterion="magnitude", **settings)

    def test_graph(self) -> None:
        assert isinstance(self.prune(MODELS["residual"][0], result="graph"), torch.fx.GraphModule)

    def test_auto_says_what_became_a_graph(self) -> None:
        recipe = jt.Recipe(multiple=1)
        with pytest.warns(UserWarning, match=r"graphs in the place of 'body'.*test_result_lives\.py"):
            assert type(self.prune(Partly, recipe=recipe)) is Partly
        with pytest.warns(UserWarning, match="is a graph module"):
            self.prune(Literal8, recipe=recipe)

    def test_eager_refuses_the_graph(self) -> None:
        with pytest.raises(FixedSize, match=r"test_result_lives\.py"):
            self.prune(Literal8, result="eager", recipe=jt.Recipe(multiple=1))

    def test_other_words(self) -> None:
        with pytest.raises(jt.InputError, match="'egaer'"):
            self.prune(Literal8, result="egaer")


class Literal8(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).reshape(-1, 8 * 36))


class Sized(nn.Module):
    """A submodule whose source holds a size, between layers that can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.body, self.head = nn.Linear(8, 24), Reshaped(), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(torch.relu(self.up(x))))
        return y


class Reshaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(torch.relu(self.one(x)).reshape(-1, 16))
        return y


def test_compress_keeps_the_own_class_by_leaving_whole_what_it_cannot_express() -> None:
    model = randomise(Sized())
    recipe = jt.Recipe(samples=64, judges=32, steps=0, rounds=4, quantize=False, multiple=1)
    with pytest.warns(UserWarning, match=r"stay whole.*test_result_lives\.py"):
        result = jt.compress(
            model, torch.randn(160, 8), budget=jt.Budget(macs=0.8), recipe=recipe, quiet=True, result="eager"
        )
    assert type(result.model) is Sized and type(result.model.body) is Reshaped
    assert result.model.body.one.out_features == 16 and result.record.met
    assert result.model.up.out_features < 24 or result.model.body.two.out_features < 12
