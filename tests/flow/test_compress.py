"""The whole pipeline on a small trained network."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.flow.digits import BUDGET, QUICK, load_digits, make_test_batches, split_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import jettison as jt
from jettison.core.plain import read_json
from jettison.flow.compress import DELIVERABLES
from jettison.graph.store import read_tensors

FLOAT = jt.Recipe(samples=96, judges=32, positions=2000, steps=4, rounds=4, quantize=False)
"""No int8: two seconds instead of seven, for whatever does not depend on it."""


def find_variant(result: jt.Result, name: str) -> jt.core.record.Variant:  # type: ignore[name-defined]
    return next(v for v in result.record.variants if v.name == name)


def test_result_says_what_was_done(finished: jt.Result) -> None:
    record = finished.record
    assert record.met and record.unmet == ()
    assert all(c.passed for c in record.checks) and len(record.checks) >= 5
    original, small = find_variant(finished, "original"), find_variant(finished, "compressed")
    assert small.macs <= 0.5 * original.macs
    assert small.size_bytes is not None and original.size_bytes is not None
    assert small.size_bytes == finished.artifact.stat().st_size < original.size_bytes / 2
    assert small.parameters == sum(p.numel() for p in finished.model.parameters()) < original.parameters
    assert original.score is not None and original.score.value > 0.9 and original.score.n == 497
    assert record.drop.metric == "accuracy" and record.drop.n == 497
    assert small.score is not None
    assert record.drop.points == pytest.approx(100 * (original.score.value - small.score.value))
    assert record.drop.bound_points is not None and record.drop.bound_points > record.drop.points
    assert {s.name for s in record.stages} >= {"sensitivity", "plan", "recalibrate", "distil", "measurements", "checks"}
    assert record.model == "digits" and record.budget == {"macs": 0.5}
    assert sum(p.chosen for p in record.front) == 1
    assert finished.front == finished.plan.front and len(finished.front) > 1


def test_the_plan_is_what_was_built(finished: jt.Result) -> None:
    for group in finished.record.groups:
        kept = finished.plan.kept.get(group.name)
        assert group.after == (group.before if kept is None else len(kept))
    assert any(g.after < g.before for g in finished.record.groups)


def test_the_scores_are_those_of_the_file(finished: jt.Result) -> None:
    """Accuracy is counted anew with onnxruntime alone; 0.2 points are one sample of 497."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(finished.artifact))
    _, x, y = split_digits()
    output = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    score = find_variant(finished, "compressed").score
    assert score is not None
    assert abs(float((output.argmax(1) == y.numpy()).mean()) - score.value) < 0.0021


def test_files_and_round_trip(finished: jt.Result, tmp_path: Path) -> None:
    for name in DELIVERABLES:
        assert (finished.folder / name).stat().st_size > 0
    assert read_json(jt.Record, finished.folder / "record.json") == finished.record
    assert read_json(jt.Plan, finished.folder / "plan.json") == finished.plan
    page = (finished.folder / "report.html").read_text()
    assert "digits" in page and page.rstrip().endswith("</html>")
    assert not [p for p in finished.folder.iterdir() if p.name.endswith(".partial")]
    saved = finished.save(tmp_path / "deep" / "saved")
    assert sorted(p.name for p in saved.iterdir()) == sorted((*DELIVERABLES, "model.onnx"))
    for name in DELIVERABLES:
        assert (saved / name).read_bytes() == (finished.folder / name).read_bytes()
    assert finished.save(finished.folder) == finished.folder  # onto itself: nothing is lost
    assert (finished.folder / "model.onnx").stat().st_size > 0


def test_the_network_on_integers_comes_back(finished: jt.Result, tmp_path: Path) -> None:
    """From the run's folder and from a saved one: as many layers, and the very file that was exported."""
    example = torch.zeros([2, *split_digits()[0].shape[1:]])
    for folder in (finished.folder, finished.save(tmp_path / "saved")):
        found = jt.load_quantized(folder)
        assert found.sites and all(site.bits < 32 for site in found.sites)
        again = jt.export(found.module, example, tmp_path / "again.onnx")
        assert again.read_bytes() == finished.artifact.read_bytes()


def test_the_artefact_runs_without_torch(finished: jt.Result, tmp_path: Path) -> None:
    example = finished.record.load_example
    script = (
        f"import sys\nsys.modules['torch'] = None\nsys.modules['jettison'] = None\n{example}\nprint(outputs[0].shape)"
    )
    saved = finished.save(tmp_path / "saved")
    done = subprocess.run([sys.executable, "-c", script], cwd=saved, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 10)"


def test_load_in_a_fresh_process_is_bit_equal(finished: jt.Result, tmp_path: Path) -> None:
    saved = finished.save(tmp_path / "saved")
    x = split_digits()[1][:32]
    with torch.no_grad():
        expected = finished.model(x).numpy()
    np.savez(tmp_path / "data.npz", x=x.numpy(), expected=expected)
    script = (
        "import sys, numpy as np, torch, jettison as jt\n"
        "torch.set_num_threads(1)\n"
        "data = np.load(sys.argv[2])\n"
        "with torch.no_grad(): found = jt.load(sys.argv[1])(torch.from_numpy(data['x'])).numpy()\n"
        "assert found.tobytes() == data['expected'].tobytes()\n"
    )
    arguments = [sys.executable, "-c", script, str(saved), str(tmp_path / "data.npz")]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_callers_things_stay_as_they_are(model: nn.Module) -> None:
    model.train()
    model.norm.eval()  # a frozen BatchNorm stays frozen
    model.stem.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    addresses = {k: v.data_ptr() for k, v in model.state_dict().items()}
    flags = {n: m.training for n, m in model.named_modules()}
    learns = {n: p.requires_grad for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(TensorDataset(*load_digits()), batch_size=64, shuffle=True, generator=generator)
    before = (torch.get_rng_state(), generator.get_state(), random.getstate(), np.random.get_state()[1].tolist())
    result = jt.compress(
        model, loader, budget=BUDGET, recipe=FLOAT, evaluate=jt.accuracy(make_test_batches()), quiet=True
    )
    after = (torch.get_rng_state(), generator.get_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2:] == after[2:]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) and value.data_ptr() == addresses[name], name
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert {n: p.requires_grad for n, p in model.named_parameters()} == learns
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight)) and model.inner.weight.grad is None
    assert torch.is_grad_enabled() and torch.get_num_threads() == 1
    shared = {p.data_ptr() for p in result.model.parameters()} & set(addresses.values())
    assert not shared, "training the result further would change the original"
    find = find_variant(result, "original").score
    assert find is not None and find.value > 0.9  # a network in train mode is traced in eval mode


class TwoInputs(nn.Module):
    """A dict of pictures and an offset in; a dict with a nested pair out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: Tensor, offset: Tensor) -> dict[str, object]:
        logits = self.inner(image + offset[:, None, None, None])
        return {"logits": logits, "more": (logits.softmax(1), image.mean((1, 2, 3)))}


def make_two_inputs(order: tuple[str, ...]) -> list[dict[str, Tensor]]:
    x, y = load_digits()
    made = []
    for start in range(0, 256, 64):
        entries = {"image": x[start : start + 64], "offset": torch.zeros(64), "label": y[start : start + 64]}
        made.append({k: entries[k] for k in order})
        order = order[::-1]  # the order of the keys may change from item to item
    return made


def test_dict_inputs_with_labels_and_nested_outputs(model: nn.Module, tmp_path: Path) -> None:
    _, x, y = split_digits()

    def score(predict: object) -> Tensor:
        output = predict(offset=torch.zeros(len(x)), image=x)  # type: ignore[operator]
        assert set(output) == {"logits", "more"} and output["more"][1].shape == (len(x),)
        return (output["logits"].argmax(1) == y).float()

    items = make_two_inputs(("label", "offset", "image"))
    result = jt.compress(TwoInputs(model), items, budget=BUDGET, recipe=FLOAT, evaluate=score, quiet=True)
    assert result.record.drop.metric == "score"
    assert {t.name for t in result.record.inputs} == {"image", "offset"} and len(result.record.outputs) == 3
    loaded = jt.load(result.save(tmp_path / "saved"))
    arguments = {"image": x[:5], "offset": torch.zeros(5)}
    with torch.no_grad():
        found, expected = loaded(**arguments), result.model(**arguments)
    assert torch.equal(found["logits"], expected["logits"]) and torch.equal(found["more"][0], expected["more"][0])


@pytest.mark.slow
def test_tuple_items_without_evaluate(model: nn.Module) -> None:
    x, y = load_digits()
    loader = DataLoader(TensorDataset(x[:600], torch.zeros(600), y[:600]), batch_size=50, shuffle=True)
    result = jt.compress(TwoInputs(model), loader, budget=BUDGET, recipe=FLOAT, quiet=True)
    drop = result.record.drop
    assert drop.metric == "agreement" and drop.n is not None and 80 < drop.n < 160  # a fifth of 600
    assert any("agree" in n or "names another class" in n for n in result.record.notes)


class FixedBatch(nn.Module):
    """Writes its batch of 16 into a reshape."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).reshape(16, 10)


@pytest.mark.parametrize("labelled", [True, False])
def test_fixed_batch(model: nn.Module, labelled: bool) -> None:
    """300 samples in 18 batches of 16 and one of 12; the latter, and what sealing leaves over, is regrouped."""
    x, tests, labels = split_digits()
    batches = [(a, b) for a, b in zip(tests.split(16), labels.split(16), strict=True) if len(a) == 16]
    evaluate = jt.accuracy(batches) if labelled else None
    result = jt.compress(
        FixedBatch(model), list(x[:300].split(16)), budget=BUDGET, recipe=FLOAT, evaluate=evaluate, quiet=True
    )
    assert result.record.inputs[0].shape == (16, 1, 8, 8)
    assert any("batch" in n for n in result.record.notes)
    assert result.model(tests[:16]).shape == (16, 10)


@pytest.mark.slow
def test_fixed_batch_int8(model: nn.Module) -> None:
    x = split_digits()[0]
    recipe = jt.Recipe(samples=40, judges=20, positions=2000, steps=4, rounds=4)
    result = jt.compress(FixedBatch(model), list(x[:400].split(16)), budget=BUDGET, recipe=recipe, quiet=True)
    assert all(c.passed for c in result.record.checks)


def test_quantization_alone(model: nn.Module) -> None:
    recipe = jt.Recipe(samples=96, judges=32, rounds=4, prune=False)
    result = jt.compress(model, split_digits()[0], budget=jt.Budget(size=0.5), recipe=recipe, quiet=True)
    assert result.plan.kept == {} and all(g.after == g.before for g in result.record.groups)
    assert find_variant(result, "compressed").precision == "int8"
    assert any(layer.integer for layer in result.record.layers)


def test_neither_pruning_nor_quantization_deploys_the_original(model: nn.Module) -> None:
    recipe = jt.Recipe(samples=96, judges=32, rounds=4, prune=False, quantize=False)
    result = jt.compress(model, split_digits()[0], budget=jt.Budget(drop=0.0), recipe=recipe, quiet=True)
    assert result.record.met and result.record.drop.points == 0
    x = split_digits()[1]
    with torch.no_grad():
        assert torch.allclose(result.model(x), model(x), atol=1e-5)


def test_float_result(model: nn.Module) -> None:
    result = jt.compress(model, split_digits()[0], budget=BUDGET, recipe=FLOAT, quiet=True)
    small = find_variant(result, "compressed")
    assert small.precision == "fp32" and {v.name for v in result.record.variants} >= {"original", "PyTorch eager"}
    assert "int8 alone" not in {v.name for v in result.record.variants}
    assert all(layer.bits == 32 for layer in result.record.layers)
    x = split_digits()[1]
    import onnxruntime

    found = onnxruntime.InferenceSession(str(result.artifact)).run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        assert np.abs(found - result.model(x).numpy()).max() < 1e-4


@pytest.mark.parametrize("quantize", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("share", [0.8, 0.4])
def test_size_budget_is_kept(model: nn.Module, share: float, quantize: bool) -> None:
    recipe = jt.Recipe(samples=96, judges=32, positions=2000, steps=2, rounds=4, quantize=quantize)
    share = share / 2 if quantize else share  # the int8 file alone is at 0.34
    result = jt.compress(model, split_digits()[0], budget=jt.Budget(size=share), recipe=recipe, quiet=True)
    assert result.record.met, result.record.unmet


def test_absolute_budgets_and_several_at_once(model: nn.Module) -> None:
    budget = jt.Budget(mmacs=0.4, size_mb=0.05, macs=0.9)
    result = jt.compress(model, split_digits()[0], budget=budget, recipe=FLOAT, quiet=True)
    small = find_variant(result, "compressed")
    assert small.macs <= 0.4e6 and small.size_bytes is not None and small.size_bytes <= 50_000
    assert result.record.budget == {"mmacs": 0.4, "size_mb": 0.05, "macs": 0.9}


def test_latency_budget(model: nn.Module) -> None:
    """An absolute limit that this network keeps many times over, so that a busy machine cannot fail it."""
    result = jt.compress(model, split_digits()[0], budget=jt.Budget(latency_ms=50.0), recipe=FLOAT, quiet=True)
    assert result.record.met and result.plan.cost.latency_ms is not None


def test_drop_only(model: nn.Module) -> None:
    """With only a drop to keep, the network shrinks for as long as it still agrees; 100 points allow anything."""
    result = jt.compress(model, split_digits()[0], budget=jt.Budget(drop=100.0), recipe=FLOAT, quiet=True)
    assert any(g.after < g.before for g in result.record.groups)


def test_protected_groups_keep_all(model: nn.Module) -> None:
    recipe = jt.Recipe(samples=96, judges=32, steps=2, rounds=4, quantize=False, protect=("inner",))
    result = jt.compress(model, split_digits()[0], budget=jt.Budget(macs=0.7), recipe=recipe, quiet=True)
    widths = {g.name: (g.before, g.after) for g in result.record.groups}
    assert widths["inner"] == (32, 32) and any(a < b for b, a in widths.values())


@pytest.mark.slow
def test_inside_no_grad_and_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        x = split_digits()[0] * 1.0  # made in inference mode: autograd refuses such tensors
        result = jt.compress(model, x, budget=BUDGET, recipe=FLOAT, quiet=True)
    with torch.no_grad():
        again = jt.compress(model, x, budget=BUDGET, recipe=FLOAT, quiet=True)
    assert "distil" in {s.name for s in result.record.stages}
    assert result.plan == again.plan


@pytest.mark.parametrize("batch", [1, 7])
def test_small_batches(model: nn.Module, batch: int) -> None:
    loader = DataLoader(TensorDataset(split_digits()[0][:90]), batch_size=batch)
    result = jt.compress(model, loader, budget=BUDGET, recipe=FLOAT, quiet=True)
    assert result.record.met and result.record.inputs[0].shape == (None, 1, 8, 8)


@pytest.mark.slow
def test_five_samples(model: nn.Module) -> None:
    x = split_digits()[0][:5]
    result = jt.compress(model, x, budget=BUDGET, recipe=QUICK, evaluate=jt.accuracy(make_test_batches()), quiet=True)
    assert result.record.met


class Tokens(nn.Module):
    """Integer inputs: digits' rows as words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 16)
        self.hidden = nn.Linear(16, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.embed(ids).mean(1))))


@pytest.mark.parametrize("quantize", [False, True])
def test_integer_inputs(quantize: bool) -> None:
    ids = (load_digits()[0].reshape(-1, 64) * 16).long()
    recipe = jt.Recipe(samples=96, judges=32, steps=4, rounds=4, quantize=quantize)
    torch.manual_seed(0)
    model = Tokens()
    result = jt.compress(model, ids, budget=jt.Budget(macs=0.6), recipe=recipe, quiet=True)
    assert result.record.inputs[0].dtype == "int64"
    assert result.model(ids[:3]).shape == (3, 10)


class NoGroups(nn.Module):
    """One layer whose outputs are the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class NoLayers(nn.Module):
    """Nothing with weights at all."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).flatten(1) * 2.0


@pytest.mark.parametrize("network", [NoGroups, NoLayers])
@pytest.mark.parametrize(
    ("quantize", "budget"),
    [(True, jt.Budget(macs=1.0)), (False, jt.Budget(drop=60.0)), (False, jt.Budget(latency_ms=50.0))],
)
def test_networks_with_nothing_to_prune(network: type[nn.Module], quantize: bool, budget: jt.Budget) -> None:
    recipe = jt.Recipe(samples=64, judges=32, rounds=4, quantize=quantize)
    result = jt.compress(network(), split_digits()[0], budget=budget, recipe=recipe, quiet=True)
    assert result.plan.kept == {} and result.record.groups == ()


@pytest.mark.slow
def test_same_seed_same_result_and_shuffling_is_seeded(model: nn.Module, tmp_path: Path) -> None:
    plans, weights = [], []
    for name in ("a", "b"):
        torch.manual_seed(ord(name))  # what the caller drew before must not matter
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(TensorDataset(*load_digits()), batch_size=64, shuffle=True, generator=generator)
        evaluate = jt.accuracy(make_test_batches())
        result = jt.compress(
            model, loader, budget=BUDGET, recipe=FLOAT, evaluate=evaluate, quiet=True, out=tmp_path / name
        )
        plans.append((result.folder / "plan.json").read_bytes())
        weights.append(read_tensors(result.folder / "model.safetensors"))
    assert plans[0] == plans[1] and weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Attention(nn.Module):
    """Rows as tokens: products of two activations, whose MACs belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.mix = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2))
        x = x + self.mix(x, x, x, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


def make_weight_norm() -> nn.Module:
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 16, 3))
    return nn.Sequential(nn.Dropout(0.5), first, nn.Flatten(), nn.Linear(16 * 36, 10))


def make_transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 16, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


@pytest.mark.parametrize("make", [Attention, make_weight_norm, make_transposed])
@pytest.mark.parametrize("quantize", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_networks_with_arithmetic_outside_layers(make: type[nn.Module], quantize: bool) -> None:
    torch.manual_seed(0)
    recipe = jt.Recipe(samples=96, judges=32, positions=2000, steps=4, rounds=4, quantize=quantize)
    result = jt.compress(make(), split_digits()[0], budget=jt.Budget(macs=0.95), recipe=recipe, quiet=True)
    assert find_variant(result, "compressed").macs <= result.plan.cost.macs


@pytest.mark.slow
def test_channels_last(model: nn.Module) -> None:
    last = model.to(memory_format=torch.channels_last)
    result = jt.compress(last, split_digits()[0], budget=BUDGET, recipe=FLOAT, quiet=True)
    assert result.record.met and last.stem.weight.is_contiguous(memory_format=torch.channels_last)
