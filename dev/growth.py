"""Growth with the number of streams: a table and a figure of what bench.py measured.

    python bench.py --sweep_streams=2,4,8,16,32 --clock=processor --out=results/growth/streams.json
    python bench.py --sweep_streams=2,4,8,16,32 --clock=processor --out=results/growth/input.json \\
        --sees=input --readout=learned
    python -m dev.growth results/growth           # table.csv, table.md and growth.png beside them

Every JSON file of the folder is read. A dotted line is the bound that floating-point operations
alone would set to the throughput (model.GPT.flops_per_token).
"""

import csv
import json
import sys
from pathlib import Path

from dev.table import shown
from plots import DASHES, colour, name_ends, new_figure, save, set_log_scale
from runtime import RunError

FIELDS = {
    "connection_params": "parameters of one connection",
    "compile_cpu_s": "compile, processor seconds",
    "ratio_to_residual": "throughput, of residual's",
    "peak_memory_ratio": "peak memory, of residual's",
}
HEAD = ("mixer", "coefficients see", "n", *FIELDS, "flops_bound", "share_of_bound")
HEIGHT = 2.6  # inches of a panel


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    try:
        rows = read_rows(folder)
        write_tables(folder, rows)
        save(folder / "growth.png", growth_figure, rows)
    except RunError as error:
        sys.exit(str(error))
    print(f"wrote table.csv, table.md and growth.png to {folder}")


def read_rows(folder):
    """The rows of all reports in a folder, with HEAD's fields. RunError where there are none."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        for row in report["rows"]:
            if row["n_streams"] > 1:
                sees = {"coefficients see": report["config"]["sees"], "n": row["n_streams"]}
                rows.append({key: (row | sees).get(key) for key in HEAD})
    if not rows:
        raise RunError(f"{folder} has no report of bench.py with several streams; see {__file__}")
    return sorted(rows, key=lambda row: (row["mixer"], row["coefficients see"], row["n"]))


def write_tables(folder, rows):
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, HEAD)
        table.writeheader()
        table.writerows(rows)
    lines = [HEAD, ["---"] * len(HEAD), *([shown(row[key]) for key in HEAD] for row in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (folder / "table.md").write_text(text + "\n")


def growth_figure(rows):
    """A panel for each of FIELDS against n; lines are mixers, dashed where coefficients see u."""
    figure = new_figure(2 * HEIGHT + 1)
    panels = figure.subplots(2, 2)
    for axes, (field, title) in zip(panels.flat, FIELDS.items()):
        measured = [row for row in rows if row[field] is not None]
        axes.set_title(title)
        axes.set_xlabel("streams")
        draw_panel(axes, measured, field)
    return figure


def draw_panel(axes, rows, field):
    ends, numbers = [], []
    for mixer, sees in sorted({(row["mixer"], row["coefficients see"]) for row in rows}):
        own = [row for row in rows if (row["mixer"], row["coefficients see"]) == (mixer, sees)]
        n, values = [row["n"] for row in own], [row[field] for row in own]
        dashes = DASHES[0 if sees == "streams" else 1]
        axes.plot(n, values, color=colour(mixer), linestyle=dashes, marker="o", markersize=3)
        if field == "ratio_to_residual":
            bound = [row["flops_bound"] for row in own]
            axes.plot(n, bound, color=colour(mixer), linestyle=DASHES[2], linewidth=0.9)
        name = mixer if sees == "streams" else f"{mixer}, sees u"
        ends.append((name, colour(mixer), n[-1], values[-1]))
        numbers += values
    if not ends:
        return
    axes.set_xscale("log", base=2)
    ticks = sorted({row["n"] for row in rows})
    axes.set_xticks(ticks, map(str, ticks))
    set_log_scale(axes, numbers)
    name_ends(axes, ends, HEIGHT)


if __name__ == "__main__":
    main()
