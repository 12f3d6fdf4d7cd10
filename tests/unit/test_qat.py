"""Learned step sizes against their formulas and finite differences, the round trip to the converted graph, resuming."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from jettison.core.errors import CheckpointError
from jettison.distill.train import Schedule, distil
from jettison.graph.trace import Batch, trace_module
from jettison.quantization import lsq, quantize
from jettison.quantization.bits import find_ends, find_tensor_levels, read_levels
from jettison.quantization.fold import find_layers, read_attribute
from jettison.quantization.integers import run_integers
from jettison.quantization.oscillation import LAST_LIMIT, count_frozen, damp_oscillations, follow, freeze
from jettison.quantization.qat import (
    convert_trained,
    group_roundings,
    list_spots,
    list_undecayed,
    make_trainable,
    read_integers,
)
from jettison.targets.integer import Levels, fake_quantize
from jettison.targets.onnxruntime import scheme

SCHEME = scheme(frozenset({"avx512_vnni"}))
ROUNDING = 1e-5
"""Relative; float32 sums of a few hundred terms."""
SMOOTH = 2e-3
"""Relative; a central difference in float32 of a function that is linear between two roundings."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Net(nn.Module):
    """A stem, a residual step, a concatenation with a moved tensor, a mean over the picture and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.side, self.after = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 8, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(x + self.bn2(self.deep(x)))
        z = torch.cat([y, self.side(y)], 1)
        y = torch.relu(self.after(self.pool(z))).mean((2, 3))
        logits: Tensor = self.head(y)
        return logits


def make_net() -> Net:
    torch.manual_seed(1)
    net = Net()
    with torch.no_grad():
        for _ in range(5):
            net(2 * torch.randn(16, 3, 8, 8) + 0.5)
        net.head.weight.mul_(8)  # so that the classes differ
    return net.eval()


def make_batches(count: int = 4, size: int = 16) -> list[Batch]:
    draw = torch.Generator().manual_seed(7)
    return [(torch.randn(size, 3, 8, 8, generator=draw),) for _ in range(count)]


def iterate(epoch: int) -> Iterator[Batch]:
    draw = torch.Generator().manual_seed(100 + epoch)
    for _ in range(4):
        yield (torch.randn(16, 3, 8, 8, generator=draw),)


@pytest.fixture(scope="module")
def flat() -> GraphModule:
    return trace_module(make_net(), make_batches()[0]).module


INNER = {"deep": (4, 4), "side": (3, 4), "after": (4, 3)}


@pytest.fixture(scope="module")
def cases(flat: GraphModule) -> tuple[GraphModule, GraphModule]:
    """The float graph and its converted form with few bits inside."""
    return flat, quantize(flat, make_batches(), scheme=replace(SCHEME, bits=INNER)).module


# --- gradients -------------------------------------------------------------------------------------------------------


def give_gradients(x: list[float], step: float, low: int, high: int, offset: float | None = None) -> list[list[float]]:
    """Return the gradients of the sum for x, step and offset, one number at a time for the latter two."""
    rows = []
    for value in x:
        one, s = torch.tensor([value], requires_grad=True), torch.tensor([step], requires_grad=True)
        o = None if offset is None else torch.tensor([offset], requires_grad=True)
        lsq.round_learned(one, s, low, high, offset=o).sum().backward()
        assert one.grad is not None and s.grad is not None
        rows.append([float(one.grad), float(s.grad), *([] if o is None or o.grad is None else [float(o.grad)])])
    return rows


def test_the_step_gradient_is_the_formula_inside_outside_and_at_the_ends() -> None:
    """round(x/s) - x/s inside; q_min and q_max outside and, as in the paper's strict inequalities, at the ends."""
    step, low, high = 0.5, -4, 3
    inside = [-1.9, -0.7, 0.0, 0.2, 0.26, 1.45]
    for x, (to_x, to_step) in zip(inside, give_gradients(inside, step, low, high), strict=True):
        assert to_x == 1 and to_step == pytest.approx(round(x / step) - x / step, abs=1e-6)
    for x, slope in ((-2.0, -4), (-2.1, -4), (-50.0, -4), (1.5, 3), (1.6, 3), (50.0, 3)):
        assert give_gradients([x], step, low, high) == [[0.0, float(slope)]]


def test_the_offset_gradient_is_one_outside_only() -> None:
    """LSQ+: with zero point 2, the ends are at -2 s and 5 s; the step's slope outside is still q_min or q_max."""
    step, offset = 0.5, -1.0
    inside = give_gradients([0.3, -0.9, 2.4], step, 0, 7, offset)
    for x, (to_x, to_step, to_offset) in zip([0.3, -0.9, 2.4], inside, strict=True):
        assert (to_x, to_offset) == (1, 0) and to_step == pytest.approx(round(x / step) - x / step, abs=1e-6)
    assert give_gradients([-1.0, -3.0, 2.5, 9.0], step, 0, 7, offset) == [[0, 0, 1], [0, 0, 1], [0, 7, 1], [0, 7, 1]]


def difference(x: Tensor, step: float, low: int, high: int, weights: Tensor) -> float:
    """Return the central difference by the step of what LSQ differentiates: the rounding's remainder held constant."""
    remainder = torch.round(x / step) - x / step

    def smooth(s: float) -> Tensor:
        v = x.double() / s
        held = (torch.clamp(v, low, high) + torch.where((v > low) & (v < high), remainder, 0.0)) * s
        return (held * weights.double()).sum()

    h = 1e-6
    return float((smooth(step + h) - smooth(step - h)) / (2 * h))


def give_step_gradient(x: Tensor, step: float, low: int, high: int, weights: Tensor) -> float:
    s = torch.tensor([step], requires_grad=True)
    (lsq.round_learned(x, s, low, high) * weights).sum().backward()
    assert s.grad is not None
    return float(s.grad)


def test_the_step_gradient_is_the_finite_difference_of_the_smooth_part() -> None:
    x, weights = torch.randn(400), torch.randn(400)
    for low, high in ((-7, 7), (0, 15), (-1, 1)):
        found = give_step_gradient(x, 0.11, low, high, weights)
        assert found == pytest.approx(difference(x, 0.11, low, high, weights), rel=SMOOTH, abs=1e-3)


@pytest.mark.parametrize("mistake", ["sign", "ends", "clamp"])
def test_planted_mistakes_in_the_gradient_are_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.ops.aten.hardtanh_backward

    def wrong(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
        if mistake == "sign":
            return -right(grad, x, low, high) if grad is x else right(grad, x, low, high)
        if mistake == "ends":
            return grad * ((x >= low) & (x <= high))
        return grad.clone()

    monkeypatch.setattr(torch.ops.aten, "hardtanh_backward", wrong)
    tests = (
        test_the_step_gradient_is_the_formula_inside_outside_and_at_the_ends,
        test_the_step_gradient_is_the_finite_difference_of_the_smooth_part,
    )
    caught = 0
    for test in tests:
        try:
            test()
        except AssertionError:
            caught += 1
    assert caught >= 1


def test_the_gain_scales_the_gradients_of_weights_by_channel() -> None:
    weight, step = torch.randn(4, 3, 2, 2), torch.full((4,), 0.2, requires_grad=True)
    lsq.round_weight(weight, step, 0, -7, 7).sum().backward()
    assert step.grad is not None
    gain = 1 / (12 * 7) ** 0.5
    for channel in range(4):
        assert float(step.grad[channel]) == pytest.approx(
            gain * give_step_gradient(weight[channel], 0.2, -7, 7, torch.ones(3, 2, 2)), rel=ROUNDING, abs=1e-6
        )


def test_the_forward_is_the_contract_bit_for_bit() -> None:
    x = torch.cat([torch.linspace(-3, 3, 4001), 0.1 * (torch.arange(-40, 40) + 0.5)])  # with ties
    step = torch.tensor([0.1])
    for levels, zero in ((Levels(-7, 7, True), 0), (Levels(0, 15, False), 6)):
        offset = None if zero == 0 else torch.tensor([-0.1 * zero])
        found = lsq.round_learned(x, step, levels.q_min, levels.q_max, offset=offset)
        assert torch.equal(found, fake_quantize(x, step, zero, levels))


def test_ternary_and_binary_weights_by_hand() -> None:
    weight = torch.tensor([[1.0, -0.1, -2.0, 0.9]])  # mean magnitude 1.0, so that 0.7 parts them
    integers, scale = lsq.find_ternary(weight, 0)
    assert integers.tolist() == [[1, 0, -1, 1]] and float(scale) == pytest.approx(3.9 / 3)
    integers, scale = lsq.find_binary(weight, 0)
    assert integers.tolist() == [[1, -1, -1, 1]] and float(scale) == pytest.approx(1.0)
    assert lsq.find_binary(torch.zeros(1, 3), 0)[0].tolist() == [[1, 1, 1]]
    leaf = weight.clone().requires_grad_()
    (lsq.round_coarse(leaf, 0, "ternary") * 3).sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [[3.0] * 4]


# --- there and back --------------------------------------------------------------------------------------------------


def test_the_student_starts_as_the_converted_graph_and_converts_back_to_it(
    cases: tuple[GraphModule, GraphModule],
) -> None:
    original, converted = cases
    student = make_trainable(converted, original, SCHEME)
    back = convert_trained(student, converted, SCHEME)
    with torch.no_grad():
        for batch in make_batches():
            assert torch.equal(student(*batch)[0], converted(*batch)[0])
            assert torch.equal(back(*batch)[0], converted(*batch)[0])
    kept = dict(back.named_buffers())
    assert all(torch.equal(value, kept[name]) for name, value in converted.named_buffers())
    assert [(n.op, n.target, str(n.args)) for n in back.graph.nodes] == [
        (n.op, n.target, str(n.args)) for n in converted.graph.nodes
    ]


def train(original: GraphModule, converted: GraphModule, steps: int = 12, rate: float = 2e-2) -> GraphModule:
    student = make_trainable(converted, original, SCHEME)
    damping = damp_oscillations(dict(list_spots(converted, SCHEME, {})), steps)
    undecayed = list_undecayed(student)
    return distil(student, original, iterate, Schedule(steps, rate), undecayed=undecayed, after_step=damping, seed=0)[0]


def test_student_converted_graph_integers_and_file_are_one(
    cases: tuple[GraphModule, GraphModule], tmp_path: Path
) -> None:
    from jettison.targets import onnxruntime

    original, converted = cases
    student = train(original, converted)
    found = convert_trained(student, converted, SCHEME)
    (x,) = make_batches(1, 128)[0]
    with torch.no_grad():
        learned, simulated = student(x)[0], found(x)[0]
    assert torch.equal(learned, simulated) and not torch.equal(simulated, converted(x)[0])
    whole = run_integers(found, (x,), SCHEME)[0]
    path = tmp_path / "trained.onnx"
    onnxruntime.export(found, (x,), path, input_names=["x"], output_names=["output"], dynamic_batch=True)
    (output,) = onnxruntime.load(path, threads=1).run([x.numpy()])
    assert np.array_equal(output, whole.numpy())
    # Float sums round: now and then one falls to the other side of a tie, and moves its sample by a step of few bits.
    near = (whole - simulated).abs().amax(1) < ROUNDING * float(simulated.abs().max())
    assert float(near.float().mean()) >= 0.9


def test_a_file_that_saturates_at_eight_bits_is_seen(
    cases: tuple[GraphModule, GraphModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: without its cut, the file's 3-bit tensor goes on to 255."""
    from jettison.targets import onnx_file, onnxruntime

    _, converted = cases
    (x,) = make_batches(1, 64)[0]
    path, right = tmp_path / "wrong.onnx", onnx_file._strip

    def bypass(proto: Any) -> None:
        cuts = {n.output[0]: n.input[0] for n in proto.graph.node if n.op_type == "Clip"}
        assert cuts
        for node in proto.graph.node:
            node.input[:] = [cuts.get(name, name) for name in node.input]
        right(proto)

    monkeypatch.setattr(onnx_file, "_strip", bypass)
    onnxruntime.export(converted, (x,), path, input_names=["x"], output_names=["output"], dynamic_batch=True)
    (output,) = onnxruntime.load(path, threads=1).run([x.numpy()])
    assert not np.array_equal(output, run_integers(converted, (x,), SCHEME)[0].numpy())


def test_grids_stay_what_the_bits_say_and_ends_keep_eight(cases: tuple[GraphModule, GraphModule]) -> None:
    original, converted = cases
    found = convert_trained(train(original, converted), converted, SCHEME)
    layers = find_layers(found, frozenset(SCHEME.weighted))
    assert {n: read_levels(node).q_max for n, node in layers.items()} == {
        "stem": 127, "deep": 7, "side": 3, "after": 7, "head": 127,
    }  # fmt: skip
    for name, node in layers.items():
        whole = read_attribute(found, f"{name}.weight")
        assert whole.dtype == torch.int8 and int(whole.abs().max()) <= read_levels(node).q_max
    assert find_ends(original, SCHEME) == {"stem", "head"}


def test_shared_scales_are_one_parameter_and_stay_equal(cases: tuple[GraphModule, GraphModule]) -> None:
    original, converted = cases
    groups = group_roundings(converted, SCHEME)
    joined = [g for g in groups if len(g) > 1]
    assert joined, "the concatenation, its inputs and the pooling share one scale"
    before = {n.args[1] for g in joined for n in g}
    found = convert_trained(train(original, converted), converted, SCHEME)
    for group in group_roundings(found, SCHEME):
        pairs = {(n.args[1], n.args[2]) for n in group}
        assert len(pairs) == 1
    assert len(group_roundings(found, SCHEME)) == len(groups)
    assert before != {n.args[1] for g in group_roundings(found, SCHEME) if len(g) > 1 for n in g}


def test_a_scale_that_is_not_shared_is_seen(cases: tuple[GraphModule, GraphModule]) -> None:
    """Planted: one member of a group with a step of its own falls out of it."""
    original, converted = cases
    found = convert_trained(train(original, converted, steps=2), converted, SCHEME)
    member = next(g for g in group_roundings(found, SCHEME) if len(g) > 1)[0]
    step = member.args[1]
    assert isinstance(step, float)
    member.update_arg(1, 2 * step)
    assert len(group_roundings(found, SCHEME)) > len(group_roundings(converted, SCHEME))


def test_steps_stay_positive_at_any_rate(cases: tuple[GraphModule, GraphModule]) -> None:
    original, converted = cases
    found = convert_trained(train(original, converted, steps=15, rate=0.5), converted, SCHEME)
    scales = [n.args[1] for g in group_roundings(found, SCHEME) for n in g]
    assert all(isinstance(s, float) and s > 0 for s in scales)
    assert all(float(v.min()) > 0 for name, v in found.named_buffers() if name.endswith("weight_scale"))


def test_nothing_given_is_changed(cases: tuple[GraphModule, GraphModule]) -> None:
    original, converted = cases
    before = [copy.deepcopy(dict(m.state_dict())) for m in cases]
    convert_trained(train(original, converted), converted, SCHEME)
    for module, state in zip(cases, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_a_tensor_has_the_finest_grid_any_reader_asks_for(flat: GraphModule) -> None:
    found = find_tensor_levels(flat, replace(SCHEME, bits={"deep": (8, 3), "side": (8, 2), "after": (8, 4)}))
    by_name = find_layers(flat, frozenset(SCHEME.weighted))
    read = {name: found[node.args[0]].q_max for name, node in by_name.items() if node.args[0] in found}  # type: ignore[index]
    # What `side` reads is also joined with its output and moved to `after`, which asks for 4 bits.
    assert read == {"stem": 255, "deep": 7, "side": 15, "after": 15, "head": 255}


def test_oscillating_weights_are_frozen_where_they_mostly_were() -> None:
    kept: dict[str, Tensor] = {}
    for step in range(40):
        swinging, still, rising = float(step % 4 == 0), 1.0, float(step > 20)
        follow("a", torch.tensor([swinging, still, rising]), kept)
    freeze("a", LAST_LIMIT, kept)
    assert kept["a/frozen"].tolist() == [True, False, False] and count_frozen(kept) == 1
    assert float(kept["a/mean"][0].round()) in (0.0, 1.0)


def test_frozen_weights_do_not_move(cases: tuple[GraphModule, GraphModule]) -> None:
    original, converted = cases
    spots = dict(list_spots(converted, SCHEME, {}))
    student = make_trainable(converted, original, SCHEME)
    after_step = damp_oscillations(spots, 10)
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        after_step(student, kept, 0)
        kept["deep/frozen"].fill_(True)
        held = read_integers(student, spots["deep"])[0]
        read_attribute(student, "deep.weight").add_(10.0)
        after_step(student, kept, 1)
    assert torch.equal(read_integers(student, spots["deep"])[0], held)


# --- one loop, resumed -----------------------------------------------------------------------------------------------


class Cut(Exception):
    """A run is cut off here."""


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(
    cases: tuple[GraphModule, GraphModule], tmp_path: Path, average: float
) -> None:
    original, converted = cases
    student = make_trainable(converted, original, SCHEME)
    spots, schedule = dict(list_spots(converted, SCHEME, {})), Schedule(14, 1e-2, average=average)

    def draw(epoch: int) -> Iterator[Batch]:
        torch.manual_seed(epoch)  # as a shuffling loader: every batch draws from the global state
        for _ in range(5):
            yield (torch.randn(8, 3, 8, 8),)

    def run(state: Path | None, stop: int = 99) -> tuple[GraphModule, list[float]]:
        damping = damp_oscillations(spots, schedule.steps)

        def after_step(module: GraphModule, kept: dict[str, Tensor], step: int) -> None:
            damping(module, kept, step)
            if step == stop:
                raise Cut

        undecayed = list_undecayed(student)
        return distil(
            student, original, draw, schedule,
            undecayed=undecayed, after_step=after_step, state=state, save_every=3, seed=5,
        )  # fmt: skip

    whole, losses = run(None)
    path = tmp_path / "state.safetensors"
    with pytest.raises(Cut):
        run(path, stop=10)
    resumed, again = run(path)
    assert again == losses
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    finished, _ = run(path)  # nothing is left to do
    assert all(torch.equal(v, finished.state_dict()[k]) for k, v in whole.state_dict().items())


def test_a_state_of_another_network_or_none_is_refused(cases: tuple[GraphModule, GraphModule], tmp_path: Path) -> None:
    original, converted = cases
    student, path = make_trainable(converted, original, SCHEME), tmp_path / "state.safetensors"
    distil(original, original, iterate, Schedule(2), state=path, seed=0)
    with pytest.raises(CheckpointError, match="another training"):
        distil(student, original, iterate, Schedule(2), state=path, seed=0)
    path.write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="not a readable"):
        distil(student, original, iterate, Schedule(2), state=path, seed=0)


def test_weight_decay_leaves_steps_alone(cases: tuple[GraphModule, GraphModule]) -> None:
    original, converted = cases
    student = make_trainable(converted, original, SCHEME)
    named = dict(student.named_parameters())
    left = list_undecayed(student)
    assert {n for n in named if n.endswith(("_growth", "_place"))} <= left
    assert "deep.weight" not in left and "deep.bias" in left
