"""
Growth with the number of streams: a table and a figure of what bench.py measured.

    python bench.py --sweep_streams=2,4,8,16,32 --clock=processor --out=results/growth/streams.json
    python bench.py --sweep_streams=2,4,8,16,32 --clock=processor --out=results/growth/input.json \\
        --sees=input --readout=learned
    python -m dev.growth results/growth           # table.csv, table.md and growth.png beside them

Every JSON file of the folder is read. A dotted line is the bound that floating-point operations
alone would set to the throughput (model.GPT.flops_per_token).
"""

import csv
import json
import math
import sys
from pathlib import Path

from dev.table import shown
from plots import DASHES, TITLE, colour, name_ends, new_figure, save, set_log_scale
from runtime import RunError, run_script

FIELDS = {  # field: its panel's title, and what its values are divided by
    "connection_params": ("Parameters of one connection, millions", 1e6),
    "ratio_to_residual": ("Throughput of a step, of residual's", 1),
    "peak_memory_ratio": ("Peak memory of a step, of residual's", 1),
    "compile_cpu_s": ("Compiling, processor seconds", 1),
}
HEAD = ("mixer", "sees", "compiled", "n", *FIELDS, "flops_bound", "share_of_bound")
HEIGHT = 2.6  # inches of a panel


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    rows = read_rows(folder)
    write_tables(folder, rows)
    save(folder / "growth.png", growth_figure, rows)
    print(f"wrote table.csv, table.md and growth.png to {folder}")


def read_rows(folder):
    """The rows of all reports in a folder, with HEAD's fields. RunError where there are none."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        for row in report["rows"]:
            if row["n_streams"] > 1:
                knobs = report["config"]
                row |= {"sees": knobs["sees"], "compiled": knobs["compile"], "n": row["n_streams"]}
                rows.append({key: row.get(key) for key in HEAD})
    if not rows:
        raise RunError(f"{folder} has no report of bench.py with several streams; see {__file__}")
    return sorted(rows, key=lambda row: [row[key] for key in HEAD[:4]])


def write_tables(folder, rows):
    """Write table.csv, and table.md with the same fields in readable numbers."""
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, HEAD)
        table.writeheader()
        table.writerows(rows)
    lines = [HEAD, ["---"] * len(HEAD), *([shown(row[key]) for key in HEAD] for row in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (folder / "table.md").write_text(text + "\n")


def growth_figure(rows):
    """A panel against n for each of FIELDS that was measured."""
    fields = [field for field in FIELDS if any(row[field] is not None for row in rows)]
    lines = math.ceil(len(fields) / 2)
    figure = new_figure(lines * (HEIGHT + 0.5) + 0.3)
    ways = sorted({"compiled" if row["compiled"] else "eager" for row in rows})
    figure.suptitle(f"Growth with the number of streams, {' and '.join(ways)}", **TITLE)
    grid = figure.add_gridspec(lines, 2)
    for i, field in enumerate(fields):
        axes = figure.add_subplot(grid[i // 2, i % 2])
        axes.set_title(FIELDS[field][0])
        axes.set_xlabel("streams")
        draw_panel(axes, [row for row in rows if row[field] is not None], field)
    return figure


def draw_panel(axes, rows, field):
    """A line for each mixer, for what its coefficients see, and for whether it was compiled. An
    eager line is thin where others are of compiled models."""
    curves, ends, numbers = {}, [], []
    if field == "connection_params":  # the same, compiled or not
        rows = {(row["mixer"], row["sees"], row["n"]): row | {"compiled": True} for row in rows}
        rows = list(rows.values())
    some_compiled = any(row["compiled"] for row in rows)
    for row in rows:
        curves.setdefault((row["mixer"], row["sees"], row["compiled"]), []).append(row)
    for (mixer, sees, compiled), own in curves.items():
        n, values = [row["n"] for row in own], [row[field] / FIELDS[field][1] for row in own]
        ink, dashes = colour(mixer), DASHES[0 if sees == "streams" else 1]
        width = 0.8 if some_compiled and not compiled else 1.8
        axes.plot(n, values, color=ink, linestyle=dashes, marker="o", markersize=3, linewidth=width)
        if field == "ratio_to_residual":
            bound = [row["flops_bound"] for row in own]
            axes.plot(n, bound, color=ink, linestyle=DASHES[2], linewidth=0.9)
        name = mixer if sees == "streams" else f"{mixer}, sees u"
        if some_compiled and not compiled:
            name += ", eager"
        ends.append((name, ink, n[-1], values[-1]))
        numbers += values
    axes.set_xscale("log", base=2)
    ticks = sorted({row["n"] for row in rows})
    axes.set_xticks(ticks, map(str, ticks))
    set_log_scale(axes, numbers)
    name_ends(axes, ends, HEIGHT)


if __name__ == "__main__":
    run_script(main)
