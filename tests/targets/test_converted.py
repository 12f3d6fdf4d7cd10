"""Rewrites before an export keep the function; the file of PyTorch's own targets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.targets.networks import Pictures, trace_trained, write
from torch.fx import GraphModule

from jettison.core.errors import CheckpointError, ExportError, InputError
from jettison.quantization import quantize
from jettison.targets import eager, executorch, graph_file, inductor, onnxruntime
from jettison.targets.converted import (
    copy_flat,
    cut_before_rounding,
    find_coarse,
    fingerprint,
    list_fingerprints,
    refuse_coarse,
    spell_for_pt2e,
    spell_in_bf16,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    return trace_trained(Pictures).module.requires_grad_(False)


@pytest.fixture(scope="module")
def converted(graph: GraphModule) -> GraphModule:
    return quantize(graph, [(torch.randn(16, *Pictures.shape),)], scheme=executorch.scheme()).module


def operators(module: GraphModule) -> set[str]:
    return {str(node.target) for node in module.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("pairs", [False, True])
def test_spelling_for_pt2e_keeps_every_number(converted: GraphModule, pairs: bool) -> None:
    x = torch.randn(8, *Pictures.shape)
    spelled = spell_for_pt2e(converted, weights_as_pairs=pairs)
    # PT2E's rounding multiplies with a reciprocal, which may fall to the other side of a tie once in a million.
    wanted, given = converted(x)[0], spelled(x)[0]
    step = float(wanted.max() - wanted.min()) / 255
    assert float(((given - wanted).abs() > 0.01 * step).float().mean()) < 0.05
    found = operators(spelled)
    assert not any("jettison" in name or "flatten" in name for name in found)
    assert ("quantized_decomposed.quantize_per_channel.default" in found) == pairs
    assert spelled.get_buffer("fc.bias").dtype == torch.float32
    assert spelled.get_buffer("fc.weight").dtype == (torch.float32 if pairs else torch.int8)
    assert converted.get_buffer("fc.bias").dtype == torch.int32  # the caller's own is as it was


def test_biases_and_weights_come_back_as_the_same_integers(converted: GraphModule) -> None:
    spelled = spell_for_pt2e(converted, weights_as_pairs=True)
    for name in ("fc", "stem.0", "two.3"):
        for kind in ("weight", "bias"):
            scale = converted.get_buffer(f"{name}.{kind}_scale").double()
            stored = converted.get_buffer(f"{name}.{kind}")
            spread = scale.view(-1, *[1] * (stored.ndim - 1))
            assert torch.equal((spelled.get_buffer(f"{name}.{kind}").double() / spread).round().long(), stored.long())


def test_a_fingerprint_outlives_every_order_and_nothing_else(converted: GraphModule) -> None:
    prints = list_fingerprints(converted)
    weight = converted.get_buffer("one.0.weight").numpy()
    assert len(set(prints.values())) == len(prints) == 8
    assert prints["one.0"] == fingerprint(weight.T.copy()) == fingerprint(weight[::-1].copy())
    changed = weight.copy()
    changed.reshape(-1)[0] ^= 1
    assert fingerprint(changed) != prints["one.0"]


def test_bf16_reads_bfloat16_where_there_are_weights(graph: GraphModule) -> None:
    halved = spell_in_bf16(graph)
    kinds = {name: value.dtype for name, value in (*halved.named_parameters(), *halved.named_buffers())}
    assert kinds["fc.weight"] == kinds["stem.0.weight"] == torch.bfloat16
    assert kinds["stem.1.weight"] == kinds["stem.1.running_var"] == torch.float32
    assert torch.bfloat16 not in {b.dtype for b in copy_flat(graph).buffers()}
    x = torch.randn(4, *Pictures.shape)
    error = float((halved(x)[0].float() - graph(x)[0]).abs().max() / graph(x)[0].abs().max())
    assert 1e-5 < error < 0.02


def test_the_same_network_gives_the_same_bytes(graph: GraphModule, tmp_path: Path) -> None:
    x = torch.zeros(2, *Pictures.shape)
    paths = [write(eager, graph, tmp_path / f"{i}.graph", x) for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    found = graph_file.open_graph(paths[0])
    assert found.input_shapes == ((None, *Pictures.shape),) and found.output_names == ("logits",)


def test_integers_are_no_matter_of_pytorch_operator_by_operator(converted: GraphModule, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="integers"):
        write(eager, converted, tmp_path / "int8.graph", torch.zeros(2, *Pictures.shape))
    assert not list(tmp_path.iterdir())
    path = write(inductor, converted, tmp_path / "int8.graph", torch.zeros(2, *Pictures.shape))
    with pytest.raises(CheckpointError, match="target='inductor'"):
        eager.load(path, threads=1)


@pytest.fixture(scope="module")
def coarse(graph: GraphModule) -> GraphModule:
    torch.manual_seed(1)
    batches = [(torch.randn(16, *Pictures.shape),)]
    return quantize(graph, batches, scheme=onnxruntime.scheme(), activation_bits=5).module


def test_a_coarse_grid_is_cut_by_a_clamp(coarse: GraphModule, converted: GraphModule) -> None:
    assert not find_coarse(converted) and len(find_coarse(coarse)) > 8
    x = torch.randn(8, *Pictures.shape)
    cut = spell_for_pt2e(coarse, weights_as_pairs=False)
    whole = spell_for_pt2e(coarse, weights_as_pairs=False)
    cut_before_rounding(cut)
    for node in find_coarse(whole):
        node.args = (*node.args[:3], 0, 255, torch.uint8)
    whole.recompile()
    assert not find_coarse(cut) and torch.equal(cut(x)[0], coarse(x)[0])
    assert not torch.equal(whole(x)[0], coarse(x)[0])  # what a converter computes that reads types only


def test_a_coarse_grid_is_refused_by_name(coarse: GraphModule, converted: GraphModule) -> None:
    refuse_coarse(converted, "a runtime")
    with pytest.raises(InputError, match=r"rounded to 0 to 31, first .* A file for a runtime"):
        refuse_coarse(coarse, "a runtime")


def test_other_zip_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(CheckpointError, match="other"):
        eager.load(tmp_path / "other.npz", threads=1)


@pytest.mark.slow
@pytest.mark.skipif(inductor.why_missing() is not None, reason=str(inductor.why_missing()))
def test_the_compiler_gets_the_weights_as_constants(
    graph: GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are folded and packed then; as inputs, which they are without it, they would be packed at each run."""
    from torch._inductor import freezing

    given: list[int] = []

    def watch(traced: GraphModule, whole: GraphModule, inputs: list[torch.Tensor]) -> object:
        found = freeze(traced, whole, inputs)
        given.append(len(found[1]))
        return found

    freeze = freezing.freeze
    monkeypatch.setattr(freezing, "freeze", watch)
    path = write(inductor, graph, tmp_path / "net.graph", torch.zeros(2, *Pictures.shape))
    inductor.load(path, threads=1).run([np.zeros((2, *Pictures.shape), np.float32)])
    assert given == [1]  # the pictures


@pytest.mark.slow
@pytest.mark.skipif(inductor.why_missing() is not None, reason=str(inductor.why_missing()))
def test_integers_are_compiled_for_so_many_shapes_and_no_more(
    coarse: GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "SHAPES", 1)
    path = write(inductor, coarse, tmp_path / "net.graph", torch.zeros(2, *Pictures.shape))
    session = inductor.load(path, threads=1)
    for _ in range(2):
        session.run([np.zeros((2, *Pictures.shape), np.float32)])
    with pytest.raises(InputError, match="compiled for 1 shapes"):
        session.run([np.zeros((3, *Pictures.shape), np.float32)])


def test_running_gives_back_the_threads_it_took(graph: GraphModule, tmp_path: Path) -> None:
    path = write(eager, graph, tmp_path / "net.graph", torch.zeros(2, *Pictures.shape))
    session = eager.load(path, threads=2)
    session.run([np.zeros((1, *Pictures.shape), np.float32)])
    assert torch.get_num_threads() == 1


def test_the_profile_of_eager_names_layers(graph: GraphModule, tmp_path: Path) -> None:
    path = write(eager, graph, tmp_path / "net.graph", torch.zeros(2, *Pictures.shape))
    shares = eager.profile(path, [np.zeros((1, *Pictures.shape), np.float32)], threads=1, runs=3)
    assert {"stem.0", "two.3", "fc"} <= {s.name for s in shares} and all(s.ms > 0 for s in shares)
    with pytest.raises(InputError, match="one piece"):
        inductor.profile(path, [], threads=1)


def test_a_float_graph_is_read_in_a_process_that_has_quantized_nothing() -> None:
    """PT2E's operators are not there yet."""
    code = (
        "import torch\nfrom torch import nn\nfrom jettison.graph.trace import trace_module\n"
        "from jettison.targets.converted import find_coarse\n"
        "print(find_coarse(trace_module(nn.Linear(3, 2).eval(), (torch.zeros(2, 3),)).module))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr
