"""The ladder on whole small networks: the float function is kept, the loss falls, nothing of the caller's changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from jettison.core.errors import CalibrationError, InputError, UnknownName
from jettison.graph.trace import trace_module
from jettison.quantization import RUNGS, climb, quantize
from jettison.quantization.awq import scale_for_weights
from jettison.quantization.blocks import find_blocks, measure_gradients
from jettison.quantization.convert import convert, fold
from jettison.quantization.equalise import equalise
from jettison.quantization.fold import find_layers
from jettison.quantization.integers import run_integers
from jettison.quantization.ladder import Task, measure_loss, narrow, prepare, run_all
from jettison.quantization.links import find_links, scale_channels
from jettison.quantization.ranges import span_mse
from jettison.quantization.replay import Layer, walk_layers
from jettison.quantization.smooth import smooth
from jettison.targets import onnxruntime
from jettison.targets.integer import Levels, fake_quantize

SCHEME = onnxruntime.scheme(frozenset({"avx512_vnni"}))
WEIGHTED = frozenset(SCHEME.weighted)
KEEPS_TOLERANCE = 1e-5
"""Relative to the largest output: weights scaled in float64 and kept in float32 lose a rounding each."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Convolutional(nn.Module):
    """An inverted bottleneck with a shortcut, one without, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.up, self.deep, self.down = (
            nn.Conv2d(12, 24, 1),
            nn.Conv2d(24, 24, 3, padding=1, groups=24),
            nn.Conv2d(24, 12, 1),
        )
        self.wide, self.narrow = nn.Conv2d(12, 20, 3, stride=2), nn.Conv2d(20, 16, 1, groups=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.down(torch.relu(self.deep(torch.relu(self.up(x)))))
        x = torch.relu(self.narrow(torch.relu(self.wide(x))))
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """A pre-norm attention block and perceptron, with outliers in a few channels of the norms' outputs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.norm2, self.end = nn.LayerNorm(width), nn.LayerNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, 6)
        for norm in (self.norm, self.norm2, self.end):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            with torch.no_grad():
                norm.weight[3], norm.weight[7] = 30.0, 20.0
                for linear in (self.q, self.k, self.v, self.up, self.head):
                    linear.weight[:, [3, 7]] *= 0.25

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.out(nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        x = x + self.down(torch.relu(self.up(self.norm2(x))))
        return self.head(self.end(x)).mean(1)


def pictures(count: int, seed: int, size: int = 32) -> list[tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(seed)
    colours = torch.randn(3, 3, generator=draw)
    drawn = [torch.randn(size, 3, 8, 8, generator=draw) for _ in range(count)]
    return [(torch.einsum("ij,njhw->nihw", colours, x),) for x in drawn]


def tokens(count: int, seed: int) -> list[tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 7, 16, generator=draw),) for _ in range(count)]


def trace_convolutional() -> GraphModule:
    torch.manual_seed(3)
    net = Convolutional()
    with torch.no_grad():
        for batch in pictures(4, 1):
            net(*batch)
        net.head.weight *= 12  # scores that are far enough apart to have a class
    return trace_module(net.eval(), pictures(1, 0)[0]).module.requires_grad_(False)


@pytest.fixture(scope="module")
def net() -> GraphModule:
    return trace_convolutional()


@pytest.fixture(scope="module")
def encoder() -> GraphModule:
    torch.manual_seed(5)
    return trace_module(Encoder().eval(), tokens(1, 0)[0]).module.requires_grad_(False)


def gap(left: GraphModule, right: GraphModule, x: tuple[Tensor, ...]) -> float:
    y, z = left(*x)[0], right(*x)[0]
    return float((y - z).abs().max() / y.abs().max())


def test_links_are_found_where_a_scale_is_free(net: GraphModule, encoder: GraphModule) -> None:
    folded = fold(net, WEIGHTED)
    found = {(link.parameters[0], *names_of(folded, link.readers)) for link in find_links(folded)}
    # The stem is read by the shortcut as well, `down` ends in the addition, and a mean lies before the head.
    assert found == {("up.weight", "deep"), ("deep.weight", "down"), ("wide.weight", "narrow")}
    folded = fold(encoder, WEIGHTED)
    found = {(link.parameters[0], *names_of(folded, link.readers)) for link in find_links(folded)}
    assert found == {
        ("norm.weight", "q", "k", "v"),
        ("norm2.weight", "up"),
        ("up.weight", "down"),
        ("end.weight", "head"),
    }


def names_of(module: GraphModule, nodes: tuple[object, ...]) -> list[str]:
    return [name for name, node in find_layers(module, WEIGHTED).items() if node in nodes]


def test_any_factors_keep_the_function(net: GraphModule, encoder: GraphModule) -> None:
    for graph, x in ((net, pictures(1, 9)[0]), (encoder, tokens(1, 9)[0])):
        folded = fold(graph, WEIGHTED)
        for link in find_links(folded):
            scale_channels(folded, link, torch.rand(link.channels) * 3 + 0.2)
        assert gap(graph, folded, x) < KEEPS_TOLERANCE
        (link, *_) = find_links(folded)
        scale_channels(folded, link, torch.ones(link.channels).index_fill_(0, torch.tensor([1]), 1.5))
        folded.get_buffer(link.parameters[0]).mul_(1.01)  # planted: one side only
        assert gap(graph, folded, x) > KEEPS_TOLERANCE


def test_relu6_and_second_readers_hold_a_scale_fast() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.b(nn.functional.relu6(self.a(x)))
            return self.c(y), y

    graph = trace_module(Held().eval(), pictures(1, 0)[0]).module
    assert not list(find_links(fold(graph, WEIGHTED)))


def measure_per_tensor_sqnr(weight: Tensor) -> float:
    """In dB, of each channel's signal to its error under one scale, the worst channel's."""
    scale = weight.abs().max() / 127
    error = fake_quantize(weight, scale, 0, Levels(-127, 127, True)) - weight
    return float(10 * torch.log10(weight.square().flatten(1).sum(1) / error.square().flatten(1).sum(1)).min())


def test_equalisation_keeps_the_function_and_raises_a_planted_layers_sqnr(net: GraphModule) -> None:
    planted = fold(net, WEIGHTED)
    planted.get_buffer("deep.weight")[5].mul_(100.0)
    before = planted.get_buffer("deep.weight").clone()
    equal = equalise(planted)
    x = pictures(1, 9)[0]
    assert gap(planted, equal, x) < KEEPS_TOLERANCE
    gained = measure_per_tensor_sqnr(equal.get_buffer("deep.weight")) - measure_per_tensor_sqnr(before)
    assert gained >= 10
    assert torch.equal(planted.get_buffer("deep.weight"), before)
    losses = [
        measure_loss(
            run_all(quantize(planted, pictures(2, 1), scheme=SCHEME, weights="per_tensor", rungs=rungs).module, [x]),
            run_all(planted, [x]),
        )
        for rungs in ((), ("equalise",))
    ]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("function", [smooth, scale_for_weights])
def test_moved_outliers_keep_the_function_and_help(encoder: GraphModule, function: object) -> None:
    name = next(name for name, rung in RUNGS.items() if rung.function is function)
    bits = None if name == "smooth" else 4
    folded, x = fold(encoder, WEIGHTED), tokens(1, 9)
    moved = RUNGS[name].function(folded, tokens(3, 1), narrow(SCHEME, bits, None)[0], seed=0)
    assert gap(folded, moved, x[0]) < KEEPS_TOLERANCE
    losses = [
        measure_loss(
            run_all(quantize(encoder, tokens(3, 1), scheme=SCHEME, weight_bits=bits, rungs=rungs).module, x),
            run_all(encoder, x),
        )
        for rungs in ((), (name,))
    ]
    assert losses[1] < 0.8 * losses[0]


@pytest.fixture(scope="module")
def task(net: GraphModule) -> Task:
    """The network made ready for 3-bit weights."""
    torch.set_num_threads(1)
    return prepare(net, pictures(6, 1), scheme=SCHEME, weight_bits=3, biases=True)


@pytest.fixture(scope="module")
def nearest(task: Task) -> GraphModule:
    return task.convert(task.folded)


def take(name: str, task: Task, converted: GraphModule, steps: int = 100) -> GraphModule:
    """One rung with few steps; what it starts from must not change."""
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    more = {"steps": steps} if name in ("adaround", "reconstruct") else {}
    found = RUNGS[name].function(task.folded, converted, task.batches, task.scheme, seed=0, **more)
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())
    return found


INTEGER_RUNGS = [name for name, rung in RUNGS.items() if not rung.before]


@pytest.mark.parametrize("name", INTEGER_RUNGS)
def test_every_rung_lowers_the_loss_on_inputs_it_did_not_see(name: str, task: Task, nearest: GraphModule) -> None:
    judges = pictures(2, 9)
    targets = run_all(task.folded, judges)
    before, after = (measure_loss(run_all(m, judges), targets) for m in (nearest, take(name, task, nearest)))
    assert after < 0.5 * before


def test_reconstruction_learns_the_biases_and_more(task: Task, nearest: GraphModule) -> None:
    """On its own inputs some steps give more than the best biases for the integers that were there."""
    targets = run_all(task.folded, task.batches)
    biases, blocks = (
        measure_loss(run_all(take(name, task, nearest, steps=200), task.batches), targets)
        for name in ("bias", "reconstruct")
    )
    assert blocks < 0.9 * biases, (blocks, biases)


def test_reconstruction_learns_the_steps_of_coarse_activations(net: GraphModule) -> None:
    coarse = prepare(net, pictures(6, 1), scheme=SCHEME, weight_bits=4, activation_bits=4, biases=True)
    start = coarse.convert(coarse.folded)
    found = take("reconstruct", coarse, start)
    # On the inputs it learned from: 192 small pictures of noise are too few for a network without any training.
    losses = [measure_loss(run_all(m, coarse.batches), run_all(net, coarse.batches)) for m in (start, found)]
    assert losses[1] < 0.95 * losses[0]
    steps = [
        [n.args[1] for n in m.graph.nodes if str(n.target).startswith("jettison.quantize")] for m in (start, found)
    ]
    assert steps[0] != steps[1]
    for name, node in find_layers(found, WEIGHTED).items():
        step = torch.tensor(node.args[0].args[1]) * found.get_buffer(f"{name}.weight_scale")  # type: ignore[union-attr]
        assert torch.equal(found.get_buffer(f"{name}.bias_scale"), step)
    assert {site.bits for site in coarse.finish(found).sites} == {4} and "simulation" in coarse.finish(found).note


@pytest.mark.parametrize(
    "name", ["gptq", *(pytest.param(n, marks=pytest.mark.slow) for n in INTEGER_RUNGS if n != "gptq")]
)
def test_the_file_computes_what_the_integer_reference_says_after_every_rung(
    name: str, task: Task, nearest: GraphModule, tmp_path: Path
) -> None:
    reason = onnxruntime.why_missing()
    if reason:
        pytest.skip(reason)
    found, x = take(name, task, nearest, steps=10), pictures(1, 9)[0]
    onnxruntime.export(found, x, tmp_path / "net.onnx", input_names=["x"], output_names=["y"], dynamic_batch=True)
    given = onnxruntime.predict(onnxruntime.load(tmp_path / "net.onnx", threads=1), x)[0]
    wanted = run_integers(found, x, SCHEME)[0]
    assert float((given - wanted).abs().max()) < KEEPS_TOLERANCE * float(wanted.abs().max())
    found.get_buffer("head.weight")[0, 3] += 1  # planted: one integer off by one
    assert float((run_integers(found, x, SCHEME)[0] - given).abs().max()) > KEEPS_TOLERANCE * float(wanted.abs().max())


def test_layers_see_the_quantized_prefix_and_changes_made_on_the_way(net: GraphModule) -> None:
    folded = fold(net, WEIGHTED)
    converted = convert(folded, pictures(2, 1), scheme=narrow(SCHEME, 3, None)[0], ranger=span_mse)
    batches = pictures(2, 4)
    gaps = {}
    for layer in walk_layers(folded, converted, batches):
        given, wanted = next(iter(layer.inputs()))
        gaps[layer.name] = float((given - wanted).abs().mean())
        if layer.name == "wide":
            converted.get_buffer("wide.weight").zero_()
    assert list(gaps) == ["stem", "up", "deep", "down", "wide", "narrow", "head"]
    assert gaps["stem"] < gaps["up"] < gaps["narrow"]
    floats = {layer.name: next(iter(layer.inputs()))[1] for layer in walk_layers(folded, converted, batches)}
    assert torch.allclose(floats["narrow"], torch.relu(run_to(folded, "wide", batches[0])), atol=1e-5)


def run_to(module: GraphModule, layer: str, x: tuple[Tensor, ...]) -> Tensor:
    kept: list[Tensor] = []

    class Tap(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if n is find_layers(module, WEIGHTED)[layer]:
                kept.append(result)
            return result

    Tap(module).run(*x)
    return kept[0]


def test_blocks_are_the_residual_ones(net: GraphModule) -> None:
    folded = fold(net, WEIGHTED)
    converted = convert(folded, pictures(1, 1), scheme=SCHEME, ranger=span_mse)
    blocks = find_blocks(folded, converted)
    layers = [[n for n, node in find_layers(converted, WEIGHTED).items() if node in b.nodes] for b in blocks]
    assert ["up", "deep", "down"] in layers and [n for names in layers for n in names] == [
        "stem",
        "up",
        "deep",
        "down",
        "wide",
        "narrow",
        "head",
    ]
    gradients = measure_gradients(folded, [b.target for b in blocks], pictures(2, 1))
    for block in blocks[:-1]:
        assert float(gradients[block.target].mean()) == pytest.approx(1.0) and gradients[block.target].ndim == 4


def test_an_added_tensors_error_is_made_up_for(task: Task, nearest: GraphModule) -> None:
    """A layer before an addition knows what the other operand lacks, and GPTQ counts it in."""
    layers = {layer.name: (layer.added is not None, len(next(layer.tensors()))) for layer in walk(task, nearest)}
    assert layers == {name: (name == "down", 3 if name == "down" else 2) for name in layers}


def walk(task: Task, converted: GraphModule) -> Iterator[Layer]:
    return walk_layers(task.folded, converted, task.batches)


def test_a_climb_stops_when_it_is_high_enough(net: GraphModule) -> None:
    far = climb(net, pictures(4, 1), pictures(2, 9), scheme=SCHEME, weight_bits=3, loss=0.0, rungs=("bias", "gptq"))
    assert [s.rung for s in far.steps] == ["nearest", "bias", "gptq"] and not far.reached
    assert far.steps[1].loss_before == far.steps[0].loss_after and all(s.seconds > 0 for s in far.steps)
    assert far.loss == min(s.loss_after for s in far.steps)
    loss = far.steps[0].loss_after * 1.01
    near = climb(net, pictures(4, 1), pictures(2, 9), scheme=SCHEME, weight_bits=3, loss=loss)
    assert [s.rung for s in near.steps] == ["nearest"] and near.reached


def test_losses_are_zero_for_equals_and_grow() -> None:
    y = torch.randn(6, 4)
    assert measure_loss([(y,)], [(y,)]) == pytest.approx(0.0, abs=1e-9)
    assert measure_loss([(y + 3,)], [(y,)]) == pytest.approx(0.0, abs=1e-9)  # scores have no zero
    z = torch.randn(6, 4, 2)
    assert measure_loss([(z * 1.1,)], [(z,)]) == pytest.approx(0.01, rel=1e-3)
    assert measure_loss([(y.argmax(1), z)], [(y.argmin(1), z)]) == 0.0


def test_bad_questions(net: GraphModule) -> None:
    with pytest.raises(UnknownName, match="gptq"):
        quantize(net, pictures(1, 1), scheme=SCHEME, rungs=("gptg",))
    with pytest.raises(UnknownName, match="per_channel"):
        quantize(net, pictures(1, 1), scheme=SCHEME, weights="per_chanel")
    for bits in ({"weight_bits": 1}, {"weight_bits": 9}, {"activation_bits": 3}, {"weight_bits": True}):
        with pytest.raises(InputError, match="out of range"):
            quantize(net, pictures(1, 1), scheme=SCHEME, **bits)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="judge"):
        climb(net, pictures(1, 1), [], scheme=SCHEME, loss=0.1)
