"""The result as a module and its files: the caller's own class, the graph, and both again from a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.flow.digits import DigitNet, split_digits
from torch import Tensor, nn
from torch.nn import functional as F

import jettison as jt
from jettison.core.errors import CheckpointError
from jettison.flow.delivering import deliver_kept
from jettison.graph.rewrite import prune_graph

QUICK = jt.Recipe(samples=64, judges=32, positions=1000, steps=4, rounds=4, quantize=False)
HALF = jt.Budget(macs=0.5)
CODE = """
import sys
import numpy as np, torch, jettison as jt
from tests.flow.digits import DigitNet
torch.set_num_threads(1)
data = np.load(sys.argv[2])
for model in (None, DigitNet()):
    network = jt.load(sys.argv[1], model=model)
    assert not network.training and (model is None or type(network) is DigitNet)
    with torch.no_grad():
        found = network(torch.from_numpy(data["x"])).numpy()
    assert found.tobytes() == data["expected"].tobytes()
"""


class FixedSize(nn.Module):
    """Writes the channels times the pixels into a reshape: no attribute to put right."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.head = nn.Linear(16 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).reshape(-1, 16 * 36))


@pytest.fixture(scope="module")
def result() -> jt.Result:
    torch.manual_seed(0)
    return jt.compress(DigitNet().eval(), split_digits()[0][:160], budget=HALF, recipe=QUICK, quiet=True)


@pytest.fixture(scope="module")
def fallen_back() -> jt.Result:
    torch.manual_seed(0)
    return jt.compress(FixedSize().eval(), split_digits()[0][:160], budget=HALF, recipe=QUICK, quiet=True)


@pytest.fixture
def saved(result: jt.Result, tmp_path: Path) -> Path:
    return result.save(tmp_path / "saved")


def test_the_class_equals_the_graph_bit_for_bit(result: jt.Result) -> None:
    x = split_digits()[1]
    assert type(result.model) is DigitNet and not result.model.training
    assert result.model.inner.out_channels == len(result.plan.kept.get("inner", range(32)))
    with torch.no_grad():
        assert torch.equal(result.model(x), jt.load(result.folder)(x))
    assert not any("graph" in note for note in result.record.notes)


def test_both_forms_load_in_a_fresh_process(result: jt.Result, saved: Path, tmp_path: Path) -> None:
    x = split_digits()[1][:32]
    with torch.no_grad():
        np.savez(tmp_path / "data.npz", x=x.numpy(), expected=result.model(x).numpy())
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(saved), str(tmp_path / "data.npz")],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_loading_leaves_the_fresh_model_alone_and_can_be_trained(saved: Path) -> None:
    fresh = DigitNet()
    state = {n: t.clone() for n, t in fresh.state_dict().items()}
    small = jt.load(saved, model=fresh)
    small(torch.zeros(2, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert all(torch.equal(t, state[n]) for n, t in fresh.state_dict().items())
    with torch.device("meta"):
        empty = DigitNet()
    assert jt.load(saved, model=empty)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_size_in_the_source_gives_the_graph_and_a_note(fallen_back: jt.Result) -> None:
    assert isinstance(fallen_back.model, torch.fx.GraphModule) and not fallen_back.model.training
    (note,) = [n for n in fallen_back.record.notes if "graph module" in n]
    assert note.startswith("The result is a graph module, not the network's own class. ")
    assert "576" in note or "test_delivering.py" in note
    x = split_digits()[1]
    with torch.no_grad():
        assert torch.equal(jt.load(fallen_back.folder)(x), fallen_back.model(x))
    with pytest.raises(CheckpointError, match="without a model"):
        jt.load(fallen_back.folder, model=FixedSize())


def test_tensors_that_do_not_fit_are_found() -> None:
    """The comparison bites: a class whose eager mode computes something else is not handed out."""

    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 if torch.compiler.is_exporting() else 2)

    model = nn.Sequential(Doubling(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    graph = jt.trace(model, torch.randn(4, 8))
    kept = {graph.groups[0].name: range(8)}
    delivered = deliver_kept(model, graph, kept, prune_graph(graph, kept).module)
    assert delivered.refusal and isinstance(delivered.module, torch.fx.GraphModule)


def test_a_kind_of_result_that_does_not_exist() -> None:
    with pytest.raises(jt.InputError, match="'egaer'"):
        jt.compress(DigitNet(), torch.zeros(4, 1, 8, 8), budget=HALF, recipe=QUICK, result="egaer")  # type: ignore[arg-type]


class TestForeign:
    def test_another_network(self, saved: Path) -> None:
        with pytest.raises(CheckpointError, match="another network"):
            jt.load(saved, model=nn.Linear(3, 3))

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other/1"}', '{"format": 3, "kind": []}'])
    def test_a_module_file_that_is_none(self, saved: Path, content: str) -> None:
        (saved / "module.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"module\.json"):
            jt.load(saved, model=DigitNet())
        assert jt.load(saved)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)

    def test_a_later_format(self, saved: Path) -> None:
        self.change(saved, format="jettison.module/2")
        with pytest.raises(CheckpointError, match="module/2"):
            jt.load(saved, model=DigitNet())

    @pytest.mark.parametrize(
        "attributes",
        [
            [{"module": "inner", "name": "nothing_such", "value": 3}],
            [{"module": "nowhere", "name": "out_channels", "value": 3}],
            [{"module": "inner"}],
            [{"module": "inner", "name": "out_channels", "value": "8"}],
        ],
    )
    def test_attributes_that_are_wrong(self, saved: Path, attributes: list[dict[str, object]]) -> None:
        self.change(saved, attributes=attributes)
        with pytest.raises(CheckpointError):
            jt.load(saved, model=DigitNet())

    def test_a_tensor_that_is_missing(self, saved: Path) -> None:
        names = json.loads((saved / "module.json").read_text())["tensors"]
        self.change(saved, tensors=[*names, "extra.weight"])
        with pytest.raises(CheckpointError, match=r"extra\.weight"):
            jt.load(saved, model=DigitNet())

    @pytest.mark.parametrize("name", ["model.json", "model.safetensors", "module.json", "module.safetensors"])
    def test_a_file_that_is_cut_short_or_gone(self, saved: Path, name: str) -> None:
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[: len(content) // 2])
        model = DigitNet() if name != "model.json" else None
        with pytest.raises(CheckpointError):
            jt.load(saved, model=model)
        (saved / name).unlink()
        with pytest.raises(CheckpointError):
            jt.load(saved, model=model)

    def test_the_files_of_another_run(self, saved: Path, fallen_back: jt.Result) -> None:
        for name in ("model.safetensors", "module.safetensors"):
            shutil.copy(fallen_back.folder / name, saved / name)
        with pytest.raises(CheckpointError):
            jt.load(saved)
        with pytest.raises(CheckpointError):
            jt.load(saved, model=DigitNet())

    @staticmethod
    def change(folder: Path, **values: object) -> None:
        file = folder / "module.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
