"""`choose_target`: everything is measured together, the limits decide, and no slower file is recommended in silence."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jettison as jt
from jettison.cli import main
from jettison.core.errors import CalibrationError, ExportError, InputError, TargetMissing, UnknownName
from jettison.flow import choosing
from jettison.targets import TARGETS, onnxruntime, openvino
from jettison.targets.timing import Timing, compare_samples

pytestmark = pytest.mark.skipif(onnxruntime.why_missing() is not None, reason=str(onnxruntime.why_missing()))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 1, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))
        return logits


class Fake:
    """A target of which speed and precision are known: a call takes `ms` milliseconds and adds `noise`."""

    def __init__(self, name: str, ms: dict[str, float], noise: dict[str, float] | None = None) -> None:
        self.__name__ = f"jettison.targets.{name}"
        self.ms, self.noise, self.module = ms, noise or {}, None
        self.LABEL, self.SUFFIX, self.PRECISIONS = name, ".fake", tuple(ms)

    def why_missing(self) -> str | None:
        return None

    def scheme(self) -> Any:
        return onnxruntime.scheme(frozenset({"avx512_vnni"}))

    def export(self, module: Any, inputs: Any, path: Path, **_: Any) -> None:
        self.module = self.module or module
        path.write_bytes(b"0" * 1000)

    def load(self, path: Path, *, threads: int, precision: str = "fp32") -> Any:
        return Session(self, precision)

    def predict(self, session: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self.module is not None
        (y,) = self.module(*inputs)
        return (y + self.noise.get(session.precision, 0.0) * torch.randn(y.shape),)


class Session:
    def __init__(self, target: Fake, precision: str) -> None:
        self.target, self.precision = target, precision

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(arrays)


@pytest.fixture
def model() -> nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Net().eval()


def inputs(count: int = 60) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def install(monkeypatch: pytest.MonkeyPatch, *fakes: Fake) -> tuple[str, ...]:
    for fake in fakes:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)  # type: ignore[arg-type]
    names = tuple(fake.LABEL for fake in fakes)
    # What the clock would say on a quiet machine, so that a busy one decides nothing here.
    monkeypatch.setattr(choosing, "time_interleaved", tell_times)
    monkeypatch.setattr(choosing, "TARGETS", (*TARGETS, *names))
    return names


def tell_times(loads: Mapping[str, Any], *, baseline: str, rounds: int, seed: int) -> dict[str, Timing]:
    sessions = {name: load().func.__self__ for name, load in loads.items()}
    samples = {
        name: [s.target.ms[s.precision] * (1 + i % 2 / 50) for i in range(rounds)] for name, s in sessions.items()
    }
    return compare_samples(samples, baseline=baseline, seed=seed)


def choose(model: nn.Module, targets: Sequence[str], **settings: Any) -> Any:
    return jt.choose_target(model, inputs(), targets=targets, rounds=5, **settings)


@pytest.mark.slow
def test_real_targets_are_measured_together_on_held_out_inputs(model: nn.Module, tmp_path: Path) -> None:
    targets = ["onnxruntime", *(["openvino"] if openvino.why_missing() is None else [])]
    found = choose(model, targets, out=tmp_path)
    names = {option.name for option in found.options} | set(found.failed)
    assert names == {f"{t.__name__.rpartition('.')[2]} {p}" for t in (onnxruntime, openvino) for p in t.PRECISIONS}
    assert found.baseline == "onnxruntime fp32" and 0 < found.samples < 30
    assert found.find("onnxruntime fp32").speedup.value == 1.0 and found.find("onnxruntime fp32").sqnr_db > 80
    assert 20 < found.find("onnxruntime int8").sqnr_db < 60
    assert found.find("onnxruntime int8").size_bytes < found.find("onnxruntime fp32").size_bytes
    # The same file serves both runtimes where their arithmetic is the same.
    assert found.find("openvino fp32").file == found.find("onnxruntime fp32").file
    assert [o.speedup.value for o in found.options] == sorted((o.speedup.value for o in found.options), reverse=True)
    text = str(found)
    assert all(name in text for name in names) and f"Recommended: {found.recommended.name}" in text


def test_the_fastest_that_keeps_the_limits_is_recommended(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = Fake("noisy", {"fp32": 2.0, "bf16": 0.5, "int8": 1.0}, {"bf16": 100.0})
    found = choose(model, install(monkeypatch, noisy))
    assert not found.find("noisy bf16").good and "min_agreement" in found.find("noisy bf16").notes[0]
    assert found.recommended.name == "noisy int8" and "noisy bf16" in found.reason
    assert found.find("noisy int8").speedup.value == pytest.approx(2.0)
    assert found.baseline == "noisy fp32" and "* noisy int8" in str(found)


def test_of_equally_fast_ones_the_most_exact_is_recommended(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    found = choose(model, install(monkeypatch, Fake("even", {"int8": 1.0, "bf16": 1.0, "fp32": 1.0})))
    assert found.recommended.name == "even fp32"


def test_int8_that_is_slower_than_float_is_said(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    found = choose(model, install(monkeypatch, Fake("slow", {"fp32": 0.5, "int8": 1.5})))
    option = found.find("slow int8")
    assert option.over_float is not None and option.over_float.high < 1
    assert any("slower than slow fp32" in note for note in option.notes) and "slower than slow fp32" in str(found)
    assert found.recommended.name == "slow fp32"


def test_a_slower_int8_is_recommended_only_with_a_warning(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Fake("odd", {"fp32": 0.5, "int8": 1.5}, {"fp32": 100.0})
    found = choose(model, install(monkeypatch, odd))
    assert found.recommended.name == "odd int8" and "slower than a float form" in found.reason


def test_nothing_good_gives_the_nearest_and_says_so(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Fake("bad", {"fp32": 1.0, "bf16": 0.5}, {"fp32": 50.0, "bf16": 100.0})
    found = choose(model, install(monkeypatch, bad))
    assert found.recommended.name == "bad fp32" and "No option keeps" in found.reason


def test_missing_and_failing_targets_are_lines_of_the_table(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(Fake):
        def why_missing(self) -> str | None:
            return "away is not installed: run `pip install away`."

    class Broken(Fake):
        def export(self, module: Any, inputs: Any, path: Path, **_: Any) -> None:
            raise ExportError("The operator aten.odd cannot be written.")

    class Crashing(Fake):
        def load(self, path: Path, *, threads: int, precision: str = "fp32") -> Any:
            raise RuntimeError("segment 7\nmore")

    times = {"fp32": 1.0}
    fakes = Fake("sound", times), Away("away", times), Broken("broken", times), Crashing("crashing", times)
    found = choose(model, install(monkeypatch, *fakes))
    assert [o.name for o in found.options] == ["sound fp32"] and "pip install away" in found.missing["away"]
    assert found.failed == {
        "broken fp32": "The operator aten.odd cannot be written.",
        "crashing fp32": "RuntimeError: segment 7",
    }
    assert "pip install away" in str(found) and "aten.odd" in str(found)
    with pytest.raises(TargetMissing, match="pip install away"):
        choose(model, ["away", "broken"])


def test_evaluate_decides_where_it_is_given(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs()
    labels = model(x).argmax(1)
    noisy = Fake("noisy", {"fp32": 1.5, "bf16": 0.5}, {"bf16": 100.0})
    names = install(monkeypatch, noisy)
    found = choose(model, names, evaluate=jt.accuracy([(x, labels)]), max_drop=1.0)
    lost = found.find("noisy bf16").drop_points
    assert lost is not None and lost > 20 and found.find("noisy fp32").drop_points == 0.0
    assert found.recommended.name == "noisy fp32" and "max_drop" in str(found)
    assert choose(model, names, evaluate=jt.accuracy([(x, labels)]), max_drop=100.0).recommended.name == "noisy bf16"


def test_outputs_that_are_no_class_scores_are_judged_by_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    single = (torch.zeros(4, 1),)
    assert choosing._compare([single], [single])[0] is None
    value = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).eval()
    found = choose(value, install(monkeypatch, Fake("noisy", {"fp32": 1.0, "bf16": 0.5}, {"bf16": 100.0})))
    assert found.recommended.name == "noisy fp32"


def test_signal_to_noise() -> None:
    wanted, found = (torch.tensor([[3.0, 4.0]]),), (torch.tensor([[3.0, 4.5]]),)
    share, ratio = choosing._compare([wanted], [found])
    assert share == 1.0 and ratio == pytest.approx(10 * math.log10(25 / 0.25))
    assert choosing._compare([wanted], [wanted])[1] == math.inf
    assert choosing._compare([wanted], [(torch.tensor([[4.0, math.nan]]),)])[1] == -math.inf


def test_bad_questions(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="onnxruntime"):
        choose(model, ["onnxruntim"])
    with pytest.raises(InputError, match="threads"):
        choose(model, ["onnxruntime"], threads=0)
    with pytest.raises(CalibrationError, match="sealed"):
        jt.choose_target(model, inputs(1), targets=["onnxruntime"])
    for ask in (
        lambda: jt.quantize(model, inputs(), target="auto"),
        lambda: jt.export(model, inputs(1), tmp_path / "x.onnx", target="auto"),
        lambda: jt.measure({"a": tmp_path / "x.onnx"}, inputs(1), target="auto"),
    ):
        with pytest.raises(InputError, match=r"jettison\.choose_target"):
            ask()


def fake_choice(monkeypatch: pytest.MonkeyPatch, *fakes: Fake) -> None:
    """Let "auto" choose among these alone."""
    real, names = choosing.choose_target, install(monkeypatch, *fakes)
    monkeypatch.setattr(choosing, "choose_target", lambda *a, **k: real(*a, targets=names, rounds=3, **k))


def test_auto_settles_on_the_fastest_that_will_be_deployed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float is compared with float and int8 with int8, whatever else is faster."""
    fake_choice(monkeypatch, Fake("half", {"fp32": 1.0, "int8": 3.0}), Fake("whole", {"fp32": 2.0, "int8": 1.0}))
    settle = partial(choosing.settle_target, "auto", model, inputs(), threads=1, seed=0)
    assert (settle(quantize=True), settle(quantize=False)) == ("whole", "half")
    assert choosing.settle_target("onnxruntime", model, inputs(), quantize=True, threads=1, seed=0) == "onnxruntime"


def test_auto_says_that_nothing_fits(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_choice(monkeypatch, Fake("quick", {"fp32": 0.1}))
    with pytest.raises(InputError, match=r"(?s)quick fp32.*quantize=False"):
        jt.compress(model, inputs(), budget=jt.Budget(macs=0.5), target="auto", quiet=True)


def test_the_callers_model_is_left_alone(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choose(model, install(monkeypatch, Fake("one", {"fp32": 0.1, "int8": 0.1})))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(sys.modules["jettison.targets.onnxruntime"], ModuleType)


def test_the_command_prints_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "small_net.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    np.savez(tmp_path / "x.npz", x=inputs().numpy())
    names = install(monkeypatch, Fake("quick", {"fp32": 1.0, "int8": 0.5}))
    monkeypatch.setattr(jt, "choose_target", lambda *a, **k: choosing.choose_target(*a, targets=names, **k))
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as done:
            main.main(["targets", "small_net:build", "--inputs", str(tmp_path / "x.npz"), *more])
        assert done.value.code == 0
    text, _, plain = capsys.readouterr().out.partition("\n{")
    assert "Recommended: quick int8" in text and json.loads("{" + plain)["recommended"]["target"] == "quick"
