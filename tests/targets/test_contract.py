"""What every target promises, tried on each in each of its precisions with the same two networks."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.targets.networks import Heavy, Pictures, Tokens, trace_trained, write
from torch import Tensor, nn
from torch.fx import GraphModule

from jettison.core.errors import CheckpointError, ExportError, InputError, ShapeError, UnknownName
from jettison.graph.trace import Traced, trace_module
from jettison.quantization import Quantized, quantize
from jettison.targets import TARGETS, onnxruntime

pytestmark = pytest.mark.slow

FLOAT_TOLERANCE = 1e-5
"""Relative to the largest output: two float32 libraries sum in different orders."""
BF16_TOLERANCE = 0.02
"""The same for bfloat16, whose numbers are right to 2^-9: ten layers in a row, with room for unlucky signs."""
WITHIN_ONE_STEP = 0.9999
"""Share of outputs that may differ by at most one 8-bit step of the output's range (algorithms.md 4.1)."""
NO_COARSE_ACTIVATIONS = ("executorch", "litert")
"""Their converters read the type of a rounding, not its ends."""
IN_TORCH = ("eager", "inductor")
"""These run PyTorch's own operators, so that there is none they cannot express."""


NETS: dict[str, type[Pictures] | type[Tokens]] = {"pictures": Pictures, "tokens": Tokens}


@dataclass(frozen=True)
class Case:
    """A network in one precision of one target, its file, and what the file should compute."""

    target: ModuleType
    precision: str
    module: GraphModule
    layers: tuple[str, ...]
    path: Path
    x: Tensor

    def load(self, threads: int = 1) -> Any:
        return self.target.load(self.path, threads=threads, precision=self.precision)

    def run(self, x: Tensor) -> Tensor:
        found: Tensor = self.target.predict(self.load(), (x,))[0]
        return found


def find(name: str) -> ModuleType:
    target = importlib.import_module(f"jettison.targets.{name}")
    reason = target.why_missing()
    if reason is not None:
        pytest.skip(str(reason))
    return target


def list_pairs() -> list[tuple[str, str]]:
    """Return every target and precision, those of missing runtimes too: the modules import without them."""
    return [(n, p) for n in TARGETS for p in importlib.import_module(f"jettison.targets.{n}").PRECISIONS]


PAIRS = list_pairs()
INTEGER = [name for name, precision in PAIRS if precision == "int8"]


class Workshop:
    """Traces, quantizes and exports on demand, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.traced: dict[str, Traced] = {}
        self.quantized: dict[tuple[str, str], Quantized] = {}
        self.cases: dict[tuple[str, str, str], Case] = {}

    def trace(self, net: str) -> Traced:
        if net not in self.traced:
            self.traced[net] = trace_trained(NETS[net])
        return self.traced[net]

    def quantize(self, name: str, net: str) -> Quantized:
        if (name, net) not in self.quantized:
            torch.manual_seed(1)
            batches = [(torch.randn(16, *NETS[net].shape),) for _ in range(2)]
            scheme = importlib.import_module(f"jettison.targets.{name}").scheme()
            self.quantized[name, net] = quantize(self.trace(net).module, batches, scheme=scheme)
        return self.quantized[name, net]

    def case(self, name: str, precision: str, net: str) -> Case:
        key = (name, precision, net)
        if key not in self.cases:
            target = find(name)
            layers: tuple[str, ...] = ()
            module = self.trace(net).module
            if precision == "int8":
                found = self.quantize(name, net)
                module, layers = found.module, tuple(site.layer for site in found.sites)
            path = self.folder / f"{name}-{precision}-{net}{target.SUFFIX}"
            x = torch.randn(48, *NETS[net].shape, generator=torch.Generator().manual_seed(2))
            write(target, module, path, x[:2])
            self.cases[key] = Case(target, precision, module, layers, path, x)
        return self.cases[key]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield Workshop(tmp_path_factory.mktemp("targets"))
    torch.set_num_threads(before)


def share_within_a_step(wanted: Tensor, given: Tensor) -> float:
    step = (wanted.max() - wanted.min()) / 255
    return float(((wanted - given).abs() <= step).float().mean())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("name", "precision"), [pair for pair in PAIRS if pair[1] != "int8"])
def test_a_float_file_computes_what_the_graph_does(workshop: Workshop, name: str, precision: str, net: str) -> None:
    case = workshop.case(name, precision, net)
    wanted, given = case.module(case.x)[0], case.run(case.x)
    limit = FLOAT_TOLERANCE if precision == "fp32" else BF16_TOLERANCE
    error = float((given - wanted).abs().max() / wanted.abs().max())
    assert given.dtype == torch.float32 and error < limit
    if precision == "bf16":
        assert error > FLOAT_TOLERANCE  # else it is not bfloat16 at all


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", INTEGER)
def test_an_integer_file_computes_what_its_simulation_does(workshop: Workshop, name: str, net: str) -> None:
    case = workshop.case(name, "int8", net)
    assert share_within_a_step(case.module(case.x)[0], case.run(case.x)) >= WITHIN_ONE_STEP


@pytest.mark.parametrize("name", INTEGER)
def test_a_scale_that_is_off_by_one_part_in_a_hundred_is_noticed(workshop: Workshop, name: str) -> None:
    """The same comparison, with one scale of the simulation changed: it fails."""
    case = workshop.case(name, "int8", "pictures")
    scale = case.module.get_buffer("fc.weight_scale")
    kept, given = scale.clone(), case.run(case.x)
    try:
        scale.mul_(1.01)
        wanted = case.module(case.x)[0]
    finally:
        scale.copy_(kept)
    assert share_within_a_step(wanted, given) < WITHIN_ONE_STEP


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", INTEGER)
def test_every_layer_runs_on_integers(workshop: Workshop, name: str, net: str) -> None:
    case = workshop.case(name, "int8", net)
    assert case.layers and case.target.audit(case.path, case.layers) == dict.fromkeys(case.layers, True)


@pytest.mark.parametrize("name", TARGETS)
def test_no_layer_of_a_float_file_runs_on_integers(workshop: Workshop, name: str) -> None:
    case = workshop.case(name, "fp32", "pictures")
    assert case.target.audit(case.path, ["stem.0", "fc"]) == {"stem.0": False, "fc": False}


@pytest.mark.parametrize("name", INTEGER)
def test_the_audit_tells_a_layer_left_in_float(workshop: Workshop, name: str, tmp_path: Path) -> None:
    target, graph = find(name), workshop.trace("pictures").module
    mixed = quantize(graph, [(torch.randn(16, *Pictures.shape),)], scheme=target.scheme(), exclude=["one.0", "fc"])
    path = write(target, mixed.module, tmp_path / f"mixed{target.SUFFIX}", torch.randn(2, *Pictures.shape))
    assert target.audit(path, ["stem.0", "one.0", "fc", "none"]) == {
        "stem.0": True,
        "one.0": False,
        "fc": False,
        "none": False,
    }


@pytest.mark.parametrize("name", INTEGER)
def test_fewer_bits_are_computed_or_refused(workshop: Workshop, name: str, tmp_path: Path) -> None:
    """Four bits of weights everywhere; five of activations where the file keeps such a grid, else an InputError."""
    target, graph = find(name), workshop.trace("tokens").module
    x = torch.randn(48, *Tokens.shape, generator=torch.Generator().manual_seed(2))
    scheme, batches, path = target.scheme(), [(x[:16],)], tmp_path / f"coarse{target.SUFFIX}"
    few = None if name in NO_COARSE_ACTIVATIONS else 5
    found = quantize(graph, batches, scheme=scheme, weight_bits=4, activation_bits=few)
    write(target, found.module, path, x[:2])
    given = target.predict(target.load(path, threads=1, precision="int8"), (x,))[0]
    assert share_within_a_step(found.module(x)[0], given) >= WITHIN_ONE_STEP
    assert set(target.audit(path, [site.layer for site in found.sites]).values()) == {True}
    if few is None:
        for asked in ({"activation_bits": 5}, {"scheme": replace(scheme, bits={"fc1": (8, 5)})}):
            with pytest.raises(InputError, match=f"target='{name}'"):
                quantize(graph, batches, **{"scheme": scheme, **asked})  # type: ignore[arg-type]
        other = quantize(graph, batches, scheme=onnxruntime.scheme(), activation_bits=5)
        with pytest.raises(InputError, match="rounded to 0 to 31"):
            write(target, other.module, tmp_path / "other", x[:2])
        assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("name", "precision"), PAIRS)
def test_any_batch_runs_and_names_are_kept(workshop: Workshop, name: str, precision: str) -> None:
    case = workshop.case(name, precision, "pictures")
    session = case.load()
    assert session.input_names == ("pixels",) and session.output_names == ("logits",)
    whole = case.target.predict(session, (case.x,))[0]
    step = float(whole.max() - whole.min()) / 255
    # Other batches may take other kernels: float sums differ in their last bits, integers by a step where they tie.
    limit = {"fp32": FLOAT_TOLERANCE * float(whole.abs().max()), "int8": step}.get(precision, 2 * step)
    for rows in (1, 5, 17):
        part = case.target.predict(session, (case.x[:rows],))[0]
        assert part.shape == (rows, 10) and float((part - whole[:rows]).abs().max()) <= limit


@pytest.mark.parametrize("name", TARGETS)
def test_a_fixed_batch_is_fed_in_pieces_and_others_are_refused(workshop: Workshop, name: str, tmp_path: Path) -> None:
    case = workshop.case(name, "fp32", "pictures")
    path = write(case.target, case.module, tmp_path / f"fixed{case.target.SUFFIX}", case.x[:2], dynamic=False)
    session = case.target.load(path, threads=1)
    assert session.input_shapes == ((2, *Pictures.shape),)
    wanted = case.module(case.x[:6])[0]
    given = case.target.predict(session, (case.x[:6],))[0]
    assert float((given - wanted).abs().max() / wanted.abs().max()) < FLOAT_TOLERANCE
    with pytest.raises(ShapeError, match="split"):
        case.target.predict(session, (case.x[:5],))


@pytest.mark.parametrize(("name", "precision"), PAIRS)
def test_other_shapes_are_refused(workshop: Workshop, name: str, precision: str) -> None:
    case = workshop.case(name, precision, "tokens")
    session = case.load()
    with pytest.raises(ShapeError, match="pixels"):
        case.target.predict(session, (case.x[:, :5],))
    with pytest.raises(ShapeError, match="takes 1"):
        case.target.predict(session, (case.x, case.x))


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_a_checkpoint_error(workshop: Workshop, name: str, tmp_path: Path) -> None:
    case = workshop.case(name, "fp32", "tokens")
    whole = case.path.read_bytes()
    for index, data in enumerate((whole[: len(whole) // 2], whole[: len(whole) - 40], b"", b"not a network" * 99)):
        path = tmp_path / f"damaged{index}{case.target.SUFFIX}"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged"):
            case.target.load(path, threads=1)
    with pytest.raises(CheckpointError, match="nowhere"):
        case.target.load(tmp_path / f"nowhere{case.target.SUFFIX}", threads=1)


@pytest.mark.parametrize("name", TARGETS)
def test_a_precision_that_is_none_is_refused(workshop: Workshop, name: str) -> None:
    case = workshop.case(name, "fp32", "tokens")
    with pytest.raises(UnknownName, match="fp32"):
        case.target.load(case.path, threads=1, precision="fp3")


@pytest.mark.parametrize("name", TARGETS)
def test_export_leaves_the_graph_alone(workshop: Workshop, name: str, tmp_path: Path) -> None:
    target = find(name)
    module = workshop.quantize(name, "tokens").module if name in INTEGER else workshop.trace("tokens").module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    code = str(module.graph)
    path = write(target, module, tmp_path / f"one{target.SUFFIX}", torch.randn(2, *Tokens.shape))
    assert str(module.graph) == code and module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in IN_TORCH])
def test_what_a_target_cannot_say_is_an_export_error(name: str, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    traced = trace_module(Odd().eval(), (torch.zeros(2, 3),))
    with pytest.raises(ExportError):
        write(find(name), traced.module, tmp_path / "odd", torch.zeros(2, 3))
    assert not list(tmp_path.iterdir())


def read_thread_times() -> dict[str, int]:
    """Return the ticks (10 ms) each thread of this process has worked."""
    found = {}
    for path in Path("/proc/self/task").glob("*/stat"):
        fields = path.read_text().rsplit(")", 1)[1].split()
        found[path.parent.name] = int(fields[11]) + int(fields[12])
    return found


def count_working_threads(session: Any, x: torch.Tensor) -> int:
    """Run for most of a second and return how many threads did a tenth of the work or more."""
    before, end = read_thread_times(), time.perf_counter() + 0.8
    while time.perf_counter() < end:
        session.run([x.numpy()])
    worked = {key: ticks - before.get(key, 0) for key, ticks in read_thread_times().items()}
    return sum(ticks > 0.1 * sum(worked.values()) for ticks in worked.values())


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
@pytest.mark.parametrize("name", TARGETS)
def test_as_many_threads_work_as_were_asked_for(name: str, tmp_path: Path) -> None:
    target = find(name)
    x = torch.randn(1, 32, 96, 96)
    traced = trace_module(Heavy().eval(), (x,))
    path = write(target, traced.module, tmp_path / f"heavy{target.SUFFIX}", x, dynamic=False)
    outputs = []
    for threads in (1, 2, 1):
        session = target.load(path, threads=threads)
        outputs.append(torch.from_numpy(session.run([x.numpy()])[0]))
        # A busy machine may leave the second thread next to nothing for a while; too many threads it cannot hide.
        counts = [count_working_threads(session, x)]
        while counts[-1] < threads and len(counts) < 10:
            counts.append(count_working_threads(session, x))
        assert counts[-1] == threads, (threads, counts)
    assert all(torch.allclose(outputs[0], y, atol=FLOAT_TOLERANCE * float(y.abs().max())) for y in outputs)


def test_importing_targets_needs_no_runtime() -> None:
    names = ", ".join(f"jettison.targets.{name}" for name in TARGETS)
    runtimes = {"torch", "onnx", "onnxruntime", "openvino", "executorch", "ai_edge_litert", "litert_torch"}
    code = f"import sys, {names}; assert not {runtimes} & set(sys.modules), {runtimes} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", TARGETS)
def test_a_missing_runtime_is_said_with_the_command_that_mends_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = importlib.import_module(f"jettison.targets.{name}")
    if name == "eager":
        assert target.why_missing() is None
        return
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    monkeypatch.setattr("shutil.which", lambda *_: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "run `" in target.why_missing()
