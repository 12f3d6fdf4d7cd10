"""The losses against their closed forms, and the training loop against what it promises to leave alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from jettison.core.errors import NonFiniteError
from jettison.distill.losses import measure_divergence, measure_feature_distance
from jettison.distill.train import Schedule, distil
from jettison.graph.groups import Graph, trace
from jettison.graph.rewrite import kept_of, prune_graph
from jettison.graph.trace import Batch
from jettison.testing import build_model, draw_kept

ROUNDING = 1e-6
"""float32 sums of a few terms."""


def _case() -> tuple[Graph, fx.GraphModule]:
    graph = trace(*build_model("residual"))
    return graph, prune_graph(graph, draw_kept(graph, seed=1, share=0.7)).module


def _batches(epoch: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(4):
        yield (torch.randn(16, 3, 8, 8, generator=generator),)


def _all(epoch: int) -> Iterator[Batch]:
    return itertools.chain(_batches(epoch), _batches(epoch + 100))


@pytest.mark.parametrize("shape", [(4, 7), (4, 1), (4,), (4, 3, 5, 5)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_no_loss_and_no_gradient_against_oneself(shape: tuple[int, ...], temperature: float) -> None:
    teacher = torch.randn(shape)
    student = teacher.clone().requires_grad_()
    loss = measure_divergence([student], [teacher], temperature=temperature)
    assert loss.shape == (4,) and float(loss.detach().abs().max()) < ROUNDING
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert float(gradient.abs().max()) < ROUNDING


def test_logits_are_compared_by_divergence() -> None:
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    log_s, log_t = (F.log_softmax(z / 3, 1) for z in (student, teacher))
    expected = 9 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
    assert torch.allclose(measure_divergence([student], [teacher], temperature=3.0), expected, atol=ROUNDING)
    assert float(measure_divergence([student], [teacher]).min()) > 0


def test_at_high_temperature_logits_match_by_squares() -> None:
    """T² KL tends to half the variance of the logits' difference over the classes (Hinton et al. 2015)."""
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    whole = torch.randn(6, 1)
    limit = 0.5 * (student - teacher).var(1, unbiased=False)
    found = measure_divergence([student, whole], [teacher, whole], temperature=50.0)
    assert torch.allclose(found, limit, rtol=5e-2, atol=1e-2)  # float32: rounding grows with T²


def test_values_are_compared_relative_to_their_size() -> None:
    student, teacher = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    small = measure_divergence([student], [teacher])
    assert torch.allclose(measure_divergence([student * 100], [teacher * 100]), small, rtol=1e-4)
    whole = torch.ones(4, dtype=torch.long)
    assert torch.equal(measure_divergence([student, whole], [teacher, whole * 2]), small)  # integers are not compared


def test_features_are_compared_at_kept_channels() -> None:
    teacher = torch.randn(2, 6, 3, 3)
    channels = torch.tensor([0, 2, 5])
    assert float(measure_feature_distance(teacher[:, channels], teacher, channels)) == 0
    off = measure_feature_distance(teacher[:, channels] + 1, teacher, channels)
    assert float(off) == pytest.approx(1 / float(teacher[:, channels].var()), rel=1e-4)


def test_training_lowers_the_loss() -> None:
    graph, student = _case()
    _, losses = distil(student, graph.module, _all, Schedule(60, learning_rate=1e-2), seed=0)
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_training_is_deterministic() -> None:
    graph, student = _case()
    runs = [distil(student, graph.module, _batches, Schedule(8), seed=3) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    states = [module.state_dict() for module, _ in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_only_the_copys_parameters_change() -> None:
    graph, student = _case()
    before = copy.deepcopy(student.state_dict())
    teacher = copy.deepcopy(graph.module.state_dict())
    trained, _ = distil(student, graph.module, _batches, Schedule(6, learning_rate=1e-2), seed=0)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(torch.equal(v, teacher[k]) for k, v in graph.module.state_dict().items())
    assert all(p.grad is None for p in itertools.chain(student.parameters(), graph.module.parameters()))
    buffers = dict(trained.named_buffers())
    assert any(name.endswith("running_var") for name in buffers)
    assert all(torch.equal(value, before[name]) for name, value in buffers.items())
    assert all(not torch.equal(p, before[name]) for name, p in trained.named_parameters())
    assert all(p.grad is None and p.is_contiguous() for p in trained.parameters())


def test_a_perfect_student_stays() -> None:
    graph, _ = _case()
    _, losses = distil(graph.module, graph.module, _batches, Schedule(5, weight_decay=0.0), seed=0)
    assert losses[0] < ROUNDING
    assert max(losses) < 1e-2  # Adam makes steps of full length even of gradients that are rounding


def test_features_join_the_loss() -> None:
    graph = trace(*build_model("residual"))
    kept = draw_kept(graph, seed=1, share=0.7)
    keeps = graph.keeps(kept)
    student = prune_graph(graph, kept).module
    *_, node = (n for n in graph.module.graph.nodes if n.target == torch.ops.aten.relu.default)
    points = {node.name: kept_of(graph, node, 1, keeps)}
    plain = distil(student, graph.module, _batches, Schedule(1), seed=0)[1]
    joined = distil(student, graph.module, _batches, Schedule(1, features=2.0), points=points, seed=0)[1]
    assert joined[0] > plain[0]
    _, losses = distil(student, graph.module, _batches, Schedule(30, 1e-2, features=2.0), points=points, seed=0)
    assert losses[-1] < losses[0]


def test_half_precision_keeps_weights_in_full() -> None:
    graph, student = _case()
    trained, losses = distil(student, graph.module, _batches, Schedule(3, half=True), seed=0)
    assert all(p.dtype == torch.float32 for p in trained.parameters()) and len(losses) == 3


def _broken(epoch: int) -> Iterator[Batch]:
    yield from itertools.islice(_batches(epoch), 2)
    yield (torch.full((2, 3, 8, 8), torch.nan),)


def test_a_loss_that_is_no_number() -> None:
    graph, student = _case()
    with pytest.raises(NonFiniteError, match="at step 2"):
        distil(student, graph.module, _broken, Schedule(9), seed=0)


def test_no_batches_train_nothing() -> None:
    graph, student = _case()
    trained, losses = distil(student, graph.module, lambda epoch: iter(()), Schedule(9), seed=0)
    assert losses == []
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in trained.state_dict().items())


class Toy(nn.Module):
    """A linear map, which a linear student can learn to the last digit."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y


def test_a_linear_student_becomes_its_teacher() -> None:
    torch.manual_seed(0)
    teacher, student = (trace(Toy().eval(), torch.randn(2, 4)).module for _ in range(2))

    def batches(epoch: int) -> Iterator[Batch]:
        yield (torch.randn(64, 4, generator=torch.Generator().manual_seed(epoch)),)

    trained, losses = distil(student, teacher, batches, Schedule(300, learning_rate=2e-2, weight_decay=0.0), seed=0)
    assert losses[-1] < 1e-4 < losses[0]
    assert torch.allclose(trained.a.weight, teacher.a.weight, atol=1e-2)  # type: ignore[union-attr,arg-type]
