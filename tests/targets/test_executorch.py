"""What is ExecuTorch's own: one thread pool for all, batches in pieces, kernels named by its profile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.targets.networks import Pictures, trace_trained, write
from torch import Tensor, nn
from torch.fx import GraphModule

from jettison.core.errors import CheckpointError, ExportError
from jettison.graph.trace import trace_module
from jettison.quantization import quantize
from jettison.targets import executorch as target

pytestmark = [pytest.mark.slow, pytest.mark.skipif(target.why_missing() is not None, reason=str(target.why_missing()))]


@dataclass(frozen=True)
class Made:
    module: GraphModule
    layers: list[str]
    path: Path
    x: Tensor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        traced = trace_trained(Pictures)
        x = torch.randn(40, *Pictures.shape)
        found = quantize(traced.module, [(x,)], scheme=target.scheme())
        path = write(target, found.module, tmp_path_factory.mktemp("files") / "int8.pte", x)
        yield Made(found.module, [site.layer for site in found.sites], path, x)
    torch.set_num_threads(before)


def test_sessions_with_other_numbers_of_threads_take_turns(made: Made) -> None:
    """The pool under a network that was loaded for one thread is replaced, and it is loaded anew before it runs."""
    one, two = target.load(made.path, threads=1), target.load(made.path, threads=2)
    wanted = one.run([made.x[:3].numpy()])[0]
    for session in (two, one, two, one):
        assert (session.run([made.x[:3].numpy()])[0] == wanted).all()
        assert target._import_runtime()._threadpool_get_thread_count() == session.threads


def test_large_batches_run_in_pieces(made: Made) -> None:
    session = target.load(made.path, threads=1)
    assert session.input_shapes == ((None, *Pictures.shape),) and len(made.x) > 2 * target.MOST
    ones = torch.cat([target.predict(session, (row,))[0] for row in made.x.split(1)])
    assert torch.equal(target.predict(session, (made.x,))[0], ones)


def test_profile_names_layers_and_integer_kernels(made: Made) -> None:
    x = [made.x[:1].numpy()]
    operators = target.list_operators(made.path, x, threads=1, runs=10)
    named = {o.name: o for o in operators if o.covers}
    assert sorted(named) == sorted(made.layers)
    assert all(o.precision == "int8" and "QC8" in o.kernel and o.ms is not None for o in named.values())
    shares = target.profile(made.path, x, threads=1, runs=10)
    assert [s.ms for s in shares] == sorted((s.ms for s in shares), reverse=True)


def test_no_rounding_stands_alone_inside(made: Made) -> None:
    operators = target.list_operators(made.path, None, threads=1)
    assert [o.precision for o in operators].count("rounding") == 2  # of the input and of the output
    assert not any(o.alone for o in operators)


def test_layout_changes_at_the_ends_only(made: Made) -> None:
    kinds = [o.kernel.split()[0] for o in target.list_operators(made.path, None, threads=1)]
    inner = kinds[kinds.index("XNNConv2d") : len(kinds) - kinds[::-1].index("XNNGlobalAvgPooling2d")]
    assert "XNNStaticTranspose" not in inner


def test_a_file_from_elsewhere_is_refused(tmp_path: Path) -> None:
    from executorch.exir import to_edge

    program = to_edge(torch.export.export(nn.ReLU(), (torch.zeros(2),))).to_executorch()
    (tmp_path / "foreign.pte").write_bytes(program.buffer)
    with pytest.raises(CheckpointError, match="jettison has written"):
        target.load(tmp_path / "foreign.pte", threads=1)


def test_a_batch_that_tracing_would_fix_is_refused(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, -1)

    traced = trace_module(Fixed().eval(), (torch.zeros(4, 6),))
    with pytest.raises(ExportError):
        write(target, traced.module, tmp_path / "fixed.pte", torch.zeros(4, 6))
    assert not list(tmp_path.iterdir())


def test_peak_memory_grows_with_the_network(tmp_path: Path) -> None:
    x = torch.zeros(1, 512)
    grown = []
    for width in (64, 8192):
        traced = trace_module(nn.Sequential(nn.Linear(512, width), nn.ReLU(), nn.Linear(width, 4)).eval(), (x,))
        path = write(target, traced.module, tmp_path / f"{width}.pte", x, dynamic=False)
        grown.append(target.measure_peak_memory(path, threads=1))
    assert grown[1] - grown[0] > 512 * (8192 - 64) * 4 * 0.8  # most of the 17 MB of weights
