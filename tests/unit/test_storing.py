"""Quantized networks on disk: bit-equal in a fresh process, and what is damaged, foreign or of another version."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import jettison as jt
from jettison.core.errors import CheckpointError, ExportError
from jettison.graph import store
from jettison.graph.trace import trace_module
from jettison.quantization import Quantized, storing
from jettison.testing import build_model, check_quantized_round_trip, oracles

KINDS = ("static", "dynamic", "weight-only", "fp16", "bf16")
AGAIN = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
import jettison as jt
torch.set_num_threads(1)
for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
    inputs = {name: x.clone() for name, x in load_file(folder / "inputs.safetensors").items()}
    module = jt.load_quantized(folder).module
    outputs = torch.utils._pytree.tree_leaves(module(**inputs))
    save_file({str(i): y.contiguous() for i, y in enumerate(outputs)}, folder / "outputs.safetensors")
    jt.export(module, inputs, folder / "again.onnx")
"""


class Net(nn.Module):
    """Two keyword inputs, a residual step and attention; gives a dict with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Any]:
        x = torch.relu(self.norm(self.conv(x)))
        x = x + torch.relu(self.deep(x))
        tokens = x.flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return {"scores": self.head(mixed.mean(1)) + shift, "more": (mixed, x.amax((2, 3)))}


def draw() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(4, 3, 6, 6, generator=generator), "shift": torch.randn(4, 5, generator=generator)}


@functools.cache
def prune() -> nn.Module:
    torch.manual_seed(0)
    recipe = jt.Recipe(multiple=1)
    return jt.prune(Net().eval(), draw(), keep=0.5, criterion="magnitude", recipe=recipe, result="graph")


@functools.cache
def make(kind: str) -> Quantized:
    return jt.quantize(prune(), [draw()], kind=kind)


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    return jt.quantize(prune(), [draw()], exclude=["deep"], rungs=["bias"])


@pytest.fixture
def saved(quantized: Quantized, tmp_path: Path) -> Path:
    return quantized.save(tmp_path / "deep" / "saved")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_bit_equal(kind: str, tmp_path: Path) -> None:
    found = make(kind)
    check = check_quantized_round_trip(found, draw(), tmp_path)
    assert check.passed and check.detail == "3 outputs", check
    assert {p.name for p in tmp_path.iterdir()} == set(storing.FILES)
    again = jt.load_quantized(tmp_path)
    mine, theirs = found.module.state_dict(), again.module.state_dict()
    assert list(mine) == list(theirs) or set(mine) == set(theirs)
    assert all(mine[n].stride() == theirs[n].stride() and mine[n].dtype == theirs[n].dtype for n in mine)
    again.save(tmp_path / "twice")
    assert all((tmp_path / n).read_bytes() == (tmp_path / "twice" / n).read_bytes() for n in storing.FILES)


def test_bits_of_single_layers_come_back() -> None:
    found = jt.quantize(prune(), [draw()], bits={"head": (4, 8), "conv": (32, 32)})
    assert {s.layer: s.bits for s in found.sites}["head"] == 4
    assert check_quantized_round_trip(found, draw()).passed


def test_a_trained_network_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(64, 6)
    recipe = jt.Recipe(samples=32, judges=32, steps=20, learning_rate=1e-3)
    found = jt.train_quantized(model, x, weight_bits=4, recipe=recipe)
    assert check_quantized_round_trip(found, (x,)).passed


def test_sizes_come_back(quantized: Quantized, saved: Path) -> None:
    again = jt.load_quantized(saved).module
    mine = {n.name: n.meta["val"] for n in quantized.module.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    theirs = {n.name: n.meta.get("val") for n in again.graph.nodes}
    assert mine
    for name, value in mine.items():
        found = theirs[name]
        assert found is not None and found.dtype == value.dtype
        for a, b in zip(value.shape, found.shape, strict=True):
            assert isinstance(a, int) == isinstance(b, int), f"{name} is free in another dimension"
            assert isinstance(a, torch.SymInt) or a == b


@pytest.mark.slow
def test_every_kind_is_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for kind in KINDS:
        found, folder = make(kind), tmp_path / kind
        found.save(folder)
        save_file(draw(), folder / "inputs.safetensors")
        expected[kind] = torch.utils._pytree.tree_leaves(found.module(**draw()))
        jt.export(found.module, draw(), folder / "model.onnx")
    subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path)], check=True, timeout=240)
    for kind, outputs in expected.items():
        again = load_file(tmp_path / kind / "outputs.safetensors")
        assert len(again) == len(outputs)
        assert all(oracles.has_same_bits(again[str(i)], y) for i, y in enumerate(outputs)), kind
        assert (tmp_path / kind / "again.onnx").read_bytes() == (tmp_path / kind / "model.onnx").read_bytes(), kind


def test_recurrent_layers_and_attention_are_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    """Their operators are ours: a process that has quantized nothing must know them before it reads the graph."""
    torch.manual_seed(0)
    networks = {
        "lstm": (Sequences(nn.LSTM(8, 16, batch_first=True, bidirectional=True)), {}),
        "gru": (Sequences(nn.GRU(8, 256, batch_first=True)), {}),
        "attention": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), {"attention": True}),
    }
    x = torch.randn(2, 5, 8)
    for name, (network, options) in networks.items():
        found = jt.quantize(network.eval(), [(x,)], kind="dynamic", **options)
        folder = found.save(tmp_path / name)
        entry = next(n.name for n in found.module.graph.nodes if n.op == "placeholder")
        save_file({entry: x}, folder / "inputs.safetensors")
    done = subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in networks:
        outputs = load_file(tmp_path / name / "outputs.safetensors")["0"]
        again = jt.load_quantized(tmp_path / name)
        assert any("_dynamic" in str(n.target) for n in again.module.graph.nodes if "linear" not in str(n.target))
        with torch.no_grad():
            assert torch.equal(torch.utils._pytree.tree_leaves(again.module(x))[0], outputs)


class Sequences(nn.Module):
    """A recurrent layer whose states are not given back."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


def test_a_flat_graph_is_saved_too() -> None:
    model, inputs = build_model("residual")
    traced = trace_module(model, inputs)
    from jettison.quantization import quantize
    from jettison.targets.onnxruntime import scheme

    found = quantize(traced.module, [inputs], scheme=scheme(frozenset({"avx512_vnni"})))
    assert check_quantized_round_trip(found, inputs).passed


class TestPlanted:
    """The check of a reload notices what it is there for."""

    def test_one_integer(self, quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(folder: Path) -> Quantized:
            found = storing.load_quantized(folder)
            weight = found.module.get_buffer("head.weight")
            weight[0, 0] += 1 if weight[0, 0] < 0 else -1
            return found

        assert check_quantized_round_trip(quantized, draw()).passed
        monkeypatch.setattr(oracles, "load_quantized", load)
        assert not check_quantized_round_trip(quantized, draw()).passed

    def test_one_scale(self, quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
        """A scale written with six digits, as a careless printer would."""

        def load(folder: Path) -> Quantized:
            found = storing.load_quantized(folder)
            for node in found.module.graph.nodes:
                if "quantize_per_tensor" in str(node.target):
                    node.update_arg(1, float(f"{node.args[1]:.6g}"))
            found.module.recompile()
            return found

        monkeypatch.setattr(oracles, "load_quantized", load)
        assert not check_quantized_round_trip(quantized, draw()).passed

    def test_the_order_in_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Weights of a layer in groups lie transposed; as rows they are summed, and rounded, in another order."""
        torch.manual_seed(0)
        x = torch.randn(3, 301)
        found = jt.quantize(nn.Linear(301, 67).eval(), x, kind="weight-only")
        assert check_quantized_round_trip(found, (x,)).passed
        monkeypatch.setattr(store, "_lay_out", lambda tensors, strides: dict(tensors))
        assert not check_quantized_round_trip(found, (x,)).passed

    def test_another_note(self, quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(oracles, "load_quantized", lambda f: replace(storing.load_quantized(f), note="other"))
        assert not check_quantized_round_trip(quantized, draw()).passed


def _flip_a_bit(folder: Path) -> None:
    path = folder / storing.TENSORS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _cut_tensors(folder: Path) -> None:
    path = folder / storing.TENSORS
    path.write_bytes(path.read_bytes()[:-20])


def _remove_tensors(folder: Path) -> None:
    (folder / storing.TENSORS).unlink()


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / storing.HEAD).read_text())
    change(data)
    (folder / storing.HEAD).write_text(json.dumps(data))


def _change_a_scale(folder: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        node = next(n for n in data["graph"]["nodes"] if "jettison.quantize_per_tensor" in n["target"])
        node["args"][1] *= 1.001

    _edit(folder, change)


def _change_a_site(folder: Path) -> None:
    _edit(folder, lambda data: data["sites"][0].update(bits=4))


def _swap(folder: Path) -> None:
    """The tensors of another network under the same names."""
    (folder / storing.TENSORS).write_bytes((make("static").save(folder / "other") / storing.TENSORS).read_bytes())


@pytest.mark.parametrize(
    "damage", [_flip_a_bit, _cut_tensors, _change_a_scale, _change_a_site, _swap], ids=lambda f: f.__name__
)
def test_what_is_not_what_was_saved_is_refused(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=r"not what was saved.*quantize again"):
        jt.load_quantized(saved)


def test_a_missing_file(saved: Path, tmp_path: Path) -> None:
    _remove_tensors(saved)
    with pytest.raises(CheckpointError, match=r"quantized\.safetensors cannot be read.*quantize again"):
        jt.load_quantized(saved)
    with pytest.raises(CheckpointError, match=r"quantized\.json cannot be read.*Quantized\.save"):
        jt.load_quantized(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[1, 2]", "3", '{"format": "jettison.graph/1"}'])
def test_another_json(saved: Path, text: str) -> None:
    (saved / storing.HEAD).write_text(text)
    with pytest.raises(CheckpointError, match=r"cannot be read|has the format"):
        jt.load_quantized(saved)


def test_another_version(saved: Path) -> None:
    _edit(saved, lambda data: data.update(format="jettison.quantized/2", more=1))
    with pytest.raises(CheckpointError, match=r"'jettison\.quantized/2'.*reads 'jettison\.quantized/1'.*Load it with"):
        jt.load_quantized(saved)
    _edit(saved, lambda data: data.update(format="jettison.quantized/1"))
    with pytest.raises(CheckpointError, match=r"\['more'\] too many or too few.*Copy it anew"):
        jt.load_quantized(saved)


def _sign(folder: Path) -> None:
    """Write a digest that fits, as whoever forges a file would."""
    head = storing._read_head(folder / storing.HEAD)
    _edit(folder, lambda data: data.update(digest=storing._digest(head, folder / storing.TENSORS)))


@pytest.mark.parametrize("target", ["os.system.default", "jettison.no_such.default", "prims.sin.default", "eval"])
def test_a_forged_file_runs_nothing(saved: Path, target: str) -> None:
    def change(data: dict[str, Any]) -> None:
        next(n for n in data["graph"]["nodes"] if n["op"] == "call_function").update(target=target)

    _edit(saved, change)
    _sign(saved)
    with pytest.raises(CheckpointError, match="does not describe a graph"):
        jt.load_quantized(saved)


@pytest.mark.parametrize("change", [{"name": "y"}, {"dtype": "load"}, {"shape": [-1, 3]}, {"shape": [1, 3, 6, 6]}])
def test_forged_sizes(saved: Path, change: dict[str, Any]) -> None:
    _edit(saved, lambda data: data["inputs"][0].update(change))
    _sign(saved)
    with pytest.raises(CheckpointError, match="do not fit"):
        jt.load_quantized(saved)


def test_what_jettison_did_not_make_is_refused(tmp_path: Path) -> None:
    module = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(ExportError, match="Save what `quantize`"):
        Quantized(module, ()).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_network_on_integers_is_no_file_for_pytorch(tmp_path: Path) -> None:
    for kind in ("static", "dynamic", "weight-only"):
        with pytest.raises(ExportError, match="cannot be written for PyTorch itself"):
            jt.export(make(kind).module, draw(), tmp_path / "net.graph", target="eager")
