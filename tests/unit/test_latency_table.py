"""Latency tables: grids, lookup, cache, and that the runtime really runs the kernel that is claimed."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jettison.core.errors import InputError, TargetMissing, UnknownName
from jettison.core.plain import from_plain, to_plain
from jettison.cost import LatencyTable, LayerShape, bench_openvino, latency, latency_ms, measure_layers, measure_table
from jettison.cost import timing as timing_module
from jettison.cost.bench_onnxruntime import open_session
from jettison.cost.layers import build_model

CONV = LayerShape("conv", 32, 64, (3, 3), (1, 1), (1, 1), input_size=(8, 8))
DEPTHWISE = LayerShape("conv", 48, 48, (3, 3), (2, 2), (1, 1), groups=48, input_size=(8, 8))
LINEAR = LayerShape("linear", 96, 10)
STEM = LayerShape("conv", 3, 24, (3, 3), input_size=(9, 9))
GROUPED = LayerShape("conv", 24, 48, (1, 1), groups=3, input_size=(4, 4))
FAMILIES = [CONV, DEPTHWISE, LINEAR, STEM, GROUPED]
TIMING_ORDER = 2.0
"""A layer of 64 times the MACs takes at least twice as long, however busy the machine."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JETTISON_CACHE", str(tmp_path))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[LayerShape]:
    """Time is a formula, with a dearer price for odd multiples of 8; returns what was asked to be measured."""
    asked: list[LayerShape] = []

    def measure(shapes: Sequence[LayerShape], **options: Any) -> list[float]:
        asked.extend(shapes)
        return [truth(shape) for shape in shapes]

    monkeypatch.setattr(latency, "measure_layers", measure)
    return asked


def truth(shape: LayerShape) -> float:
    return shape.macs * (1e-6 if shape.out_channels % 16 == 0 else 2e-6)


@pytest.mark.parametrize("full", FAMILIES, ids=lambda s: f"{s.operator}{s.in_channels}-{s.out_channels}")
def test_full_width_and_multiples_of_8_are_read_right(full: LayerShape, fake: list[LayerShape]) -> None:
    table = measure_table(FAMILIES)
    assert latency_ms(table, full) == truth(full)
    for width in range(8, full.out_channels + 1, 8):
        if full.depthwise or width % full.groups == 0:
            shape = full.at(width if full.depthwise else full.in_channels, width)
            assert latency_ms(table, shape) == pytest.approx(truth(shape)), "linear within a residue of 16"


def test_both_widths_move(fake: list[LayerShape]) -> None:
    table = measure_table([LayerShape("conv", 160, 320, (1, 1), input_size=(4, 4))])
    for ins in range(8, 161, 8):
        for outs in range(8, 321, 24):
            shape = table.families[0].full.at(ins, outs)
            assert latency_ms(table, shape) == pytest.approx(truth(shape))
    assert len(fake) <= 6 * 8, "the grid stays small however wide the layer"


def test_other_widths_read_the_next_multiple_of_8(fake: list[LayerShape]) -> None:
    table = measure_table([CONV])
    assert latency_ms(table, CONV.at(29, 41)) == latency_ms(table, CONV.at(32, 48))
    assert latency_ms(table, CONV.at(1, 1)) == latency_ms(table, CONV.at(8, 8))


def test_what_was_not_measured_is_an_error(fake: list[LayerShape]) -> None:
    table = measure_table([CONV])
    for shape in (CONV.at(40, 64), LINEAR, LayerShape("conv", 8, 8, (3, 3), input_size=(8, 8))):
        with pytest.raises(InputError, match="measure_table"):
            latency_ms(table, shape)


def test_cache_is_used_and_grows(fake: list[LayerShape], tmp_path: Path) -> None:
    first = measure_table([CONV])
    asked = len(fake)
    assert measure_table([CONV]) == first and len(fake) == asked
    measure_table([CONV, LINEAR])
    assert all(shape.operator == "linear" for shape in fake[asked:])
    asked = len(fake)
    assert len(measure_table([LINEAR, CONV]).families) == 2 and len(fake) == asked
    measure_table([CONV], threads=2)
    measure_table([CONV], cache=False)
    assert len(fake) > asked and len(list((tmp_path / "latency").glob("*.json"))) == 2


@pytest.mark.parametrize("damage", ["cut", "negative", "foreign", "grid", "impossible"])
def test_damaged_cache_is_ignored_with_a_warning(damage: str, fake: list[LayerShape], tmp_path: Path) -> None:
    first = measure_table([CONV])
    (path,) = (tmp_path / "latency").glob("*.json")
    text = path.read_text()
    data = json.loads(text)
    if damage == "negative":
        data["families"][0]["ms"][0][0] = -1.0
    elif damage == "foreign":
        data["machine"]["cpu"] = "another"
    elif damage == "grid":
        data["families"][0]["ins"] = [8]
    elif damage == "impossible":
        data["families"][0]["full"]["groups"] = 7
    path.write_text(text[:50] if damage == "cut" else json.dumps(data))
    asked = len(fake)
    with pytest.warns(UserWarning, match="measured anew"):
        assert measure_table([CONV]) == first
    assert len(fake) > asked
    assert measure_table([CONV]) == first, "and the file is whole again"


def test_table_is_plain_data(fake: list[LayerShape]) -> None:
    table = measure_table(FAMILIES)
    assert from_plain(LatencyTable, json.loads(json.dumps(to_plain(table)))) == table
    assert set(table.machine) == {"cpu", "flags", "cores", "onnxruntime"}


def test_runtimes_have_tables_of_their_own(fake: list[LayerShape]) -> None:
    first = measure_table([CONV])
    asked = len(fake)
    other = measure_table([CONV], runtime="openvino")
    assert len(fake) == 2 * asked and "openvino" in other.machine
    assert measure_table([CONV]) == first and len(fake) == 2 * asked
    with pytest.raises(UnknownName, match="openvino"):
        measure_table([CONV], runtime="openvin")


@pytest.mark.parametrize(
    "wrong",
    [
        {"operator": "pool"},
        {"precision": "fp16"},
        {"groups": 5},
        {"out_channels": 0},
        {"kernel": ()},
        {"stride": (1,)},
        {"input_size": (0, 0)},
    ],
    ids=lambda w: next(iter(w)),
)
def test_impossible_layers(wrong: dict[str, Any]) -> None:
    fields: dict[str, Any] = {**to_plain(CONV), **wrong}
    with pytest.raises(InputError):
        LayerShape(**fields)


def test_bad_counts() -> None:
    with pytest.raises(InputError):
        measure_layers([CONV], rounds=1)
    with pytest.raises(InputError):
        measure_layers([CONV], threads=0)
    assert measure_layers([]) == []


INT8 = [LayerShape(**{**to_plain(shape), "precision": "int8"}) for shape in FAMILIES]


@pytest.mark.parametrize("shapes", [FAMILIES, INT8], ids=["fp32", "int8"])
def test_every_layer_runs_as_claimed(shapes: list[LayerShape], tmp_path: Path) -> None:
    """One kernel a layer under its name, integer ones for int8, and outputs of the claimed shape."""
    session = open_session(build_model(shapes).SerializeToString(), 1, tmp_path / "run")
    rng = np.random.default_rng(0)
    outputs = session.run(None, {f"x{i}": timing_module._draw_input(s, rng) for i, s in enumerate(shapes)})
    assert [tuple(y.shape) for y in outputs] == [s.output_shape for s in shapes]
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [
        (e["name"].split("_")[0], e["args"]["op_name"])
        for e in events
        if e["cat"] == "Node" and e["name"].startswith("layer") and e["name"].endswith("_kernel_time")
    ]
    integer = {"conv": "QLinearConv", "linear": "QGemm"}
    real = {"conv": "Conv", "linear": "Gemm"}
    wanted = [(f"layer{i}", (integer if s.precision == "int8" else real)[s.operator]) for i, s in enumerate(shapes)]
    assert sorted(kernels) == wanted


RUNTIMES = [
    name if importlib.util.find_spec(name) else pytest.param(name, marks=pytest.mark.skip(reason=f"{name} is missing"))
    for name in timing_module.RUNTIMES
]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_real_times_follow_the_work(runtime: str, precision: str) -> None:
    small = LayerShape("conv", 32, 32, (3, 3), (1, 1), (1, 1), input_size=(4, 4), precision=precision)
    large = LayerShape("conv", 64, 64, (3, 3), (1, 1), (1, 1), input_size=(16, 16), precision=precision)
    times = measure_layers([small, large, *(INT8 if precision == "int8" else FAMILIES)], runtime=runtime)
    assert all(t >= 0 for t in times) and times[1] > TIMING_ORDER * times[0] > 0


def test_every_layer_has_its_kernel_in_openvino(tmp_path: Path) -> None:
    """Each branch's kernel is told from the layout changes around it, integer ones included."""
    pytest.importorskip("openvino")
    rng = np.random.default_rng(0)
    shapes = [*FAMILIES, *INT8]
    bench = bench_openvino.Bench(build_model(shapes), len(shapes), 1, tmp_path)
    for _ in range(8):
        bench.run({f"x{i}": timing_module._draw_input(s, rng) for i, s in enumerate(shapes)})
    kinds = {n.node_name: (n.node_type, n.exec_type) for n in bench.request.get_profiling_info()}
    for index, shape in enumerate(shapes):
        mine = [
            k for name, k in kinds.items() if name.startswith(f"layer{index}_") and k[0] not in bench_openvino._AROUND
        ]
        ran = [execution for _, execution in mine if execution != "undef"]
        assert len(ran) == 1 and ran[0].endswith("I8" if shape.precision == "int8" else "f32"), (shape, mine)
    assert all(len(times) == 8 for times in bench.read())


def test_a_missing_openvino_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("jettison.targets.openvino.why_missing", lambda: "openvino is not installed: run `pip ...`.")
    with pytest.raises(TargetMissing, match="pip"):
        bench_openvino.Bench(build_model([CONV]), 1, 1, tmp_path)


def test_a_real_table_from_end_to_end() -> None:
    table = measure_table([LINEAR, STEM], rounds=5)
    assert latency_ms(table, STEM) > 0
    assert measure_table([LINEAR, STEM], rounds=5) == table


WALL_FACTOR = 1.6
"""The sum over layers against the wall clock of a network: 1.02 on a quiet machine; tests share busy cores."""


def test_layers_add_up_to_a_network() -> None:
    """Eight convolutions in a row, timed as a network without profiling, against eight times the layer alone."""
    from onnx import TensorProto, helper, numpy_helper

    shape = LayerShape("conv", 64, 64, (3, 3), (1, 1), (1, 1), input_size=(14, 14))
    names = [f"v{i}" for i in range(9)]
    weights = [numpy_helper.from_array(np.ones((64, 64, 3, 3), np.float32) / 576, f"w{i}") for i in range(8)]
    nodes = [
        helper.make_node("Conv", [names[i], f"w{i}"], [names[i + 1]], f"conv{i}", kernel_shape=(3, 3), pads=(1,) * 4)
        for i in range(8)
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape.input_shape) for n in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "row", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = open_session(model.SerializeToString(), 1)
    feeds = {names[0]: np.ones(shape.input_shape, np.float32)}
    walls = []
    for _ in range(60):
        start = time.perf_counter()
        session.run(None, feeds)
        walls.append((time.perf_counter() - start) * 1e3)
    predicted = sum(measure_layers([shape] * 8, rounds=10))
    assert 1 / WALL_FACTOR < predicted / min(walls) < WALL_FACTOR
