"""The page of the documentation, written from the CSV file: `python -m benchmarks.prune_quantize.table`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.coverage.table import Row, read_rows, write_table
from benchmarks.prune_quantize.__main__ import PATH

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "prune-quantize.md"
NEARLY_ALL = 0.99
"""A model with a smaller share of its MACs on integers is listed with the reason."""

HEAD = """# Pruned, then quantized

A sample of the [zoo](coverage.md), at small sizes, with random weights: pruned to half of its MACs with
`jettison.prune`, quantized to int8 for ONNX Runtime with `jettison.quantize`, exported, run and audited there, saved
with `Quantized.save`, and reloaded with `jettison.load_quantized` in a fresh process, which runs it and exports it
again. Each step takes what the one before gave; nothing is traced by hand. `make prune-quantize` runs it, one thread, a
process for each model; the numbers are in `benchmarks/results/prune-quantize.csv`.

- **removed**: share of the MACs that pruning took. **result**: what `prune` gave, see [coverage](coverage.md).
- **on integers**: share of the MACs of convolutions and linear layers that ONNX Runtime's own graph computes on
  integers.
- **steps**: the largest difference between the simulation (the module) and the runtime, in 255ths of an output's range;
  **within one**: the share of outputs at most one such step apart. **runtime**, **float**: the simulation's signal over
  its difference from the runtime, and the float network's over its difference from the simulation. The first must be
  the larger: a runtime that is farther from the simulation than int8 is from float counts as wrong.
- **reload**: outputs of the reloaded module, bit by bit. **file**: the file it exports, byte by byte.
"""


def summarise(rows: list[Row]) -> str:
    """Return the counts in one sentence."""
    good = [r for r in rows if r["outcome"] == "works"]
    whole = sum(float(r["integer_share"] or 0) >= NEARLY_ALL for r in good)
    bytes_equal = sum(r["file"] == "byte-equal" for r in good)
    bits_equal = sum(r["reload"] == "bit-equal" for r in good)
    return (
        f"{len(good)} of {len(rows)} models go through; {bits_equal} reload bit-equal, {bytes_equal} export the same "
        f"bytes again, and {whole} run at least {NEARLY_ALL:.0%} of those MACs on integers."
    )


def list_models(rows: list[Row]) -> list[str]:
    """One line per model."""
    head = (
        "model", "MACs", "removed", "result", "on integers", "steps", "within one", "runtime", "float", "reload",
        "file",
    )  # fmt: skip
    lines = []
    for row in rows:
        cells = [f"`{row['model']}`", f"{float(row['macs'] or 0) / 1e6:.3g} M", _percent(row["removed"]), row["result"]]
        if row["outcome"] != "works":
            failed = f"**{row['outcome']}** ({row['stage']}): {row['error'][:120]}"
            lines.append((*cells, failed, *[""] * (len(head) - len(cells) - 1)))
            continue
        cells += [_percent(row["integer_share"]), f"{float(row['steps']):.2g}", f"{float(row['within_a_step']):.2%}"]
        cells += [f"{float(row['runtime_db']):.0f} dB", f"{float(row['float_db']):.0f} dB", row["reload"], row["file"]]
        lines.append(tuple(cells))
    return write_table(head, lines)


def _percent(value: str) -> str:
    return f"{float(value):.1%}" if value else "–"


def explain(rows: list[Row]) -> list[str]:
    """Say of each model that runs in part on floats which layers do, and on which kernels."""
    short = [r for r in rows if r["outcome"] == "works" and float(r["integer_share"] or 0) < NEARLY_ALL]
    if not short:
        return []
    said = (
        "The layers with the most MACs that are not on integers, with their kernels. For transposed convolutions ONNX "
        "Runtime's CPU provider has no integer kernel; OpenVINO has one."
    )
    named = (f"- `{r['model']}`: {r['left_in_float'].replace(' ', ', ')}" for r in short)
    return ["## Partly on floats", "", said, "", *named, ""]


def main() -> None:
    rows = read_rows(PATH)
    lines = [HEAD, summarise(rows), "", *list_models(rows), "", *explain(rows)]
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
    print(PAGE)


if __name__ == "__main__":
    main()
