"""The same models, pruned by other libraries with their defaults: `make coverage-peers`.

Each library prunes every model without hints but one: what computes the outputs is left alone, as their guides advise.
All are asked for half of the channels; torch-pruning once more with the head counts given by hand. `works`: the pruned
network runs, its outputs have their shapes and are finite, and at least a quarter of the MACs is gone. Whether it
computes the right thing is not checked.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.coverage.zoo import Case, find_case, list_tensors

COLUMNS = ("collection", "model", "family", "library", "outcome", "removed", "prune_s", "peak_mb", "stage", "error")
TIMEOUT_S = 150


def count_macs(model: nn.Module, args: Any, kwargs: Any) -> int:
    """Return multiply-accumulates of one call; torch's counter counts two operations for each."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


def find_last_layers(model: nn.Module, args: Any, kwargs: Any) -> list[nn.Module]:
    """Return the convolution and linear modules whose result is as wide as an output: classifiers and heads."""
    called: list[tuple[nn.Module, Tensor]] = []
    handles = [
        m.register_forward_hook(lambda m, _, y: called.append((m, y)))
        for m in model.modules()
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ]
    with torch.no_grad():
        outputs = list_tensors(model(*args, **kwargs))
    for handle in handles:
        handle.remove()
    widths = {w for y in outputs for w in y.shape[1:]}
    tail = called[-max(1, len(outputs)) :]
    return [m for m, y in tail if isinstance(y, Tensor) and widths & set(y.shape[1:])]


def prune_with_torch_pruning(model: nn.Module, args: Any, kwargs: Any, last: list[nn.Module], heads: bool) -> nn.Module:
    """MagnitudePruner, half of the channels, all else default; `heads`: its guide's recipe for attention."""
    import torch_pruning as tp

    options: dict[str, Any] = {}
    if heads:
        fused = [m for m in model.modules() if hasattr(m, "num_heads") and hasattr(m, "qkv")]
        options["num_heads"] = {m.qkv: m.num_heads for m in fused}
    example = kwargs or (args[0] if len(args) == 1 else tuple(args))
    pruner = tp.pruner.MagnitudePruner(
        model, example, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=last, **options,
    )  # fmt: skip
    pruner.step()
    for m in fused if heads else ():
        m.num_heads = pruner.num_heads[m.qkv]
        width = m.qkv.out_features if isinstance(m.qkv, nn.Linear) else m.qkv.out_channels
        for name in ("head_dim", "attn_dim", "all_head_dim"):
            if hasattr(m, name):
                setattr(m, name, width // 3 // (m.num_heads if name == "head_dim" else 1))
    return model


def prune_with_kirigami(model: nn.Module, args: Any, kwargs: Any, last: list[nn.Module]) -> nn.Module:
    """Greedy with group magnitudes, half of each axis; outputs keep their widths by its own contract."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import ChannelRatio, Greedy, GroupMagnitude, Pruner

    graph = DependencyGraph.build(model, args=tuple(args), kwargs=dict(kwargs))
    pruner = Pruner(model, graph=graph)
    strategy = Greedy(GroupMagnitude(p=2))
    pruned: nn.Module = pruner.prune(pruner.discover_candidates(), budget=ChannelRatio(0.5), strategy=strategy)[0]
    return pruned


LIBRARIES: dict[str, Callable[..., nn.Module]] = {
    "torch-pruning": lambda *given: prune_with_torch_pruning(*given, heads=False),
    "torch-pruning-heads": lambda *given: prune_with_torch_pruning(*given, heads=True),
    "torch-kirigami": prune_with_kirigami,
}


def run(case: Case, library: str) -> dict[str, Any]:
    """Return the row of one model and one library."""
    row = {"collection": case.collection, "model": case.name, "family": case.family, "library": library}
    row["stage"] = "build"
    try:
        torch.manual_seed(0)
        model, args, kwargs = case.build()
        before, shapes = count_macs(model, args, kwargs), _shapes(model, args, kwargs)
        last = find_last_layers(model, args, kwargs)
        row["stage"] = "prune"
        start = time.perf_counter()
        model = LIBRARIES[library](model, args, kwargs, last)
        row["prune_s"] = round(time.perf_counter() - start, 2)
        row["stage"] = "forward"
        found = _shapes(model, args, kwargs)
        row["removed"] = round(1 - count_macs(model, args, kwargs) / before, 3)
        row["stage"] = ""
        row["outcome"] = "wrong" if found != shapes else "too little" if row["removed"] < 0.25 else "works"
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is this model's row
        row["outcome"] = "exception"
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def _shapes(model: nn.Module, args: Any, kwargs: Any) -> list[tuple[int, ...]]:
    with torch.no_grad():
        outputs = list_tensors(model(*args, **kwargs))
    return [tuple(y.shape) if bool(torch.isfinite(y).all()) else () for y in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=TIMEOUT_S, help="seconds of processor time")
    parser.add_argument("library", choices=list(LIBRARIES))
    parser.add_argument("collection")
    parser.add_argument("name")
    given = parser.parse_args()
    torch.set_num_threads(1)
    # Processor time, not the clock's: another job on the machine must not make a timeout.
    # At the second limit the system kills.
    resource.setrlimit(resource.RLIMIT_CPU, (given.limit, given.limit + 5))
    warnings.simplefilter("ignore")
    print(json.dumps(run(find_case(given.collection, given.name), given.library)))


if __name__ == "__main__":
    main()
