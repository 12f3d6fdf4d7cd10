"""The coverage page of the documentation, written from the CSV files: `python -m benchmarks.coverage.table`."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "coverage.md"
TITLES = {
    "timm": "timm, one model per module file",
    "torchvision": "torchvision: classification, segmentation, video",
    "detection": "torchvision: detection",
    "transformers": "transformers",
    "torch": "layers of torch.nn",
}
PEERS = {
    "torch-pruning": "torch-pruning 1.6.1",
    "torch-pruning-heads": "the same, heads given by hand",
    "torch-kirigami": "torch-kirigami 0.2.1",
}
Row = dict[str, str]

HEAD = """# Coverage

Every model is traced without hints, pruned to half of its MACs with random choices over all its prune groups, proven
(masked = sliced, float64, on its example inputs), delivered, saved, reloaded bit for bit and trained for one step.
`make coverage` runs it; the numbers are in `benchmarks/results/coverage-*.csv`.

- **removed**: share of the MACs that went. **prunable**: share that goes when every group keeps one position.
- **result**: *eager* is the model's own class throughout; *hybrid* is its own class with graphs in the place of the
  submodules whose source fixes a size; *graph* is the graph of the whole.
- **own class**: share of the MACs that went where all had to stay the model's own class (`result="eager"`): prune
  groups that its source cannot express stay whole.
- Other libraries ran the same models with their defaults, asked for half of the channels, the layers of the outputs
  left alone, at least 60 seconds of processor time each (30 for most rows of torch-kirigami, which say so). *Works*
  there means: runs, the outputs keep their shapes and are finite, a quarter of the MACs is gone; whether the network is
  right was not checked. *Heads given by hand*: the models of timm whose attention has a fused projection and a head
  count; the others have nothing to be told.
"""

SPEED = """Processor time, one thread: the analysis alone of growing networks; then ResNet-50, here from the module to a
pruned and proven one, there from the module to a pruned one, both in turns in one run. Half of the time is tracing,
nearly all of it `torch.export` with a free batch. Then come the oracle, which takes 25 million weights through float64
twice, masked and whole, and the pruned class, which is found and compared with its graph. What the parts lack of the
whole is Python's garbage collector, which runs in every other round. No tracer would make it as short as pruning alone:
recording ResNet-50's operators with fake tensors and a fixed batch takes a fifth of a second by itself."""


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV file; none where it was not made."""
    if not path.exists():
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


def _share(value: str) -> str:
    return f"{float(value):.0%}" if value else "–"


def _is_own(row: Row) -> bool:
    return row["outcome"] == "works" and float(row["own_class_removed"] or 0) >= 0.25


def write_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def summarise(found: dict[str, list[Row]]) -> list[str]:
    """One line per collection: how many work, and in which form."""
    head = ("models", "run", "proven", "eager", "hybrid", "graph", "own class ≥ 25 %", "analysis, median / worst")
    lines = []
    for name, rows in found.items():
        good = [r for r in rows if r["outcome"] == "works"]
        kinds = [str(sum(r["result"] == kind for r in good)) for kind in ("eager", "hybrid", "graph")]
        seconds = [float(r["analysis_s"]) for r in rows if r["analysis_s"]]
        speed = f"{statistics.median(seconds):.3f} s / {max(seconds):.2f} s" if seconds else "–"
        own = f"{sum(map(_is_own, rows))}"
        lines.append((TITLES[name], str(len(rows)), str(len(good)), *kinds, own, speed))
    return write_table(head, lines)


def compare(found: dict[str, list[Row]]) -> list[str]:
    """One line per collection and library: outcomes."""
    lines = []
    for name in found:
        for library, title in PEERS.items():
            rows = read_rows(RESULTS / f"coverage-{library}-{name}.csv")
            if rows:
                outcomes = ("works", "wrong", "too little", "exception", "timeout")
                counts = [str(sum(r["outcome"] == o for r in rows)) for o in outcomes]
                lines.append((TITLES[name], title, str(len(rows)), *counts))
    head = ("models", "library", "run", "works", "wrong shapes", "too few MACs gone", "exception", "timeout")
    return write_table(head, lines)


def list_models(name: str, rows: list[Row]) -> list[str]:
    """One line per model."""
    others = {k: {r["model"]: r["outcome"] for r in read_rows(RESULTS / f"coverage-{k}-{name}.csv")} for k in PEERS}
    shown = [k for k, v in others.items() if v]
    head = ("model", "groups", "prunable", "removed", "result", "own class", "error", "export", "analysis", "memory")
    lines = []
    for row in rows:
        cells = [f"`{row['model']}`", row["groups"], _share(row["prunable"]), _share(row["removed"])]
        cells += [row["result"] if row["outcome"] == "works" else f"**{row['outcome']}**: {row['error'][:90]}"]
        cells += [_share(row["own_class_removed"])]
        cells += [f"{float(row['difference']):.0e}" if row["difference"] else "–"]
        cells += [f"{row['export_s']} s", f"{row['analysis_s']} s", f"{row['peak_mb']} MB"]
        lines.append((*cells, *(others[k].get(row["model"], "not run") for k in shown)))
    return write_table((*head, *(PEERS[k] for k in shown)), lines)


def list_speed() -> list[str]:
    """The growth of the analysis, and ResNet-50 beside a peer, as `make coverage-speed` measured them."""
    rows = read_rows(RESULTS / "analysis-speed.csv")
    lines = []
    for row in rows:
        what = f"{row['what']}, {row['blocks']} blocks, {row['nodes']} operators" if row["blocks"] else row["what"]
        time = f"{1000 * float(row['seconds']):.0f} ms" if row["seconds"] else ""
        times = f"{row['times']} times as long ({row['times_low']}–{row['times_high']}, 96 %)" if row["times"] else time
        lines.append((what, times))
    load = next((f"The machine's load average at the end of the run was {r['load']}." for r in rows if r["load"]), "")
    title = ["## Speed", "", *SPEED.splitlines(), ""]
    return [*title, *write_table(("what", "time"), lines), "", load, ""] if lines else []


def main() -> None:
    found = {name: read_rows(RESULTS / f"coverage-{name}.csv") for name in TITLES}
    found = {name: rows for name, rows in found.items() if rows}
    lines = [
        HEAD,
        "## Summary",
        "",
        *summarise(found),
        "",
        "## Other libraries",
        "",
        *compare(found),
        "",
        *list_speed(),
    ]
    for name, rows in found.items():
        opaque = sorted({o for r in rows for o in r["opaque"].split()})
        note = (
            f"Operators without a rule: {', '.join(f'`{o}`' for o in opaque)}."
            if opaque
            else "Every operator has a rule."
        )
        lines += [f"## {TITLES[name]}", "", note, "", *list_models(name, rows), ""]
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
    print(PAGE)


if __name__ == "__main__":
    main()
