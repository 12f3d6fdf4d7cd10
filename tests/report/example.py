"""Records to draw: one that looks real, and those that go wrong. All figures are made up."""

from __future__ import annotations

import math
from dataclasses import replace

from jettison.core.record import (
    Check,
    Drop,
    FrontPoint,
    FrozenPart,
    GroupRecord,
    Interval,
    LayerRecord,
    Option,
    Record,
    Score,
    Stage,
    Tensor,
    TimeShare,
    Variant,
)

HOSTILE = '<script>alert("x")</script>"\' onload=alert(1) {{7*7}} </style></title>'
RTL = "\u202eתרנגול\u202c ملف/النموذج.onnx"
LONG = "backbone.stages.3.blocks.11.attention.projection.weight_quantized_per_channel_" * 6

WIDTHS: dict[str, tuple[tuple[str, ...], int, int, float]] = {
    "stem": (("stem.conv", "stages.0.0.conv2", "stages.0.1.conv2"), 32, 20, 0.31),
    "stages.0.0.inner": (("stages.0.0.conv1",), 32, 12, 0.05),
    "stages.0.1.inner": (("stages.0.1.conv1",), 32, 8, 0.03),
    "stages.1": (("stages.1.0.conv2", "stages.1.0.shortcut", "stages.1.1.conv2"), 64, 36, 0.22),
    "stages.1.0.inner": (("stages.1.0.conv1",), 64, 28, 0.06),
    "stages.1.1.inner": (("stages.1.1.conv1",), 64, 16, 0.018),
    "stages.2": (("stages.2.0.conv2", "stages.2.0.shortcut"), 128, 60, 0.11),
    "stages.2.0.inner": (("stages.2.0.conv1",), 128, 40, 0.026),
    "head.conv": (("head.conv",), 128, 128, 0.4),
}

# name, operator, output positions × kernel taps, inputs, outputs: groups by name, or a fixed width
LAYERS: tuple[tuple[str, str, int, str | int, str | int], ...] = (
    ("stem.conv", "conv2d", 784 * 9, 1, "stem"),
    ("stages.0.0.conv1", "conv2d", 784 * 9, "stem", "stages.0.0.inner"),
    ("stages.0.0.conv2", "conv2d", 784 * 9, "stages.0.0.inner", "stem"),
    ("stages.0.1.conv1", "conv2d", 784 * 9, "stem", "stages.0.1.inner"),
    ("stages.0.1.conv2", "conv2d", 784 * 9, "stages.0.1.inner", "stem"),
    ("stages.1.0.conv1", "conv2d", 196 * 9, "stem", "stages.1.0.inner"),
    ("stages.1.0.conv2", "conv2d", 196 * 9, "stages.1.0.inner", "stages.1"),
    ("stages.1.0.shortcut", "conv2d", 196, "stem", "stages.1"),
    ("stages.1.1.conv1", "conv2d", 196 * 9, "stages.1", "stages.1.1.inner"),
    ("stages.1.1.conv2", "conv2d", 196 * 9, "stages.1.1.inner", "stages.1"),
    ("stages.2.0.conv1", "conv2d", 49 * 9, "stages.1", "stages.2.0.inner"),
    ("stages.2.0.conv2", "conv2d", 49 * 9, "stages.2.0.inner", "stages.2"),
    ("stages.2.0.shortcut", "conv2d", 49, "stages.1", "stages.2"),
    ("head.conv", "conv2d", 49, "stages.2", "head.conv"),
    ("fc", "linear", 1, "head.conv", 10),
)


def width(name: str | int, after: bool) -> int:
    """Channels of a group, or the fixed width itself."""
    if isinstance(name, int):
        return name
    _, before, kept, _ = WIDTHS[name]
    return kept if after else before


def layer_macs(index: int, after: bool) -> int:
    """MACs of one layer from its widths."""
    _, _, taps, source, sink = LAYERS[index]
    return taps * width(source, after) * width(sink, after)


def make_layers() -> tuple[LayerRecord, ...]:
    """The 15 layers with their arithmetic."""
    return tuple(
        LayerRecord(
            name=name,
            operator=operator,
            bits=32 if name == "stem.conv" else 8,
            macs_before=layer_macs(i, False),
            macs_after=layer_macs(i, True),
            sqnr_db=None if name == "stem.conv" else 41.0 - 1.13 * i + 3.1 * math.sin(i * 1.7),
            integer=None if name == "fc" else name != "stem.conv",
        )
        for i, (name, operator, *_) in enumerate(LAYERS)
    )


def make_groups() -> tuple[GroupRecord, ...]:
    """The prune groups with tables of eight options each."""
    total = sum(layer_macs(i, False) for i in range(len(LAYERS)))
    groups = []
    for name, (layers, before, after, weight) in WIDTHS.items():
        keeps = sorted({after, before} | {round(before * s / 8) for s in range(1, 8)})
        options = tuple(
            Option(
                k, 0.0 if k == before else weight * (1 - k / before) ** 2.4, int(total * (0.9 + 0.1 * k / before)), None
            )
            for k in keeps
        )
        groups.append(GroupRecord(name, layers, before, after, options))
    return tuple(groups)


def make_front() -> tuple[FrontPoint, ...]:
    """Fourteen plans from nearly everything kept to nearly nothing."""
    after = sum(layer_macs(i, True) for i in range(len(LAYERS)))
    points = [FrontPoint(round(after * 1.24**s), 0.36 * 1.2**s, 0.046 / 1.5**s, s == 0) for s in range(-4, 8)]
    return tuple(sorted(points, key=lambda p: p.macs))


def make_times() -> tuple[tuple[TimeShare, ...], tuple[TimeShare, ...]]:
    """Time per node, before and after, summing to about the measured latencies."""
    layers = make_layers()
    macs = sum(layer.macs_before for layer in layers)
    before = [TimeShare(f"/{x.name}/Conv", "FusedConv", 1.62 * x.macs_before / macs + 0.006) for x in layers[:-1]]
    before += [TimeShare(f"/add_{i}", "Add", 0.019 - 0.003 * i) for i in range(5)]
    before += [TimeShare("/pool", "GlobalAveragePool", 0.011), TimeShare("/fc/Gemm", "Gemm", 0.007)]
    macs = sum(layer.macs_after for layer in layers)
    after = [
        TimeShare(f"/{x.name}/Conv_quant", "QLinearConv", 0.27 * x.macs_after / macs + 0.003) for x in layers[1:-1]
    ]
    after += [
        TimeShare("/stem.conv/Conv", "FusedConv", 0.021),
        TimeShare("/input/QuantizeLinear", "QuantizeLinear", 0.008),
    ]
    after += [TimeShare(f"/add_{i}_quant", "QLinearAdd", 0.008 - 0.001 * i) for i in range(5)]
    after += [TimeShare("/pool_quant", "QLinearGlobalAveragePool", 0.004), TimeShare("/fc/Gemm_quant", "QGemm", 0.003)]
    return tuple(before), tuple(after)


LOAD_EXAMPLE = """import numpy as np, onnxruntime as ort
session = ort.InferenceSession("model.onnx")
images = np.zeros((1, 1, 28, 28), np.float32)      # scaled to 0..1
logits = session.run(None, {"input": images})[0]
print(logits.argmax(1))"""


def make_variants() -> tuple[Variant, ...]:
    """What the user runs today, the baseline, int8 alone, smaller alone, and both."""
    before = sum(layer_macs(i, False) for i in range(len(LAYERS)))
    after = sum(layer_macs(i, True) for i in range(len(LAYERS)))

    def variant(
        name: str,
        runtime: str,
        precision: str,
        file: str | None,
        ms: tuple[float, float, float],
        faster: tuple[float, float, float],
        size: int | None,
        small: bool,
        memory: int | None,
        score: float,
    ) -> Variant:
        return Variant(
            name,
            runtime,
            precision,
            file,
            Interval(*ms),
            Interval(*faster),
            size,
            after if small else before,
            112_922 if small else 366_858,
            memory,
            Score("accuracy", score, 10_000),
        )

    return (
        variant(
            "PyTorch eager",
            "eager",
            "fp32",
            None,
            (3.412, 3.308, 3.871),
            (0.551, 0.538, 0.562),
            None,
            False,
            None,
            0.9352,
        ),
        variant(
            "original",
            "onnxruntime",
            "fp32",
            "original.onnx",
            (1.879, 1.851, 1.962),
            (1.0, 1.0, 1.0),
            1_481_220,
            False,
            14_680_064,
            0.9352,
        ),
        variant(
            "int8 alone",
            "onnxruntime",
            "int8",
            "int8.onnx",
            (0.7512, 0.7401, 0.8023),
            (2.501, 2.452, 2.559),
            398_104,
            False,
            9_961_472,
            0.9347,
        ),
        variant(
            "pruned alone",
            "onnxruntime",
            "fp32",
            "pruned.onnx",
            (0.8231, 0.8102, 0.8711),
            (2.283, 2.241, 2.318),
            461_870,
            True,
            8_388_608,
            0.9324,
        ),
        variant(
            "pruned + int8",
            "onnxruntime",
            "int8",
            "model.onnx",
            (0.3627, 0.3551, 0.3888),
            (5.181, 5.042, 5.309),
            139_264,
            True,
            6_291_456,
            0.9311,
        ),
    )


def make_example() -> Record:
    """A run as it should go: everything measured, budget met."""
    before, after = make_times()
    return Record(
        format="jettison-record-1",
        version="0.1.0",
        created="2026-11-22T18:04:11+00:00",
        command="jettison compress examples.fashion:network --budget latency=0.25 --drop 1.0 --out runs/fashion",
        model="examples.fashion:network",
        target="onnxruntime",
        inputs=(Tensor("input", (None, 1, 28, 28), "float32"),),
        outputs=(Tensor("logits", (None, 10), "float32"),),
        seed=0,
        budget={"latency": 0.25, "size": 0.2, "drop": 1.0},
        met=True,
        unmet=(),
        environment={
            "cpu": "Example CPU @ 2.50 GHz, 2 cores",
            "threads": "1",
            "os": "Linux 6.1, Debian 12",
            "python": "3.11.2",
            "torch": "2.13.0+cpu",
            "onnxruntime": "1.32.0",
        },
        variants=make_variants(),
        baseline="original",
        compressed="pruned + int8",
        drop=Drop("accuracy", 0.41, 0.6834, 0.95, 10_000),
        groups=make_groups(),
        front=make_front(),
        layers=make_layers(),
        time_before=before,
        time_after=after,
        checks=(
            Check("masked = sliced", True, 3.1e-14, 1e-9, "largest difference of logits in float64, 64 images"),
            Check(
                "simulated int8 = runtime",
                True,
                0.0117,
                0.05,
                "largest difference of logits, in steps of the output scale",
            ),
            Check("reloaded = saved", True, 0.0, 0.0, "bit by bit, in a fresh process"),
            Check("drop within the budget", True, 0.6834, 1.0, "one-sided 95 % bound in points"),
        ),
        frozen=(
            FrozenPart("fc output", "the network's output has a fixed size", ""),
            FrozenPart("head.conv", "its channels are flattened with a written-out size", "examples/fashion.py:58"),
        ),
        notes=(
            "Labels were used only to measure; recovery learnt from the original network.",
            "stem.conv stays in fp32: int8 would cost 0.2 points and save 0.004 ms.",
        ),
        stages=tuple(
            Stage(n, s)
            for n, s in (
                ("trace", 1.8),
                ("sensitivity", 38.4),
                ("plan", 0.4),
                ("apply", 0.2),
                ("recover", 141.9),
                ("quantize", 9.7),
                ("export", 4.1),
                ("measure", 22.6),
                ("verify", 11.3),
            )
        ),
        load_example=LOAD_EXAMPLE,
    )


def make_failed() -> Record:
    """Failing checks, an unmet budget, slower and bigger than before, and no bound."""
    record = make_example()
    *others, last = record.variants
    worse = replace(
        last,
        latency_ms=Interval(2.21, 2.1, 2.6),
        speedup=Interval(0.85, 0.81, 0.89),
        size_bytes=1_720_000,
        score=Score("agreement", 0.871, None),
    )
    return replace(
        record,
        met=False,
        unmet=(
            "latency is 1.18 of the original's, above the limit of 0.25",
            "drop is 6.42 points, above the limit of 1.0",
        ),
        variants=(*others, worse),
        drop=Drop("agreement", 6.42, None, 0.95, None),
        checks=(
            Check("masked = sliced", False, 0.31, 1e-9, "largest difference of logits in float64"),
            Check("simulated int8 = runtime", False, math.inf, 0.05, "the runtime returned NaN"),
            Check("reloaded = saved", True, 0.0, 0.0, "bit by bit"),
        ),
    )


def make_empty() -> Record:
    """Nothing could be measured or listed."""
    return replace(
        make_example(),
        command="",
        model="",
        inputs=(),
        outputs=(),
        budget={},
        environment={},
        variants=(),
        groups=(),
        front=(),
        layers=(),
        time_before=(),
        time_after=(),
        checks=(),
        frozen=(),
        notes=(),
        stages=(),
        load_example="",
        drop=Drop("evaluate", 0.0, None, 0.95, None),
    )


def make_sparse() -> Record:
    """Lists are there, their optional fields are None; intervals have no width."""
    record = make_example()
    return replace(
        record,
        variants=tuple(
            replace(
                v,
                size_bytes=None,
                peak_memory_bytes=None,
                score=None,
                latency_ms=Interval(2.0, 2.0, 2.0),
                speedup=Interval(1.0, 1.0, 1.0),
            )
            for v in record.variants
        ),
        groups=tuple(replace(g, options=()) for g in record.groups),
        front=(FrontPoint(1_000_000, None, 0.0, False),),
        layers=tuple(replace(x, sqnr_db=None, integer=None, macs_before=0, macs_after=0) for x in record.layers),
        time_before=(),
        drop=Drop("agreement", 0.0, None, 0.95, 40),
    )


def make_huge() -> Record:
    """200 layers, 300 groups, 900 nodes, 400 plans, long names."""
    record = make_example()
    layers = tuple(
        LayerRecord(
            f"{LONG}{i}" if i % 50 == 7 else f"blocks.{i}.conv",
            "conv2d",
            8,
            10_000_000 + 7919 * (i * 37 % 200) ** 2,
            2_000_000 + 5003 * (i * 53 % 200) ** 2,
            30.0 + i % 11,
            True,
        )
        for i in range(200)
    )
    groups = tuple(
        replace(
            record.groups[i % 9],
            name=f"{LONG}{i}" if i % 40 == 0 else f"group.{i}",
            layers=tuple(f"blocks.{i}.conv{k}" for k in range(1 + i % 30)),
        )
        for i in range(300)
    )
    nodes = tuple(TimeShare(f"/node/{i}", f"Operator{i % 23}", 3.0 / (1 + i * 13 % 900)) for i in range(900))
    front = tuple(FrontPoint(20_000_000 * (i + 20), None, 2.0 / (i + 1), i == 80) for i in range(400))
    return replace(
        record,
        model=LONG,
        layers=layers,
        groups=groups,
        time_before=nodes,
        time_after=nodes[:500],
        front=front,
        frozen=tuple(
            FrozenPart(f"blocks.{i}.attn", "a size is written into the source", f"model.py:{i}") for i in range(90)
        ),
        notes=tuple(f"Note {i}." for i in range(60)),
    )


def make_hostile() -> Record:
    """Every string is an attack, or written from right to left, or endless."""
    bad = f"{HOSTILE} {RTL} \x1b[31m\x00"
    record = make_example()
    names = {v.name: f"{bad} {v.name}" for v in record.variants}
    return replace(
        record,
        version=bad,
        created=bad,
        command=bad + LONG,
        model=bad,
        target=bad,
        met=False,
        unmet=(bad, LONG),
        inputs=(Tensor(bad, (None, 1), bad),),
        outputs=(Tensor(LONG, (), bad),),
        budget={bad: 1.0, "drop": 1.0},
        environment={bad: bad, "path": LONG},
        variants=tuple(
            replace(v, name=names[v.name], runtime=bad, precision=bad, file=bad, score=Score(bad, 0.5, 7))
            for v in record.variants
        ),
        baseline=names[record.baseline],
        compressed=names[record.compressed],
        drop=replace(record.drop, metric=bad),
        groups=tuple(replace(g, name=f"{bad}{i}", layers=(bad, LONG)) for i, g in enumerate(record.groups)),
        layers=tuple(replace(x, name=bad + x.name, operator=bad) for x in record.layers),
        time_before=(TimeShare(bad, bad, 1.0), TimeShare(LONG, LONG, 2.0)),
        time_after=(TimeShare(bad, bad, 0.5),),
        checks=(Check(bad, True, 0.1, 1.0, bad), Check(LONG, False, 2.0, 1.0, LONG)),
        frozen=(FrozenPart(bad, bad, bad), FrozenPart(LONG, LONG, LONG)),
        notes=(bad, LONG),
        stages=(Stage(bad, 1.0),),
        load_example=bad,
    )
