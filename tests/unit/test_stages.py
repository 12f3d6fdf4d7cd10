"""The stages as public functions, composed by hand on a small network."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pkgutil
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tests.flow.digits import DigitNet, load_digits, split_digits, train
from torch import Tensor, nn
from torch.nn import functional as F

import jettison as jt
from jettison.core.errors import CalibrationError, CheckpointError, ShapeError, UnknownName

RECIPE = jt.Recipe(samples=96, judges=64, positions=2000, steps=10)
HALF = jt.Budget(macs=0.5)
EXPORTED = 1e-4
"""Largest difference between a float module and its file: float32 sums in another order, relative to 1."""
TIES = 0.02
"""Share of int8 outputs that may differ from the file's by more: sums that float32 rounds across an integer step."""


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    return train(DigitNet(), steps=120)


@pytest.fixture
def model(trained: nn.Module) -> nn.Module:
    return copy.deepcopy(trained)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return split_digits()[0][:160]


@pytest.fixture(scope="module")
def graph(trained: nn.Module, x: Tensor) -> jt.Graph:
    return jt.trace(trained, x[:4])


@pytest.fixture(scope="module")
def table(graph: jt.Graph, x: Tensor) -> Any:
    return jt.sensitivity(graph, x, recipe=RECIPE)


@pytest.fixture(scope="module")
def plan(graph: jt.Graph, table: Any) -> jt.Plan:
    return jt.plan(graph, table, budget=HALF)


def run_file(path: Path, *inputs: Tensor, **named: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {n: x.numpy() for n, x in (named or dict(zip(names_of(session), inputs, strict=True))).items()}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


def names_of(session: onnxruntime.InferenceSession) -> list[str]:
    return [i.name for i in session.get_inputs()]


def measure_distance(module: nn.Module, original: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float(F.kl_div(module(x).log_softmax(1), original(x).softmax(1), reduction="batchmean"))


class TestDeciding:
    def test_profile_counts_by_hand(self, graph: jt.Graph) -> None:
        # 8x8 pixels: 3x3 kernels with 1->16, 16->32, 32->16; at 4x4: 16->32, depthwise 32; 32->10.
        macs = 64 * 9 * (16 + 16 * 32 + 32 * 16) + 16 * 9 * (16 * 32 + 32) + 320
        profile = jt.profile(graph)
        assert profile.macs == macs and profile.uncounted == {}
        assert profile.parameters == sum(p.numel() for p in DigitNet().parameters())

    def test_sensitivity_grows_as_less_is_kept(self, graph: jt.Graph, table: Any) -> None:
        assert [g.group for g in table.groups] == [g.name for g in graph.groups]
        for group in table.groups:
            assert group.losses[0] == 0 and list(group.losses) == sorted(group.losses) and group.losses[-1] > 0
            assert sorted(group.order) == list(range(graph.find(group.group).size))

    def test_protected_groups_have_no_options(self, graph: jt.Graph, x: Tensor) -> None:
        recipe = dataclasses.replace(RECIPE, protect=("inner",))
        assert {g.group for g in jt.sensitivity(graph, x, recipe=recipe).groups} == {"stem", "down"}

    def test_plan_keeps_the_budget(self, graph: jt.Graph, table: Any, plan: jt.Plan) -> None:
        whole = jt.profile(graph).macs
        assert plan.feasible and plan.bits == 8 and 0 < plan.cost.macs <= 0.5 * whole
        assert jt.profile(jt.trace(jt.apply(graph, plan), graph.traced.example)).macs == plan.cost.macs
        tight = jt.plan(graph, table, budget=jt.Budget(macs=0.9, mmacs=0.3))
        assert tight.cost.macs <= 300_000
        assert not jt.plan(graph, table, budget=jt.Budget(macs=0.001)).feasible
        assert jt.plan(graph, table, budget=jt.Budget(size=0.9), quantize=False).bits == 32

    def test_a_plan_under_a_limit_on_latency(self, graph: jt.Graph, table: Any) -> None:
        """50 ms: this network takes a thousandth of that, so that no busy machine can fail it."""
        found = jt.plan(graph, table, budget=jt.Budget(latency_ms=50.0))
        assert found.feasible and found.kept == {}
        assert found.cost.latency_ms is not None and found.cost.latency_ms > 0


class TestDoing:
    def test_apply_slices_and_trains(self, trained: nn.Module, graph: jt.Graph, plan: jt.Plan, x: Tensor) -> None:
        small = jt.apply(graph, plan)
        state = {n: t.clone() for n, t in trained.state_dict().items()}
        kept = {name: list(positions) for name, positions in plan.kept.items()}
        assert kept and not small.training
        inner, stem = kept.get("inner", list(range(32))), kept.get("stem", list(range(16)))
        assert torch.equal(small.inner.weight, trained.inner.weight[inner][:, stem])
        optimizer = torch.optim.SGD(small.parameters(), 1e-3)
        before = F.cross_entropy(small(x[:32]), load_digits()[1][:32])
        before.backward()
        assert all(p.grad is not None for p in small.parameters())
        optimizer.step()
        assert F.cross_entropy(small(x[:32]), load_digits()[1][:32]) < before
        assert all(torch.equal(t, state[n]) for n, t in trained.state_dict().items())

    def test_a_plan_that_keeps_all_changes_nothing(self, trained: nn.Module, graph: jt.Graph, x: Tensor) -> None:
        whole = jt.Plan("jettison.plan/1", {}, 32, 0.0, jt_cost(), True, ())
        with torch.no_grad():
            assert torch.equal(jt.apply(graph, whole)(x), trained(x))

    def test_recover_brings_it_nearer(self, trained: nn.Module, graph: jt.Graph, plan: jt.Plan) -> None:
        seen, unseen = split_digits()[:2]
        sliced = measure_distance(jt.apply(graph, plan), trained, unseen)
        refitted = jt.recover(graph, plan, seen, recipe=dataclasses.replace(RECIPE, steps=0))
        distilled = jt.recover(graph, plan, seen, recipe=dataclasses.replace(RECIPE, steps=100))
        assert not distilled.training
        assert measure_distance(refitted, trained, unseen) < 0.7 * sliced
        assert measure_distance(distilled, trained, unseen) < measure_distance(refitted, trained, unseen)

    def test_recover_refuses_what_was_only_learnt_by_heart(self, graph: jt.Graph, plan: jt.Plan, x: Tensor) -> None:
        few = x[:24]
        refitted = jt.recover(graph, plan, few, recipe=dataclasses.replace(RECIPE, samples=16, judges=8, steps=0))
        hasty = dataclasses.replace(RECIPE, samples=16, judges=8, steps=60, learning_rate=0.3)
        distilled = jt.recover(graph, plan, few, recipe=hasty)
        pairs = zip(refitted.parameters(), distilled.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_recover_is_seeded_and_leaves_the_generators_alone(self, graph: jt.Graph, plan: jt.Plan, x: Tensor) -> None:
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        first = jt.recover(graph, plan, x, recipe=RECIPE, seed=3)
        jt.sensitivity(graph, x[:64], recipe=RECIPE)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
        torch.manual_seed(99)
        second = jt.recover(graph, plan, x, recipe=RECIPE, seed=3)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))

    def test_inside_inference_mode(self, model: nn.Module, x: Tensor) -> None:
        with torch.inference_mode():
            inputs = x * 1.0
            graph = jt.trace(model, inputs[:4])
            plan = jt.plan(graph, jt.sensitivity(graph, inputs, recipe=RECIPE), budget=HALF)
            results = [jt.apply(graph, plan), jt.recover(graph, plan, inputs, recipe=RECIPE)]
            results.append(jt.prune(model, inputs[:4], keep=0.5, calibration=inputs))
        for module in results:
            module(x[:2]).sum().backward()


class TestProving:
    def test_quantized_module_is_what_the_file_computes(
        self, graph: jt.Graph, plan: jt.Plan, x: Tensor, tmp_path: Path
    ) -> None:
        small = jt.recover(graph, plan, x, recipe=RECIPE)
        quantized = jt.quantize(small, x)
        assert quantized.sites
        files = {"float": jt.export(small, x[:4], tmp_path / "float.onnx")}
        files["int8"] = jt.export(quantized.module, x[:4], tmp_path / "int8.onnx")
        unseen = split_digits()[1]
        with torch.no_grad():
            expected, simulated = small(unseen), quantized.module(unseen)
        (found,), (integers,) = run_file(files["float"], unseen), run_file(files["int8"], unseen)
        assert float((found - expected).abs().max()) < EXPORTED * (1 + float(expected.abs().max()))
        tolerance = 1e-5 * (1 + float(simulated.abs().max()))
        assert float(((integers - simulated).abs() > tolerance).float().mean()) <= TIES
        assert float(((integers - expected).abs() > tolerance).float().mean()) > 0.9  # int8 is not float
        assert files["int8"].stat().st_size < files["float"].stat().st_size

    def test_measure_is_relative_to_the_first(self, model: nn.Module, x: Tensor, tmp_path: Path) -> None:
        file = jt.export(model, x[:4], tmp_path / "a.onnx")
        found = jt.measure({"one": file, "other": str(file)}, x[:1], rounds=10)
        assert list(found) == ["one", "other"]
        assert found["one"].speedup.value == 1 and found["other"].latency_ms.value > 0
        assert len(found["other"].samples_ms) == 10

    def test_verify_passes_what_is_sliced_right_and_fails_what_is_not(
        self, graph: jt.Graph, plan: jt.Plan, x: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert jt.verify(graph, plan, x[:8]).passed
        from jettison.flow import stages

        def slice_wrongly(graph: jt.Graph, keeps: Any) -> Any:
            moved = {atom: kept.flip(0) for atom, kept in keeps.items()}
            return slice_graph(graph, moved)

        slice_graph = stages.slice_graph
        monkeypatch.setattr(stages, "slice_graph", slice_wrongly)
        assert not jt.verify(graph, plan, x[:8]).passed

    def test_a_loaded_module_can_be_exported(self, model: nn.Module, x: Tensor, tmp_path: Path) -> None:
        result = jt.compress(
            model, x, budget=HALF, recipe=dataclasses.replace(RECIPE, quantize=False, rounds=4), quiet=True
        )
        loaded = jt.load(result.folder)
        (found,) = run_file(jt.export(loaded, x[:4], tmp_path / "a.onnx"), x)
        with torch.no_grad():
            assert float((found - loaded(x)).abs().max()) < EXPORTED * (1 + float(found.abs().max()))


class TwoInputs(nn.Module):
    """A picture and an offset in, a dict out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: Tensor, offset: Tensor) -> dict[str, Tensor]:
        logits = self.inner(image + offset[:, None, None, None])
        return {"logits": logits, "brightness": image.mean((1, 2, 3))}


class Pair(nn.Module):
    """One argument that is a pair."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.inner(pair[0] + pair[1][:, None, None, None])


class FixedBatch(nn.Module):
    """Writes its batch of 16 into a reshape."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).reshape(16, 10)


class TestInputs:
    def test_tuples_with_labels(self, model: nn.Module, x: Tensor, tmp_path: Path) -> None:
        zeros, labels = torch.zeros(160), torch.arange(160)
        items = list(zip(x.split(40), zeros.split(40), labels.split(40), strict=True))
        inputs = (x[:4], zeros[:4])
        graph = jt.trace(TwoInputs(model), inputs)
        self.check(TwoInputs(model), graph, items, inputs, tmp_path)

    def test_dicts_with_labels_in_any_order(self, model: nn.Module, x: Tensor, tmp_path: Path) -> None:
        zeros = torch.zeros(40)
        items: list[Any] = [
            {"offset": zeros, "label": torch.zeros(40), "image": part} if i % 2 else {"image": part, "offset": zeros}
            for i, part in enumerate(x.split(40))
        ]
        graph = jt.trace(TwoInputs(model), (), {"image": x[:4], "offset": zeros[:4]})
        self.check(TwoInputs(model), graph, items, {"offset": zeros[:4], "image": x[:4]}, tmp_path)
        # traced with positions, calibrated with names
        graph = jt.trace(TwoInputs(model), (x[:4], zeros[:4]))
        assert jt.sensitivity(graph, items, recipe=RECIPE).groups

    def check(self, network: nn.Module, graph: jt.Graph, items: Any, inputs: Any, folder: Path) -> None:
        plan = jt.plan(graph, jt.sensitivity(graph, items, recipe=RECIPE), budget=HALF)
        assert plan.kept and jt.verify(graph, plan, inputs).passed
        small = jt.recover(graph, plan, items, recipe=RECIPE)
        quantized = jt.quantize(network, items)
        for module, name in ((small, "small"), (network, "original"), (quantized.module, "int8")):
            file = jt.export(module, inputs, folder / f"{name}.onnx")
            with torch.no_grad():
                expected = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
            found = run_file(file, **inputs) if isinstance(inputs, dict) else run_file(file, *inputs)
            assert len(found) == 2 and float((found[0] - expected["logits"]).abs().max()) < 1e-3
        assert set(jt.measure({"a": file}, inputs, rounds=5)) == {"a"}
        pruned = jt.prune(network, inputs, keep=0.5, calibration=items)
        assert isinstance(pruned, TwoInputs)

    def test_nested_inputs(self, model: nn.Module, x: Tensor) -> None:
        zeros = torch.zeros(40)
        items = [((part, zeros), torch.zeros(40)) for part in x.split(40)]
        graph = jt.trace(Pair(model), ((x[:4], zeros[:4]),))
        plan = jt.plan(graph, jt.sensitivity(graph, items, recipe=RECIPE), budget=HALF)
        assert plan.kept and jt.verify(graph, plan, ((x[:4], zeros[:4]),)).passed
        assert jt.recover(graph, plan, items, recipe=RECIPE)

    def test_a_fixed_batch(self, model: nn.Module, x: Tensor, tmp_path: Path) -> None:
        network = FixedBatch(model)
        graph = jt.trace(network, x[:16])
        items = list(x.split(40))  # no multiple of 16: they are cut anew
        plan = jt.plan(graph, jt.sensitivity(graph, items, recipe=RECIPE), budget=HALF)
        small = jt.recover(graph, plan, items, recipe=RECIPE)
        assert small(x[:16]).shape == (16, 10)
        assert jt.prune(network, x[:16], keep=0.5, calibration=items)(x[:16]).shape == (16, 10)
        (found,) = run_file(jt.export(small, x[:16], tmp_path / "a.onnx"), x[:16])
        assert found.shape == (16, 10)
        with pytest.raises(ShapeError):
            jt.verify(graph, plan, x[:8])


class TestPrune:
    def test_it_is_the_callers_own_class(self, model: nn.Module, x: Tensor) -> None:
        state = {n: t.clone() for n, t in model.state_dict().items()}
        model.train()
        small = jt.prune(model, x[:4], keep={"inner": 0.5, "stem": 5}, calibration=x, seed=1)
        assert type(small) is DigitNet and not small.training and model.training
        assert (small.inner.out_channels, small.stem.out_channels, small.down.out_channels) == (16, 5, 32)
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}
        assert not shared

    def test_refitting_reaches_the_class(self, model: nn.Module, x: Tensor) -> None:
        unseen = split_digits()[1]
        sliced = jt.prune(model, x[:4], keep=0.5, criterion="magnitude")
        refitted = jt.prune(model, x[:4], keep=0.5, criterion="magnitude", calibration=x)
        assert measure_distance(refitted, model, unseen) < 0.7 * measure_distance(sliced, model, unseen)

    def test_a_fixed_size_in_the_source_gives_the_graph_and_says_so(self, x: Tensor) -> None:
        with pytest.warns(UserWarning, match="graph module"):
            small = jt.prune(Hardened(), x[:4], keep=0.5, criterion="magnitude")
        assert isinstance(small, torch.fx.GraphModule) and not small.training
        assert small(x[:3]).shape == (3, 10)

    def test_outputs_that_are_no_tensors(self, x: Tensor) -> None:
        small = jt.prune(Talkative(), x[:4], keep=0.5, criterion="magnitude")
        assert isinstance(small, Talkative) and small(x[:2])["loss"] is None


class Hardened(nn.Module):
    """A number that stands for the channels where no attribute can be put right."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.head = nn.Linear(16 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).reshape(-1, 16 * 36))


class Talkative(nn.Module):
    """Returns what is no tensor as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"logits": self.head(F.relu(self.conv(x)).mean((2, 3))), "loss": None}


def jt_cost() -> Any:
    from jettison.core.plan import Cost

    return Cost(1, 1, None)


@pytest.mark.parametrize(
    ("attempt", "error", "says"),
    [
        (lambda g, p, x, f: jt.profile(DigitNet()), jt.InputError, "trace"),  # type: ignore[arg-type]
        (lambda g, p, x, f: jt.sensitivity(g, []), CalibrationError, "no calibration items"),
        (lambda g, p, x, f: jt.sensitivity(g, iter([x])), CalibrationError, "only once"),
        (lambda g, p, x, f: jt.sensitivity(g, x[:, :, :4]), ShapeError, "traced with"),
        (lambda g, p, x, f: jt.sensitivity(g, x.double()), ShapeError, "float64"),
        (lambda g, p, x, f: jt.sensitivity(g, x, recipe=jt.Recipe(criterion="obss")), UnknownName, "'obs'"),
        (lambda g, p, x, f: jt.plan(g, jt.sensitivity(g, x[:32]), budget=jt.Budget(drop=1.0)), jt.InputError, "drop"),
        (lambda g, p, x, f: jt.apply(g, dataclasses.replace(p, kept={"iner": (0,)})), UnknownName, "'inner'"),
        (lambda g, p, x, f: jt.apply(g, dataclasses.replace(p, kept={"inner": (99,)})), jt.InputError, "0..31"),
        (lambda g, p, x, f: jt.recover(g, p, []), CalibrationError, "no calibration items"),
        (lambda g, p, x, f: jt.quantize(DigitNet(), x, target="onnxruntim"), UnknownName, "'onnxruntime'"),
        (lambda g, p, x, f: jt.quantize(DigitNet(), []), CalibrationError, "no calibration items"),
        (lambda g, p, x, f: jt.export(DigitNet(), x[0], f / "a"), ShapeError, "does not take"),
        (lambda g, p, x, f: jt.export(jt.apply(g, p), x[0], f / "a"), ShapeError, "traced with"),
        (lambda g, p, x, f: jt.export(jt.apply(g, p), (x, x), f / "a"), ShapeError, "2 tensors"),
        (lambda g, p, x, f: jt.measure({}, x), jt.InputError, "no files"),
        (lambda g, p, x, f: jt.measure({"a": f / "none.onnx"}, x), CheckpointError, "none.onnx"),
        (lambda g, p, x, f: jt.measure({"a": f / "none.onnx"}, x, threads=0), jt.InputError, "threads=0"),
        (lambda g, p, x, f: jt.measure({"a": jt.export(DigitNet(), x, f / "a")}, x[:, 0]), ShapeError, "'x'"),
        (lambda g, p, x, f: jt.verify(g, p, x[:, :, :4]), ShapeError, "traced with"),
        (lambda g, p, x, f: jt.verify(g, p, "x"), ShapeError, "a str"),
        (lambda g, p, x, f: jt.prune(DigitNet(), x, keep=0.5), jt.InputError, "needs calibration"),
        (lambda g, p, x, f: jt.prune(DigitNet(), x, keep=0.0, criterion="random"), jt.InputError, "share"),
    ],
)
def test_what_is_wrong_is_said(
    attempt: Callable[..., Any],
    error: type[Exception],
    says: str,
    graph: jt.Graph,
    plan: jt.Plan,
    x: Tensor,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=says):
        attempt(graph, plan, x, tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_public_names_are_functions_and_classes_whatever_was_imported() -> None:
    """A room with the name of a function would take its place once it is imported."""
    for found in pkgutil.walk_packages(jt.__path__, "jettison."):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:  # what reads a runtime's own files needs that runtime
            assert error.name in ("executorch", "flatbuffers", "ai_edge_litert"), error
    names = [name for name in jt.__all__ if not name.startswith("__")]
    assert names == sorted(names)
    for name in names:
        value = getattr(jt, name)
        assert not isinstance(value, ModuleType) and (inspect.isfunction(value) or inspect.isclass(value)), name
