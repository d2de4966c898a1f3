"""
The figure of one run: the matrix of every sublayer as a small map, and four panels by depth.

>>> plots.save(Path("analysis.png"), run_figure.draw, found)    # found: analyze.py's `analysis`
"""

import math

from plots import (
    BACKGROUND,
    INK,
    LABEL_SIZE,
    TITLE,
    WIDTH,
    colour,
    new_figure,
    set_gain_scale,
    write_at,
)

# The colours of entries from below 0 (brown) over 0 (white) to above 0 (blue).
SIGNED = ("#8f3b00", "#d55e00", "#f6c9a8", "#ffffff", "#b5d7ec", "#0072b2", "#00334f")
SIDE = 1.0  # of the square that is M; all lengths are in this unit
GAP, STRIP = 0.1, 0.22  # between M and its read or write; the width of these two
MAP_WIDTH, MAP_HEIGHT = SIDE + GAP + STRIP + 0.3, SIDE + GAP + STRIP + 0.55  # with margins


def draw(found):
    """The whole figure. found: what analyze.py's `analysis` returned."""
    sublayers, ink = found["sublayers"], colour(found["mixer"])
    most = 12 if len(sublayers) <= 48 else 24
    columns = min(max(len(sublayers), 8), most)
    rows = math.ceil(len(sublayers) / columns)
    maps_height = 0.6 + rows * MAP_HEIGHT * (WIDTH - 0.8) / (columns * MAP_WIDTH)
    figure = new_figure(maps_height + 4.4)
    upper, lower = figure.subfigures(2, 1, height_ratios=[maps_height, 4.4])
    draw_maps(upper, sublayers, columns)
    upper.suptitle(
        f"{found['mixer']} at step {found['step']:,}: M of each sublayer, its write on the right, "
        "its read below",
        **TITLE,
    )
    panels = lower.subplots(2, 2, sharex=True)
    draw_gains(panels[0, 0], sublayers, ink)
    draw_cosine(panels[0, 1], sublayers, ink)
    draw_streams(panels[1, 0], sublayers, ink)
    if found["loss"] is None:
        draw_shares(panels[1, 1], sublayers, ink)
    else:
        draw_loss_changes(panels[1, 1], sublayers, ink)
    for panel in panels[1]:
        panel.set_xlabel("sublayer")
        panel.set_xlim(-0.5, len(sublayers) - 0.5)
        panel.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_maps(figure, sublayers, columns):
    """M of each sublayer as a square, with its write on the right and its read below."""
    from matplotlib.colors import FuncNorm, LinearSegmentedColormap

    axes = figure.subplots()
    entries = [
        entry
        for sublayer in sublayers
        for row in (*sublayer["mix"], sublayer["read"], sublayer["write"])
        for entry in row
        if math.isfinite(entry)
    ] or [1.0]  # of a model whose every number is NaN
    limit = max(1.0, *map(abs, entries))
    norm = FuncNorm((signed_root, signed_square), vmin=-limit, vmax=limit)
    shades = LinearSegmentedColormap.from_list("signed", SIGNED)
    for depth, sublayer in enumerate(sublayers):
        x, y = depth % columns * MAP_WIDTH, -(depth // columns) * MAP_HEIGHT
        parts = (
            (sublayer["mix"], x, y, SIDE, SIDE),
            ([[w] for w in sublayer["write"]], x + SIDE + GAP, y, STRIP, SIDE),
            ([sublayer["read"]], x, y - SIDE - GAP, SIDE, STRIP),
        )
        for part in parts:
            mesh = draw_cells(axes, *part, norm=norm, cmap=shades)
        axes.text(x, y + 0.08, sublayer["name"], fontsize=8, va="bottom")
    axes.set_xlim(0, columns * MAP_WIDTH)
    axes.set_aspect("equal", anchor="NW")
    axes.axis("off")
    bar = figure.colorbar(mesh, ax=axes, fraction=0.02, aspect=14, shrink=0.8, pad=0.0)
    ticks = [t for t in (-2, -1, -0.5, -0.1, 0, 0.1, 0.5, 1, 2, 4, 8) if abs(t) <= limit]
    bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
    bar.outline.set_visible(False)
    bar.ax.set_ylim(min(0.0, *entries), max(0.0, *entries))


def draw_cells(axes, values, left, top, width, height, **style):
    """A heat map of a list of rows, the first on top, in a rectangle."""
    rows, columns = len(values), len(values[0])
    x = [left + width * j / columns for j in range(columns + 1)]
    y = [top - height * i / rows for i in range(rows + 1)]
    return axes.pcolormesh(x, y, values, edgecolors=BACKGROUND, linewidth=0.4, **style)


def signed_root(x):
    """The scale of the colours, on which a small entry is visible beside a large one."""
    return abs(x) ** 0.5 * ((x > 0) * 2.0 - 1)


def signed_square(x):
    return x * abs(x)


def draw_gains(axes, sublayers, ink):
    forward = [s["forward_gain_from_first"] for s in sublayers]
    backward = [s["backward_gain_to_last"] for s in sublayers]
    axes.set_title("How much a signal can grow")
    axes.set_ylabel("composite gain")
    axes.plot(forward, color=ink, label="forward, from the first to here")
    axes.plot(backward, color=ink, linestyle="--", label="backward, from the last to here")
    set_gain_scale(axes, forward + backward)
    axes.legend(frameon=False, fontsize=LABEL_SIZE)


def draw_cosine(axes, sublayers, ink):
    axes.set_title("How alike the streams are")
    axes.set_ylabel("cosine between two")
    axes.plot([s["cosine"] for s in sublayers], color=ink)
    axes.ticklabel_format(axis="y", useOffset=False)


def draw_streams(axes, sublayers, ink):
    n = len(sublayers[0]["read"])
    numbers = [s["effective_streams"] for s in sublayers]
    axes.set_title("How many streams there are in effect")
    axes.set_ylabel("effective streams")
    axes.plot(numbers, color=ink)
    axes.set_ylim(1 - 0.04 * n, n * 1.04)
    most = max(range(len(numbers)), key=numbers.__getitem__)
    write_at(
        axes, f"at most {numbers[most]:.2f} of {n}", most, numbers[most], ink, (0, 10), "center"
    )


def draw_shares(axes, sublayers, ink):
    axes.set_title("Share of the stream read most")
    axes.set_ylabel("share of the read")
    axes.plot([s["dominant_share"] for s in sublayers], "o", color=ink, markersize=4)
    axes.set_ylim(0, 1.03)


def draw_loss_changes(axes, sublayers, ink):
    axes.set_title("Loss change if one M is replaced")
    axes.set_ylabel("nats a token, ± std. error")
    axes.axhline(0, color=INK, linewidth=0.8)
    for name, text, mark, offset in (
        ("identity", "by I", {"color": ink}, 0.0),
        ("mean", "by its mean over tokens", {"color": ink, "markerfacecolor": BACKGROUND}, 0.25),
    ):
        change, error = zip(*(s["loss_change"][name] for s in sublayers))
        x = [depth + offset for depth in range(len(change))]
        axes.errorbar(x, change, error, fmt="o", markersize=3.5, linewidth=1, label=text, **mark)
    axes.margins(y=0.25)  # room for the legend
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -1e-4), max(high, 1e-4))  # smaller changes are rounding
    axes.legend(frameon=False, fontsize=LABEL_SIZE)
