"""Saving and loading graphs: bit-equal in a fresh process, and files from elsewhere run nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jettison.core.errors import CheckpointError, ExportError
from jettison.graph.groups import Graph, trace
from jettison.graph.rewrite import prune_graph
from jettison.graph.store import load_graph, load_tensors_into, read_tensors, save_graph, save_tensors
from jettison.testing import MODELS, build_model, check_round_trip, draw_kept

LOAD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from jettison.graph.store import load_graph
torch.set_num_threads(1)
torch.set_grad_enabled(False)  # attention chooses its kernel by it
for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
    inputs = {name: x.clone() for name, x in load_file(folder / "inputs.safetensors").items()}
    module, _, _ = load_graph(folder)
    outputs = module(*(inputs[str(i)] for i in range(len(inputs))))
    save_file({str(i): y.contiguous() for i, y in enumerate(outputs)}, folder / "outputs.safetensors")
"""


def _save(graph: Graph, folder: Path) -> None:
    save_graph(graph.module, graph.traced.in_spec, graph.traced.out_spec, folder)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    _save(trace(*build_model("shared")), tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_network_is_bit_equal_in_a_fresh_process(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    expected: dict[str, tuple[Tensor, ...]] = {}
    with torch.no_grad():
        for name in MODELS:
            graph = trace(*build_model(name))
            if name in ("attention", "shuffle", "merging"):
                graph = prune_graph(graph, draw_kept(graph, seed=0))
            _save(graph, tmp_path / name)
            inputs = {str(i): x for i, x in enumerate(graph.traced.example)}
            save_file(inputs, tmp_path / name / "inputs.safetensors")
            expected[name] = graph.module(*graph.traced.example)
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True, timeout=240)
    for name, outputs in expected.items():
        found = load_file(tmp_path / name / "outputs.safetensors")
        assert len(found) == len(outputs)
        assert all(torch.equal(found[str(i)], y) for i, y in enumerate(outputs)), name


def test_round_trip_keeps_nesting_and_names(tmp_path: Path) -> None:
    model, inputs = build_model("several")
    graph = trace(model, inputs)
    check = check_round_trip(graph, graph.traced.example, tmp_path)
    assert check.passed, check
    module, _, _ = load_graph(tmp_path)
    assert set(model.state_dict()) == set(module.state_dict())
    assert {n for n, _ in module.named_parameters()} == {n for n, _ in model.named_parameters()}


def test_the_round_trip_check_notices_one_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(*build_model("flatten"))

    def load(folder: Path) -> Any:
        module, *specs = load_graph(folder)
        with torch.no_grad():
            module.get_parameter("out.bias")[0] *= 1 + 2e-7
        return module, *specs

    monkeypatch.setattr("jettison.testing.oracles.load_graph", load)
    assert not check_round_trip(graph, graph.traced.example, tmp_path).passed


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    model, inputs = build_model("tied")
    _save(trace(model, inputs), tmp_path)
    rows = [t for t in read_tensors(tmp_path / "model.safetensors").values() if t.shape == (11, 8)]
    assert len({t.data_ptr() for t in rows}) == 1


class Constant(nn.Module):
    """Holds a plain tensor that is neither parameter nor buffer, and infinities and types in arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.plain = nn.Linear(3, 4), torch.rand(4)
        self.register_buffer("hidden", torch.rand(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) * self.plain + self.hidden
        z: Tensor = y.masked_fill(y < 0, -torch.inf).softmax(-1).to(torch.float64)
        return z


def test_constants_types_and_infinities(tmp_path: Path) -> None:
    graph = trace(Constant().eval(), torch.rand(2, 3))
    check = check_round_trip(graph, graph.traced.example, tmp_path)
    assert check.passed, check


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def _scramble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)


def _cut_json(folder: Path) -> None:
    path = folder / "model.json"
    path.write_text(path.read_text()[:200])


def _other_json(folder: Path) -> None:
    (folder / "model.json").write_text('{"format": "something else"}')


def _list_json(folder: Path) -> None:
    (folder / "model.json").write_text("[1, 2]")


def _remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _binary_json(folder: Path) -> None:
    (folder / "model.json").write_bytes(b"\xff\xfe\x00\x80")


def _other_tensors(folder: Path) -> None:
    save_tensors(nn.Linear(2, 2), folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage", [_truncate, _scramble, _cut_json, _other_json, _list_json, _remove, _binary_json, _other_tensors]
)
def test_damaged_and_foreign_files(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(CheckpointError):
        load_graph(saved)


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _first(data: dict[str, Any], op: str) -> dict[str, Any]:
    found: dict[str, Any] = next(n for n in data["nodes"] if n["op"] == op)
    return found


@pytest.mark.parametrize(
    "target",
    [
        "os.system.default",
        "prims.sin.default",
        "operator.attrgetter",
        "aten.no_such_thing.default",
        "aten.relu",
        "eval",
    ],
)
def test_operators_outside_aten_are_refused(saved: Path, target: str) -> None:
    _edit(saved, lambda data: _first(data, "call_function").update(target=target))
    with pytest.raises(CheckpointError, match="does not describe a graph"):
        load_graph(saved)


def _inject_default(data: dict[str, Any]) -> None:
    _first(data, "placeholder")["target"] = "x=open('OWNED', 'w')"


def _inject_argument(data: dict[str, Any]) -> None:
    _first(data, "call_function")["kwargs"] = {"x=open('OWNED', 'w'), y": 1}


def _inject_method(data: dict[str, Any]) -> None:
    _first(data, "call_function").update(op="call_method", target="tofile(open('OWNED', 'w')) or x.relu")


def _inject_module(data: dict[str, Any]) -> None:
    _first(data, "call_function").update(op="call_module", target="first")


def _inject_path(data: dict[str, Any]) -> None:
    _first(data, "get_attr")["target"] = "first.weight\"), open('OWNED', 'w'), (\""


def _inject_default_value(data: dict[str, Any]) -> None:
    _first(data, "placeholder")["args"] = ["x"]


def _inject_import(data: dict[str, Any]) -> None:
    context = '{"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": "[]"}'
    data["out_spec"] = [1, {"type": "collections.defaultdict", "context": context, "children_spec": []}]


@pytest.mark.parametrize(
    "inject", [_inject_default, _inject_argument, _inject_method, _inject_module, _inject_path, _inject_import]
)
def test_a_graph_cannot_carry_code(
    saved: Path, inject: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    _edit(saved, inject)
    with pytest.raises(CheckpointError):
        load_graph(saved)
    assert not (tmp_path / "OWNED").exists()
    assert "antigravity" not in sys.modules


class Looping(nn.Module):
    """Control flow without a rule: a loop whose length depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops import while_loop

        y: Tensor = while_loop(lambda t: t.sum() < 9, lambda t: (t + 1,), (x,))[0]
        return y


def test_what_is_no_aten_operator_is_not_saved(tmp_path: Path) -> None:
    graph = trace(Looping(), torch.randn(2, 3))
    with pytest.raises(ExportError, match="cannot be saved as data"):
        _save(graph, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensors_go_into_the_same_network_only(tmp_path: Path) -> None:
    torch.manual_seed(1)
    path = tmp_path / "t.safetensors"
    some, same, other = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 3)
    save_tensors(some, path)
    load_tensors_into(same, path)
    assert torch.equal(same.weight, some.weight) and isinstance(same.weight, nn.Parameter)
    with pytest.raises(CheckpointError, match="belongs to another network"):
        load_tensors_into(other, path)
