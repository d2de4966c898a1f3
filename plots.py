"""
The figures of analyze.py: the style of all figures, and those of many runs. run_figure.py has that
of one run.

    save(Path("gain.png"), gain_figure, forward, backward)      # lists of curves.Curve

Figures are legible when a README shows them 800 pixels wide, on a light and on a dark page: the
background is off-white. A mixer has the same colour in every figure (Okabe and Ito's palette, whose
colours colour-blind people can tell apart). Names stand where the lines end, not in a legend.
"""

import io
import math
import textwrap
from functools import partial

import numpy as np

from runtime import RunError

WIDTH = 8.0  # inches, 1200 pixels
DPI = 150
BACKGROUND, INK, FAINT = "#fbfaf6", "#2b2b2b", "#d8d5cc"
COLOURS = {
    "residual": "#7a7a7a",
    "identity": "#000000",
    "hc": "#d55e00",
    "sinkhorn": "#e69f00",
    "permutation": "#cc79a7",
    "kronecker": "#56b4e9",
    "tbp": "#0072b2",
    "rtbp": "#009e73",
    "orthogonal": "#5b2a86",
    "rows": "#7b4a12",
    "columns": "#8a8d00",
}
OTHERS = ("#a0154f", "#3f6f6f")  # for mixers that are not in COLOURS
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
LABEL_SIZE = 8.5
MOST_BANDS = 8  # curves in a panel; with more, no bands are drawn, which would hide each other
TITLE = {"x": 0.01, "ha": "left", "fontsize": 10.5, "fontweight": "bold"}
STYLE = {
    "figure.dpi": DPI,
    "figure.facecolor": BACKGROUND,
    "savefig.facecolor": BACKGROUND,
    "axes.facecolor": BACKGROUND,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.edgecolor": "#8c8a84",
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def save(path, draw, *arguments):
    """Write the figure that draw(*arguments) makes, as a PNG. RunError without matplotlib."""
    try:
        import matplotlib
        from PIL import Image  # comes with matplotlib
    except ImportError as error:
        raise RunError(
            f"{path} is not drawn: figures need matplotlib, pip install matplotlib"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        draw(*arguments).savefig(picture)
    # A palette of 256 colours shows the same in a third of the bytes.
    Image.open(picture).convert("RGB").quantize(dither=Image.Dither.NONE).save(path)


def new_figure(height):
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def colour(mixer):
    """The same for a mixer in every figure."""
    return COLOURS.get(mixer, OTHERS[sum(mixer.encode()) % len(OTHERS)])


def line_styles(curves):
    """A style for each curve: its mixer's colour, and dashes from the mixer's second curve on."""
    styles, seen = [], {}
    for curve in curves:
        count = seen[curve.mixer] = seen.get(curve.mixer, -1) + 1
        styles.append({"color": colour(curve.mixer), "linestyle": DASHES[count % len(DASHES)]})
    return styles


def draw_curves(axes, curves, scale=1):
    """Every curve with its band; x divided by `scale`."""
    for curve, style in zip(curves, line_styles(curves)):
        x = [value / scale for value in curve.x]
        if len(curves) <= MOST_BANDS:
            axes.fill_between(x, curve.low, curve.high, color=style["color"], alpha=0.13, lw=0)
        axes.plot(x, curve.mean, label=curve.label, **style)


def of_seeds(curves):
    """The end of a title, which says what lines and bands are: ", mean and range of 5 seeds"."""
    seeds = sorted({curve.seeds for curve in curves})
    if seeds == [1]:
        return ""
    shown = "mean and range" if len(curves) <= MOST_BANDS else "mean"
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f", {shown} of {count} seeds"


def panel_height(curves):
    """In inches: enough for the names of all curves, one below the other."""
    return max(2.4, LABEL_SIZE * 1.3 / 72 * len(curves))


def names_fit(curves):
    """Whether the names are short enough to stand beside a panel, and not in a legend below."""
    return max((len(curve.label) for curve in curves), default=0) <= 25


def legend_height(curves):
    """In inches; 0 where there is no legend."""
    if names_fit(curves):
        return 0
    lines = sum(math.ceil(len(curve.label) / 110) for curve in curves)
    return 0.2 + LABEL_SIZE * 1.7 / 72 * lines


def name_curves(axes, curves, scale, height, legend=True, with_number=False):
    """Name the curves where they end, or, if the names are long, in a legend below the figure.

    legend: False where another panel of the figure makes the legend. with_number: the name is
    followed by the curve's last number.
    """
    if names_fit(curves):
        ends = []
        for curve in curves:
            name = curve.label
            if with_number:
                name += f"  {curve.mean[-1]:#.3g}".removesuffix(".")
            ends.append((name, colour(curve.mixer), curve.x[-1] / scale, curve.mean[-1]))
        name_ends(axes, ends, height)
    elif legend:
        handles, labels = axes.get_legend_handles_labels()
        axes.figure.legend(
            handles,
            [textwrap.fill(label, 110) for label in labels],
            loc="outside lower left",
            frameon=False,
            fontsize=LABEL_SIZE,
        )


def name_ends(axes, ends, height):
    """Write names to the right of an axes, near the ends of their lines, without an overlap.

    ends: a list of (name, colour, x, y). height: about the height of the axes, in inches. What is
    drawn later must not change the limits of the axes.
    """
    gap = LABEL_SIZE * 1.25 / 72 / height  # of a line of text, in heights of the axes
    axes.get_xlim(), axes.get_ylim()  # settles limits that matplotlib chooses
    to_axes = axes.transScale + axes.transLimits
    wanted = [to_axes.transform((x, y))[1] for _, _, x, y in ends]
    for (name, ink, x, y), place in zip(ends, apart(wanted, gap)):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=ink,
            fontsize=LABEL_SIZE,
            va="center",
            annotation_clip=False,
            bbox={"facecolor": BACKGROUND, "edgecolor": "none", "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": ink, "linewidth": 0.5, "relpos": (0, 0.5)},
        )


def apart(wanted, gap):
    """Places near the wanted ones, in the same order, each `gap` or more from the next. They lie
    between 0 and 1, or higher where there are too many.

    Names that would touch form a group, whose middle is the mean of the places wanted in it.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)  # from the bottom
    groups = []  # (place of the lowest name, how many names)
    for i in order:
        start, count = wanted[i], 1
        while groups and groups[-1][0] + groups[-1][1] * gap > start:
            below, below_count = groups.pop()
            total = below_count + count
            start = (below_count * below + count * (start - below_count * gap)) / total
            count = total
        groups.append((start, count))

    ideal = [start + k * gap for start, count in groups for k in range(count)]
    places, floor = [0.0] * len(wanted), 0.0
    ceiling = max(1.0, gap * (len(wanted) - 1))
    for rank, i in enumerate(order):
        names_above = len(wanted) - 1 - rank
        places[i] = min(max(ideal[rank], floor), ceiling - names_above * gap)
        floor = places[i] + gap
    return places


def write_at(axes, text, x, y, ink, offset, side):
    """Text beside the point (x, y) of the data; offset: (right, up) in typographic points."""
    axes.annotate(
        text,
        (x, y),
        xytext=offset,
        textcoords="offset points",
        ha=side,
        va="center",
        color=ink,
        fontsize=LABEL_SIZE,
    )


def set_gain_scale(axes, gains):
    """Logarithmic where gains grow or shrink; else 0 to 2, where rounding does not show."""
    finite = [gain for gain in gains if math.isfinite(gain)]
    if max(finite, default=1) > 2 or min(finite, default=1) < 0.5:
        set_log_scale(axes, finite)
    else:
        axes.set_ylim(0, 2)


def set_log_scale(axes, numbers):
    """With ticks in plain figures; also between the powers of 10, where the numbers are close."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    near = max(numbers) < 30 * min(numbers)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if near else range(2, 10)))
    axes.yaxis.set_minor_formatter("{x:g}" if near else "")


# ---- many runs -----------------------------------------------------------------------------------
# A curve is a curves.Curve, a row is an intervals.Difference.


def loss_figure(by_tokens, by_seconds, differences, reference, tokens_of_a_step):
    """Validation loss against time, tokens and, where tokens_of_a_step is known, steps. Below it,
    where there are differences, the loss minus that of the reference, paired by seed."""
    height = panel_height(by_tokens)
    rows = 2 if differences else 1
    figure = new_figure(rows * (height + 0.9) + legend_height(by_tokens))
    grid = figure.add_gridspec(rows, 2)
    left = figure.add_subplot(grid[0, 0])
    right = figure.add_subplot(grid[0, 1], sharey=left)
    unit, seconds = unit_of(by_seconds, TIME_UNITS)
    draw_curves(left, by_seconds, seconds)
    figure.suptitle(f"Validation loss{of_seeds(by_tokens)}", **TITLE)
    left.set_ylabel("nats a token")
    left.set_xlabel(f"{unit} of training steps")
    scale = draw_against_tokens(right, by_tokens, tokens_of_a_step)
    right.tick_params(labelleft=False)
    right.set_ylim(*focus(by_tokens))
    name_curves(right, by_tokens, scale, height)
    if differences:
        below = figure.add_subplot(grid[1, :])
        scale = draw_against_tokens(below, differences, tokens_of_a_step)
        below.set_title(f"Validation loss minus {reference}'s with the same seed")
        below.set_ylabel("nats a token")
        below.axhline(0, color=INK, linewidth=0.8)
        name_curves(below, differences, scale, height, legend=False)
    return figure


def training_figure(norms, gains, tokens_of_a_step):
    """The norm of the gradient and the composite gain at the evaluations, against tokens."""
    height = panel_height(norms)
    figure = new_figure(2 * height + 1.5 + legend_height(norms))
    upper, lower = figure.subplots(2, 1, sharex=True)
    scale = draw_against_tokens(upper, norms, tokens_of_a_step)
    upper.set_title("Norm of the gradient, the largest since the evaluation before")
    set_log_scale(upper, [norm for curve in norms for norm in (*curve.low, *curve.high)])
    upper.set_xlabel("")
    name_curves(upper, norms, scale, height)
    draw_against_tokens(lower, gains, None)
    lower.set_title("Composite gain: the most that sublayers in a row can amplify")
    set_gain_scale(lower, [gain for curve in gains for gain in curve.high])
    name_curves(lower, gains, scale, height, legend=False)
    return figure


def gain_figure(forward, backward):
    """Composite gain by depth, forward from the first sublayer and backward from the last."""
    height = panel_height(forward)
    figure = new_figure(height + 0.9 + legend_height(forward))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, curves in ((left, backward), (right, forward)):
        draw_curves(axes, curves)
        axes.set_xlabel("sublayer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.set_title("Gradients, from the last sublayer")
    right.set_title("Signals, from the first sublayer")
    left.set_ylabel("composite gain")
    set_gain_scale(left, [gain for curve in forward + backward for gain in curve.high])
    name_curves(right, forward, 1, height, with_number=True)
    return figure


def study_figure(arms, panels):
    """Differences of the last loss. arms: a line each, [(label, mixer, note)]. panels: one for each
    reference, {reference: {label: row}}. A dot is filled where the interval does not hold 0."""
    figure = new_figure(0.23 * len(arms) + 1.0)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (reference, rows) in zip(all_axes, panels.items()):
        axes.set_title(f"Loss minus {reference}'s")
        axes.set_xlabel("nats a token, 95 % interval")
        axes.axvline(0, color=INK, linewidth=0.8)
        for y, (label, mixer, _) in enumerate(arms):
            row, ink = rows.get(label), colour(mixer)
            if row is None:
                if label == reference:
                    write_at(axes, "the reference", 0, y, ink, (4, 0), "left")
                continue
            axes.errorbar(
                [row.mean],
                [y],
                xerr=row.half,
                fmt="o",
                color=ink,
                markersize=5.5,
                markerfacecolor=ink if row.leaves_out_0() else BACKGROUND,
            )
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    names = [f"{label} ({note})" if note else label for label, _, note in arms]
    all_axes[0].set_yticks(range(len(arms)), names)
    all_axes[0].set_ylim(len(arms) - 0.4, -0.6)
    for text, (_, mixer, _) in zip(all_axes[0].get_yticklabels(), arms):
        text.set_color(colour(mixer))
    return figure


def draw_against_tokens(axes, curves, tokens_of_a_step):
    """Draw the curves, and steps along the top if tokens_of_a_step is known.

    -> how many tokens one unit of x is."""
    unit, scale = unit_of(curves, TOKEN_UNITS)
    draw_curves(axes, curves, scale)
    axes.set_xlabel(unit)
    if tokens_of_a_step:
        ratio = scale / tokens_of_a_step
        there_and_back = partial(np.multiply, ratio), partial(np.multiply, 1 / ratio)
        steps = axes.secondary_xaxis("top", functions=there_and_back)
        steps.set_xlabel("steps")
    return scale


TOKEN_UNITS = (
    ("billion tokens", 1e9),
    ("million tokens", 1e6),
    ("thousand tokens", 1e3),
    ("tokens", 1),
)
TIME_UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


def unit_of(curves, units):
    """(name, size) of the largest unit in which the longest curve is at least 2 long."""
    longest = max((curve.x[-1] for curve in curves), default=0)
    return next((unit for unit in units if longest >= 2 * unit[1]), units[-1])


def focus(curves):
    """Limits of y that leave out the first fifth of training, where every curve falls alike."""
    start = max(curve.x[-1] for curve in curves) / 5
    points = [point for curve in curves for point in zip(curve.x, curve.low, curve.high)]
    shown = [point for point in points if point[0] >= start] or points
    lowest, highest = min(low for _, low, _ in shown), max(high for _, _, high in shown)
    margin = 0.05 * (highest - lowest) or 0.01
    return lowest - margin, highest + margin
