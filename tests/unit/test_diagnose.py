"""Planted faults are ranked first, named rightly and mended by what is named; a sound network raises no alarm."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor, nn
from torch.fx import GraphModule

import jettison
from jettison.cli import main
from jettison.core.errors import CalibrationError, InputError, UnknownName
from jettison.distill.losses import measure_divergence
from jettison.graph.trace import trace_module
from jettison.quantization import quantize
from jettison.quantization.causes import Facts, Measure, find_causes
from jettison.quantization.convert import fold
from jettison.quantization.diagnose import Diagnosis, diagnose
from jettison.quantization.ladder import RUNGS
from jettison.quantization.ranges import HALF_BINS, RANGERS, Histogram
from jettison.quantization.switches import Switched
from jettison.report.diagnosis import print_diagnosis, render_diagnosis
from jettison.targets.integer import Levels
from jettison.targets.onnxruntime import scheme

SCHEME = scheme(frozenset({"avx512_vnni"}))
SAME = 1e-5
"""Relative: both sides compute the same float32 operators, one with BatchNorm folded."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Net(nn.Module):
    """A residual step, a gate, a concatenation and a head, whose scores differ from sample to sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.c, self.fc = nn.Conv2d(32, 8, 1), nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b(torch.relu(self.norm(self.a(x)))))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = y * gate
        z = nn.functional.max_pool2d(torch.cat([y, y + torch.relu(self.b(y))], 1), 2)
        scores: Tensor = self.fc(torch.relu(self.c(z)).flatten(1)) * 8
        return scores


class Chain(nn.Module):
    """Convolutions one after the other: whoever scales a channel up can scale it down again in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c, self.fc = nn.Conv2d(16, 8, 3, padding=1), nn.Linear(8 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        scores: Tensor = self.fc(x.flatten(1)) * 8
        return scores


def draw(samples: int = 32) -> Tensor:
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def flat(module: nn.Module) -> GraphModule:
    return trace_module(module.eval(), (draw(4),), {}).module.requires_grad_(False)


def examine(module: nn.Module, spoil: object = None, **options: object) -> Diagnosis:
    """Quantize, spoil the converted graph where asked to, and diagnose."""
    graph = flat(module)
    converted = quantize(graph, [(draw(),)], scheme=SCHEME, **options).module  # type: ignore[arg-type]
    if callable(spoil):
        spoil(converted)
    return diagnose(graph, converted, [(draw(),)], scheme=SCHEME, divergence=measure_divergence)


def plant_loud_channel(kept: bool) -> Chain:
    """One output channel of `a` is 100 times as large; `b` divides it again where the function is kept."""
    net = Chain()
    with torch.no_grad():
        net.a.weight[3] *= 100
        net.a.bias[3] *= 100  # type: ignore[index]
        if kept:
            net.b.weight[:, 3] /= 100
    return net


def names(found: Diagnosis) -> list[str]:
    return [row.tensor for row in found.tensors]


def test_a_sound_network_raises_no_alarm() -> None:
    for net in (Net(), Chain()):
        found = examine(net)
        assert found.healthy and not any(row.alarm for row in found.tensors) and "nothing to mend" in found.verdict
        assert found.samples == 32 and found.agreement is not None and found.agreement > 0.9


def test_with_all_in_float_it_is_the_float_network_and_with_none_the_quantized_one() -> None:
    graph, x = flat(Net()), draw()
    converted = quantize(graph, [(x,)], scheme=SCHEME).module
    net = Switched(fold(graph, frozenset(SCHEME.weighted)), converted)
    wanted, given = graph(x)[0], net.run(net.begin((x,)), 0, net.everything)[0]
    assert float((wanted - given).abs().max() / wanted.abs().max()) < SAME
    assert torch.equal(net.run(net.begin((x,)), 0, ())[0], converted(x)[0])
    # A tensor in float is one tensor in float: neither of the two.
    one = net.run(net.begin((x,)), 0, ("b.weight",))[0]
    assert not torch.equal(one, converted(x)[0]) and not torch.allclose(one, wanted, rtol=1e-5)


def test_starting_late_gives_what_a_whole_run_gives() -> None:
    graph, x = flat(Net()), draw()
    net = Switched(fold(graph, frozenset(SCHEME.weighted)), quantize(graph, [(x,)], scheme=SCHEME).module)
    found = diagnose(graph, net.module, [(x,)], scheme=SCHEME, divergence=measure_divergence)
    wanted = net.run(net.begin((x,)), 0, net.everything)
    whole = float(measure_divergence(net.run(net.begin((x,)), 0, ()), wanted).mean())
    assert found.loss == pytest.approx(whole, rel=1e-6)
    for row in found.tensors:
        without = float(measure_divergence(net.run(net.begin((x,)), 0, (row.tensor,)), wanted).mean())
        assert row.gain == pytest.approx(whole - without, rel=1e-5, abs=whole * 1e-6)


def test_every_weight_and_range_is_listed_once() -> None:
    found = examine(Net())
    listed = names(found)
    assert len(set(listed)) == len(listed)
    layers = ("a", "b", "b@2", "squeeze", "excite", "c", "fc")
    assert {name for name in listed if name.endswith(".weight")} == {f"{layer}.weight" for layer in layers}
    assert "input x" in listed and "a output" in listed


def test_what_shares_a_range_is_one_row() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(nn.functional.max_pool2d(torch.cat([self.a(x), self.b(x)], 1), 2))
            return y

    found = examine(Joined())
    weights = {"a.weight", "b.weight", "c.weight"}
    assert set(names(found)) - weights == {"input x", "a output", "c output"}
    row = next(row for row in found.tensors if row.tensor == "a output")
    assert row.gain > 0 and row.exclude == ("a", "c")


def test_a_loud_channel_with_the_function_kept_is_found_named_and_mended() -> None:
    found = examine(plant_loud_channel(kept=True))
    first = found.tensors[0]
    assert not found.healthy and first.tensor in ("a output", "b.weight") and first.alarm
    assert first.causes[0].name == "outlier channel" and first.causes[0].rung == "equalise"
    row = next(row for row in found.tensors if row.tensor == "a output")
    assert "channel 3" in row.causes[0].words and row.exclude == ("a", "b")
    mended = examine(plant_loud_channel(kept=True), exclude=row.exclude)
    assert mended.healthy and mended.output_db is not None and found.output_db is not None
    assert mended.output_db > found.output_db + 10
    graph, x = flat(plant_loud_channel(kept=True)), draw()
    climbed = quantize(graph, [(x,)], scheme=SCHEME, rungs=[first.causes[0].rung]).module
    wanted = graph(x)[0]
    noise = float((climbed(x)[0] - wanted).square().sum())
    assert 10 * np.log10(float((wanted - wanted.mean(0)).square().sum()) / noise) > found.output_db + 10


def test_a_loud_channel_in_weights_with_one_scale_is_found() -> None:
    """With one scale for the whole tensor, a loud output channel spoils the layer's own weights."""
    found = examine(plant_loud_channel(kept=True), weights="per_tensor")
    assert found.tensors[0].tensor in ("a.weight", "a output", "b.weight") and not found.healthy
    row = next(row for row in found.tensors if row.tensor == "a.weight")
    assert row.causes[0].name == "outlier channel" and "output channel 3" in row.causes[0].words


def test_a_tail_cut_too_late_is_found_named_and_mended() -> None:
    """One broken calibration sample stretches the range of the input; min-max believes it."""

    def span_most(histogram: Histogram, levels: Levels) -> tuple[float, float]:
        counts = histogram.counts
        assert counts is not None
        reached = torch.cumsum(counts, 0) / counts.sum()
        ends = [int(torch.searchsorted(reached, q)) - HALF_BINS for q in torch.tensor([0.001, 0.999]).double()]
        low, high = 1.5 * ends[0] * histogram.width, 1.5 * (ends[1] + 1) * histogram.width
        return max(histogram.low, min(0.0, low)), min(histogram.high, max(0.0, high))

    spoiled, clean = draw(256), draw()
    spoiled[0, 0, 0, 0] = 400.0
    graph = flat(Chain())

    def judge(ranges: object, judged: Tensor) -> Diagnosis:
        converted = quantize(graph, [(spoiled,)], scheme=SCHEME, ranges=ranges).module  # type: ignore[arg-type]
        return diagnose(graph, converted, [(judged,)], scheme=SCHEME, divergence=measure_divergence)

    found = judge("minmax", clean)
    first = found.tensors[0]
    assert (first.tensor, first.causes[0].name, first.causes[0].rung) == ("input x", "range too wide", "ranges")
    first = next(row for row in judge("minmax", spoiled).tensors if row.tensor == "input x")
    assert first.causes[0].name == "clipped tail" and 'ranges="percentile"' in first.causes[0].remedy
    mended = judge(span_most, clean)
    assert not found.healthy and found.output_db is not None and mended.output_db is not None
    assert mended.healthy and mended.output_db > found.output_db + 10


@pytest.mark.parametrize(("factor", "cause"), [(40.0, "range too wide"), (0.05, "range too narrow")])
def test_a_wrong_activation_scale_is_found(factor: float, cause: str) -> None:
    def spoil(converted: GraphModule) -> None:
        layer = next(n for n in converted.graph.nodes if n.name == "conv2d_1")
        (rounding,) = layer.users
        for node in (rounding, *rounding.users):
            node.update_arg(1, node.args[1] * factor)

    found = examine(Chain(), spoil)
    first = found.tensors[0]
    assert (first.tensor, first.causes[0].name, first.alarm) == ("b output", cause, True)
    assert first.share > 0.8 and "'b output' alone" in found.verdict


def test_a_wrong_weight_scale_is_found() -> None:
    def spoil(converted: GraphModule) -> None:
        converted.get_buffer("c.weight_scale")[4] *= 100

    found = examine(Chain(), spoil)
    first = found.tensors[0]
    assert (first.tensor, first.causes[0].name) == ("c.weight", "wrong weights")
    assert first.local_db is not None and first.local_db < 0 and sum(row.alarm for row in found.tensors) == 1


def test_two_bits_everywhere_is_said_to_be_too_few() -> None:
    found = examine(Chain(), weight_bits=2)
    assert not found.healthy
    alarmed = [row for row in found.tensors if row.alarm]
    assert alarmed and all(row.kind == "weight" for row in alarmed)
    assert any(cause.name == "too few bits" for row in alarmed for cause in row.causes)


FACTS = Facts("activation", 30.0, 2.0, 0, 0.0, 2.0, 4.0, 0.05, 0.0, 1.0, "", False, "", ("a", "b"))


@pytest.mark.parametrize(
    ("changes", "name", "rung"),
    [
        ({}, None, None),
        ({"channel_ratio": 20.0}, None, None),
        ({"channel_ratio": 21.0}, "outlier channel", "equalise"),
        ({"channel_ratio": 21.0, "linear": True}, "outlier channel", "smooth"),
        ({"tail_ratio": 4.1}, "clipped tail", "ranges"),
        ({"kurtosis": 51.0}, "clipped tail", "ranges"),
        ({"mean_share": 0.31}, "shifted mean", "bias"),
        ({"gate": "hardsigmoid"}, "sensitive gate", "exclude"),
        ({"local_db": 14.0}, "too few bits", "exclude"),
        ({"local_db": 14.0, "kind": "weight"}, "too few bits", "reconstruct"),
        ({"local_db": 14.0, "mean_share": 0.9}, "shifted mean", "bias"),
        ({"local_db": -3.0, "mean_share": 0.4}, "too few bits", "exclude"),
        ({"clipped_share": 0.011}, "range too narrow", "ranges"),
        ({"range_ratio": 4.1}, "range too wide", "ranges"),
    ],
)
def test_rules(changes: dict[str, object], name: str | None, rung: str | None) -> None:
    causes = find_causes(replace(FACTS, **changes))  # type: ignore[arg-type]
    assert {cause.rung for cause in causes} <= {*RUNGS, "ranges", "exclude"}
    assert "percentile" in RANGERS and "mse" in RANGERS
    assert (causes[0].name, causes[0].rung) == (name, rung) if name else not causes


def test_measures_on_numbers_known_beforehand() -> None:
    measure = Measure()
    values = torch.ones(4, 8, 100) * torch.tensor([1.0] * 7 + [50.0])[None, :, None]
    measure.add_values(values, 1, (-2.0, 2.0))
    assert measure.find_loud_channel() == (50.0, 7) and measure.clipped == 400
    offset = Measure()
    noise = torch.randn(8, 4, 1000) * 0.1
    offset.add_error(torch.zeros(8, 4, 1000), noise + 0.1, 1)
    assert offset.find_mean_share() == pytest.approx(0.5, abs=0.02)
    tail = Measure()
    tail.add_values(torch.cat([torch.ones(9999), torch.tensor([7.0])])[None], 1)
    assert tail.find_tail()[0] == pytest.approx(7.0)
    assert Measure().find_tail() == (1.0, 0.0) and Measure().find_loud_channel() == (1.0, 0)


def test_a_gate_is_recognised() -> None:
    rows = {row.tensor: [c.name for c in row.causes] for row in examine(Net()).tensors}
    assert "sensitive gate" in rows["excite output"] and "sensitive gate" in rows["excite.weight"]
    assert "sensitive gate" not in rows["c output"] and "sensitive gate" not in rows["squeeze output"]


def test_the_public_function_prints_itself_and_leaves_the_network_alone() -> None:
    net = plant_loud_channel(kept=True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = jettison.diagnose(net, draw(64))
    text = str(found)
    assert "a output" in text and 'rung "equalise"' in text and "exclude=['a', 'b']" in text
    assert max(map(len, text.splitlines())) <= 110
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    again = jettison.diagnose(net, draw(64))
    assert again == found


def test_narrow_terminals_and_the_page_show_the_same() -> None:
    found = examine(plant_loud_channel(kept=True))
    stream = io.StringIO()
    print_diagnosis(found, Console(file=stream, width=50, color_system=None))
    assert max(map(len, stream.getvalue().splitlines())) <= 60 and "a output" in stream.getvalue()
    page = render_diagnosis(found, "<b>net</b>")
    assert "&lt;b&gt;net" in page and "<b>net" not in page and "outlier channel: channel 3" in page
    assert page.count("<tr") == len(found.tensors) + 1


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "diagnosed.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))\n"
    )
    np.savez(tmp_path / "x.npz", x=draw().numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = ["diagnose", "diagnosed:build", "--calibration", "x.npz", "--html", "page.html"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 0, done.output
    assert "nothing to mend" in done.output and "3.weight" in done.output and "page.html" in done.output
    assert "All tensors" in (tmp_path / "page.html").read_text()
    plain = json.loads(CliRunner().invoke(main, [*given, "--json"]).stdout)
    assert plain["healthy"] is True and {row["tensor"] for row in plain["tensors"]} >= {"0.weight", "3.weight"}


def test_bad_questions() -> None:
    graph = flat(Chain())
    converted = quantize(graph, [(draw(),)], scheme=SCHEME).module
    with pytest.raises(CalibrationError, match="no inputs to diagnose"):
        diagnose(graph, converted, [], scheme=SCHEME, divergence=measure_divergence)
    with pytest.raises(InputError, match="two forms of one network"):
        diagnose(flat(Net()), converted, [(draw(),)], scheme=SCHEME, divergence=measure_divergence)
    with pytest.raises(UnknownName):
        jettison.diagnose(Chain(), draw(), exclude=["aa"])
    with pytest.raises(InputError, match="judged=0"):
        jettison.diagnose(Chain(), draw(), judged=0)
