"""The rungs of the post-training ladder against their oracles; each oracle is also shown a planted mistake."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jettison.quantization.adaround import learn_rounding
from jettison.quantization.bias_correction import find_shift
from jettison.quantization.gptq import (
    damp,
    fit_scale,
    measure_error,
    refit,
    revisit,
    round_gptq,
    round_to,
    search_scale,
    solve_layer,
)
from jettison.quantization.moments import Moments, Sums
from jettison.quantization.weights import unfold
from jettison.targets.integer import Levels

INT4 = Levels(-7, 7, True)
OPEN = (-float("inf"), float("inf"))
UNFOLD_TOLERANCE = 1e-4
"""Absolute, for sums of a hundred float32 products of normal numbers in another order."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def correlated(groups: int, inputs: int, count: int) -> Tensor:
    """Inputs whose covariance has the spectrum 1 / i^2, as activations have."""
    basis = torch.linalg.qr(torch.randn(groups, inputs, inputs)).Q
    return basis @ (torch.randn(groups, inputs, count) / torch.arange(1, inputs + 1).view(1, -1, 1))


def scales(weight: Tensor) -> Tensor:
    return weight.abs().amax(-1) / INT4.q_max


def test_gptq_with_a_diagonal_hessian_is_rounding_to_nearest() -> None:
    weight, hessian = torch.randn(3, 16, 40), torch.diag_embed(torch.rand(3, 40) + 0.1)
    integers = round_gptq(weight, hessian, scales(weight), INT4)
    nearest = round_to(weight, scales(weight).unsqueeze(-1), INT4)
    assert torch.equal(integers, nearest)
    assert torch.equal(revisit(weight, nearest, hessian, scales(weight), INT4), nearest)


def test_a_hessian_off_the_diagonal_is_noticed() -> None:
    weight, hessian = torch.randn(1, 16, 40), torch.diag_embed(torch.rand(1, 40) + 0.1)
    hessian[:, 0, 1] = hessian[:, 1, 0] = 0.09
    assert not torch.equal(
        round_gptq(weight, hessian, scales(weight), INT4), round_to(weight, scales(weight).unsqueeze(-1), INT4)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [64, 200])
def test_gptq_halves_the_error_on_correlated_inputs(dtype: torch.dtype, inputs: int) -> None:
    x = correlated(2, inputs, 1000).to(dtype)
    weight, hessian = torch.randn(2, 48, inputs, dtype=dtype), x @ x.mT / 1000
    scale = scales(weight)
    nearest = measure_error(weight, round_to(weight, scale.unsqueeze(-1), INT4), hessian, scale).sum()
    integers = round_gptq(weight, hessian, scale, INT4)
    error = measure_error(weight, integers, hessian, scale).sum()
    assert float(error) < 0.5 * float(nearest)
    # Without passing errors on, nothing is gained: the oracle sees a pass that forgets to.
    planted = round_gptq(weight, torch.diag_embed(hessian.diagonal(dim1=1, dim2=2)), scale, INT4)
    assert float(measure_error(weight, planted, hessian, scale).sum()) > 0.9 * float(nearest)
    damped = damp(hessian, 0.01)
    once = measure_error(weight, integers, damped, scale)
    again = measure_error(weight, revisit(weight, integers, damped, scale, INT4), damped, scale)
    assert bool((again <= once * (1 + 1e-4)).all()) and float(again.sum()) < float(once.sum())
    fitted = fit_scale(weight, integers, damped, scale, torch.zeros_like(scale))
    assert bool((measure_error(weight, integers, damped, fitted) <= once * (1 + 1e-4)).all())


def test_groups_are_independent_and_dead_inputs_do_no_harm() -> None:
    x = correlated(4, 9, 500)
    x[1] = 0.0
    weight, hessian = torch.randn(4, 1, 9), x @ x.mT / 500
    together = round_gptq(weight, hessian, scales(weight), INT4)
    apart = torch.cat(
        [round_gptq(weight[i : i + 1], hessian[i : i + 1], scales(weight)[i : i + 1], INT4) for i in range(4)]
    )
    assert torch.equal(together, apart) and bool(torch.isfinite(together).all())
    assert torch.equal(together[1], round_to(weight[1], scales(weight)[1].unsqueeze(-1), INT4))


def test_refitting_takes_back_what_the_layers_before_changed() -> None:
    floats = correlated(1, 12, 4000)
    given = floats * torch.linspace(0.8, 1.3, 12).view(1, -1, 1)  # the quantized prefix scales every channel wrongly
    weight = torch.randn(1, 5, 12)

    def mean(x: Tensor) -> Tensor:
        return x.mean(-1)

    def moment(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT / a.shape[-1] - mean(a).unsqueeze(2) * mean(b).unsqueeze(1)

    moments = Moments(moment(given, given), moment(floats, given), mean(given), mean(floats))
    found = refit(weight, moments, 1e-6)
    wanted = weight @ floats
    assert float((found @ given - wanted).square().sum()) < 1e-4 * float((weight @ given - wanted).square().sum())
    same = Moments(moments.own, moments.own, moments.mean, moments.mean)
    assert torch.allclose(refit(weight, same, 0.01), weight, atol=1e-4)


def count_moments(x: Tensor, pictures: int) -> tuple[Tensor, Tensor]:
    """The own moments of `(inputs, positions)` in parts of eight pictures, shrunk, and as they were counted."""
    sums = Sums()
    for part in x.unflatten(1, (pictures // 8, -1)).unbind(1):
        sums.add([part.unsqueeze(0)])
    (mean,), (shrunk,) = sums.read()
    gap = x.double() - mean.mT
    return shrunk[0], gap @ gap.mT / x.shape[1]


def test_moments_of_few_pictures_lose_their_noise_and_those_of_many_stay() -> None:
    few, raw = count_moments(torch.randn(60, 96), 96)
    truth = torch.eye(60)  # one position a picture, as a classifier sees
    assert float((few - truth).square().sum()) < 0.3 * float((raw - truth).square().sum())
    assert torch.allclose(few.diagonal(), raw.diagonal())
    many, raw = count_moments(correlated(1, 12, 40_000)[0], 800)
    assert float((many - raw).norm()) < 0.01 * float((raw - torch.diag(raw.diagonal())).norm())


def test_positions_of_one_picture_are_not_counted_as_samples() -> None:
    pictures = torch.randn(60, 96)
    (once, _), (often, _) = count_moments(pictures, 96), count_moments(pictures.repeat_interleave(49, 1), 96)
    assert torch.allclose(once, often, atol=1e-6)


def test_the_scale_is_the_best_of_those_a_pass_is_made_with() -> None:
    x, weight = correlated(2, 64, 1000), torch.randn(2, 48, 64)
    moments = Moments(x @ x.mT / 1000, x @ x.mT / 1000, torch.zeros(2, 64), torch.zeros(2, 64))
    hessian, nothing = damp(moments.own, 0.01), torch.zeros(2, 48)
    integers, scale = solve_layer(weight, moments, nothing, INT4)
    error = measure_error(weight, integers, hessian, scale)
    first = search_scale(weight, moments.own.diagonal(dim1=1, dim2=2), INT4, nothing)
    once = measure_error(weight, round_gptq(weight, moments.own, first, INT4), hessian, first)
    assert bool((error <= once * (1 + 1e-4)).all()) and float(error.sum()) < 0.9 * float(once.sum())
    floor = 2 * first  # a scale that the bias needs is kept
    assert bool((solve_layer(weight, moments, floor, INT4)[1] >= floor).all())


def test_scales_weigh_inputs_by_what_they_carry() -> None:
    weight = torch.randn(1, 8, 32)
    weight[..., 0] = 6.0  # an outlier that no input reaches
    importance = torch.ones(1, 32)
    importance[0, 0] = 0.0
    blind, seeing = (search_scale(weight, i, INT4, torch.zeros(1, 8)) for i in (torch.ones(1, 32), importance))
    hessian = torch.diag_embed(importance)
    errors = [
        float(measure_error(weight, round_to(weight, s.unsqueeze(-1), INT4), hessian, s).sum()) for s in (blind, seeing)
    ]
    assert errors[1] < 0.8 * errors[0]
    assert bool((search_scale(weight, importance, INT4, torch.full((1, 8), 3.0)) == 3.0).all())


def test_adaround_is_the_best_of_all_roundings() -> None:
    """All 2^6 roundings of a layer with one output and six inputs; learning finds the best."""
    misses = 0
    for seed in range(4):
        torch.manual_seed(seed)
        weight, scale, bias = torch.randn(1, 1, 6), torch.full((1, 1), 0.3), torch.zeros(1, 1)
        x = correlated(1, 6, 400) + torch.randn(1, 6, 1)
        wanted = weight @ x
        low = (weight / 0.3).floor()
        errors = {
            bits: float(((low + torch.tensor(bits)).clamp(-7, 7) * 0.3 @ x - wanted).square().mean())
            for bits in itertools.product((0.0, 1.0), repeat=6)
        }
        nearest = round_to(weight, scale.unsqueeze(-1), INT4)
        found = learn_rounding(weight, nearest, scale, bias, x, wanted, INT4, ends=OPEN, steps=150, seed=seed)
        error = float((found * 0.3 @ x - wanted).square().mean())
        first = min(errors.values())
        assert error == pytest.approx(first, rel=1e-4), seed
        start = float((nearest * 0.3 @ x - wanted).square().mean())
        misses += start > first * (1 + 1e-3)
    assert misses >= 2  # nearest rounding alone would not pass


def test_adaround_is_never_worse_and_looks_behind_the_relu() -> None:
    weight, scale, bias = torch.randn(1, 8, 20), torch.full((1, 8), 0.4), torch.randn(1, 8) - 1
    x = correlated(1, 20, 600)
    wanted = (weight @ x + bias.unsqueeze(-1)).clamp(min=0)
    nearest = round_to(weight, scale.unsqueeze(-1), INT4)

    def error(integers: Tensor) -> Tensor:
        return ((integers * 0.4 @ x + bias.unsqueeze(-1)).clamp(min=0) - wanted).square().mean(-1)

    found = learn_rounding(weight, nearest, scale, bias, x, wanted, INT4, ends=(0.0, float("inf")), steps=150, seed=1)
    assert bool((error(found) <= error(nearest)).all()) and float(error(found).sum()) < 0.5 * float(
        error(nearest).sum()
    )
    assert float((found - nearest).abs().max()) <= 1 and bool((found == found.round()).all())
    # Taught what lies before the ReLU, a row that is mostly cut off spends its freedom on what nobody sees.
    deep = torch.full((1, 8), -2.0)
    bent = learn_rounding(weight, nearest, scale, deep, x, weight @ x - 2, INT4, ends=OPEN, steps=150, seed=1)
    seen = learn_rounding(
        weight,
        nearest,
        scale,
        deep,
        x,
        (weight @ x - 2).clamp(min=0),
        INT4,
        ends=(0.0, float("inf")),
        steps=150,
        seed=1,
    )
    target = (weight @ x - 2).clamp(min=0)
    errors = [float(((q * 0.4 @ x - 2).clamp(min=0) - target).square().mean()) for q in (seen, bent)]
    assert errors[0] < 0.9 * errors[1]


def test_a_planted_shift_is_found_and_what_the_relu_drops_does_not_count() -> None:
    exact = torch.randn(6, 2000) * 2
    planted = torch.linspace(-0.5, 0.5, 6)
    found = find_shift(exact, exact + planted.unsqueeze(1), OPEN)
    assert torch.allclose(found, -planted, atol=1e-5)
    # A gain error below zero moves the mean, but behind the ReLU all is right.
    bent = torch.where(exact < 0, exact * 1.5, exact)
    assert torch.equal(find_shift(exact, bent, (0.0, float("inf"))), torch.zeros(6))
    assert float(find_shift(exact, bent, OPEN).abs().min()) > 0.1


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), (3, 6, 9, 9)),
        (nn.Conv2d(6, 12, 3, padding=2, dilation=2, groups=3), (3, 6, 9, 9)),
        (nn.Conv2d(6, 6, 3, padding="same", groups=6), (3, 6, 9, 9)),
        (nn.Conv2d(6, 4, (1, 5), padding="same"), (3, 6, 9, 9)),
        (nn.Conv2d(6, 8, 1), (3, 6, 9, 9)),
        (nn.Conv1d(6, 8, 5, stride=3, padding=1, groups=2), (3, 6, 20)),
        (nn.Linear(10, 4), (3, 5, 10)),
    ],
    ids=["strided", "grouped, dilated", "depthwise, same", "oblong kernel, same", "pointwise", "1-d", "linear"],
)
def test_a_layer_is_its_weight_times_its_unfolded_input(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    program = torch.export.export(layer.eval(), (x,))
    (node,) = (n for n in program.graph.nodes if str(n.target).startswith(("aten.conv", "aten.linear")))
    weight, bias = layer.weight.detach(), layer.bias.detach()  # type: ignore[operator, union-attr]
    columns = unfold(x, node, weight.shape)
    y = (weight.reshape(columns.shape[0], -1, columns.shape[1]) @ columns).flatten(0, 1) + bias.unsqueeze(1)
    wanted = layer(x).movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
    assert torch.allclose(y, wanted, atol=UNFOLD_TOLERANCE)
    assert not torch.allclose(y, wanted.roll(1, 1), atol=UNFOLD_TOLERANCE)
    assert F.mse_loss(y, wanted) < UNFOLD_TOLERANCE
