"""
What paired runs say: from the metrics of a run to a table with its uncertainty.

A result is a dict, one for each run, as study.py keeps it in results/: what `summary` returns; the
run's arm, axes (the value of each swept knob that the arm does not set itself) and seed; and its
command, provenance and knobs. Two arms are compared seed by seed, over the seeds that both
finished. The columns of the table, of which losses and differences are means over seeds:

runs            how many there are, those that diverged included
loss            validation loss at the last step
- residual      the loss minus residual's (or that of another reference), with the 95 % interval of
                the difference (Student's t). Where the interval holds 0, "within" is the largest
                absolute difference in it
equal time      the same difference, with the arm's loss at the time when residual was done. A
                faster arm had ended by then: its last loss counts. For a slower arm it is an upper
                bound: a run planned to end at that time would have lowered its learning rate
speed-up        how many times sooner than residual the arm reached a loss that both reached: the
                higher one of their last losses
ms a step       the median of the runs' step times
gain            the largest composite gain at an evaluation of any run, of those that are finite
diverged        how many runs did

A time is a number of steps times the median step time; losses between evaluations are interpolated.

Where learning_rate is swept, an arm stands at its best rate. To find it, the worst rate is left
out, again and again, until one is left. Rates are judged by the seeds that all of them have: the
worst has the most diverged runs, and among equals the highest mean loss. Where they have no seed in
common, one with the fewest runs is left out. So rates may be tried with one seed, and the best of
them with more. A run that diverged has no loss; it is counted.
"""

import csv
import io
import json
import math
import shlex
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from intervals import Difference, interval
from runtime import RunError, describe_machine

RATE = "learning_rate"


# ---- one run -------------------------------------------------------------------------------------


def read_run(folder):
    """-> the config of the run in `folder`, and its metrics, a dict for each line. Both are empty
    where there is no run. Raises RunError for damaged ones."""
    config, metrics = Path(folder, "config.json"), Path(folder, "metrics.jsonl")
    if not config.exists() or not metrics.exists():
        return {}, []
    lines = metrics.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # the run may be writing the last one
    try:
        return json.loads(config.read_text()), [json.loads(line) for line in whole]
    except ValueError as error:
        raise RunError(f"{folder}: config.json or metrics.jsonl is damaged ({error})") from error


def last_step(folder):
    """The step at which the run in `folder` is, or was cut off; 0 where there is no run."""
    _, records = read_run(folder)
    return records[-1]["step"] if records else 0


def summary(records, total_batch_tokens, gave_up):
    """What is kept of a run. A loss that is not finite is None.

    records: the lines of its metrics.jsonl. gave_up: whether train.py stopped it. The step time is
    the median over the log lines: other work on the machine changes it least.
    """
    lines, evaluations, norms = [], [], []
    for record in records:
        if "loss" in record:
            lines.append(record)
            norms.append(record["norm_max"])
        if "val" in record:
            finite = [norm for norm in norms if norm is not None]
            evaluation = {key: record[key] for key in ("step", "val", "gain")}
            evaluations.append({**evaluation, "norm_max": max(finite, default=None)})
            norms = []
    losses = [evaluation["val"] for evaluation in evaluations]
    final = losses[-1] if losses and not gave_up else None
    steps = records[-1]["step"] if records else 0
    steady = [line["ms"] for line in lines if line["step"] > 1]  # the first step compiles
    times = steady or [line["ms"] for line in lines]
    return {
        "diverged": final is None,
        "final_loss": final,
        "best_loss": min((loss for loss in losses if loss is not None), default=None),
        "steps": steps,
        "tokens": steps * total_batch_tokens,
        "ms_per_step": statistics.median(times) if times else None,
        "evaluations": evaluations,
    }


def ends_in_bad_steps(records, config):
    """Whether train.py gave up a run with these metrics: max_bad_steps bad steps in a row."""
    return bool(records) and records[-1].get("worst", 0) >= config["max_bad_steps"]


def hardware(device):
    """The name of the GPU, else of the CPU. device: the knob of train.py."""
    if torch.cuda.is_available() and device != "cpu":
        return describe_machine(torch.device("cuda"))["gpu"]
    return describe_machine(torch.device("cpu"))["processor"]


# ---- points of the grid --------------------------------------------------------------------------


class Point(NamedTuple):
    arm: str
    axes: dict  # the value of each swept knob that the arm does not set itself
    runs: dict[int, dict]  # results by seed

    def finished(self):
        """The runs with a last loss, by seed."""
        return {seed: run for seed, run in self.runs.items() if not run["diverged"]}

    def diverged(self):
        """How many runs diverged."""
        return len(self.runs) - len(self.finished())

    def mean(self, key):
        """The mean of a figure over the finished runs, or None."""
        figures = [run[key] for run in self.finished().values()]
        return statistics.fmean(figures) if figures else None

    def ms(self):
        """The median step time of the runs in milliseconds, or None."""
        times = [run["ms_per_step"] for run in self.runs.values() if run["ms_per_step"] is not None]
        return statistics.median(times) if times else None

    def largest(self, key):
        """The largest gain or norm_max of an evaluation, of those that are finite; or None."""
        evaluations = [each for run in self.runs.values() for each in run["evaluations"]]
        return max((each[key] for each in evaluations if each[key] is not None), default=None)


def gather(results):
    """Results -> the points of the grid, in order of their first results."""
    points = {}
    for result in results:
        key = (result["arm"], *result["axes"].items())
        points.setdefault(key, Point(result["arm"], result["axes"], {}))
        points[key].runs[result["seed"]] = result
    return list(points.values())


def place(point):
    """The arm and the axes without the rate. Points of one place differ in the rate alone."""
    return point.arm, tuple((knob, value) for knob, value in point.axes.items() if knob != RATE)


def best_rates(points):
    """The best point of each place, in the order of the places."""
    groups = {}
    for point in points:
        groups.setdefault(place(point), []).append(point)
    return [best_rate(group) for group in groups.values()]


def best_rate(group):
    """The best of the points of one place: one after the other, the worst falls out."""
    left = list(group)
    while len(left) > 1:
        left.remove(worst_rate(left))
    return left[0]


def worst_rate(group):
    """The worst of some points, by the seeds that all have; without one, a point of fewest runs."""
    common = set.intersection(*(set(point.runs) for point in group))
    if not common:
        return max(group, key=lambda point: (-len(point.runs), *badness(point, point.runs)))
    return max(group, key=lambda point: badness(point, common))


def badness(point, seeds):
    """Lower is better: first fewer runs that diverged, then a lower loss."""
    point = point._replace(runs={seed: point.runs[seed] for seed in seeds})
    loss = point.mean("final_loss")
    return point.diverged(), math.inf if loss is None else loss


def at_edge(point, points):
    """Whether the point's rate is the lowest or the highest of all rates at its place."""
    rates = [
        other.axes[RATE] for other in points if place(other) == place(point) and RATE in other.axes
    ]
    return len(rates) > 1 and point.axes[RATE] in (min(rates), max(rates))


def reference_of(point, name, chosen):
    """The one chosen point of the arm `name` with which `point` can be compared. None where there
    is no such point, or more than one, or `point` is of this arm itself."""
    if point.arm == name:
        return None
    alike = [other for other in chosen if other.arm == name and same_axes(point, other)]
    return alike[0] if len(alike) == 1 else None


def same_axes(point, other):
    """Whether the swept knobs that both points have are equal, apart from the rate."""
    common = (point.axes.keys() & other.axes.keys()) - {RATE}
    return all(point.axes[knob] == other.axes[knob] for knob in common)


class Comparison(NamedTuple):
    loss: Difference
    equal_time: Difference
    speed_up: float | None


def mean_curve(runs):
    """[(step, loss) ..] of some runs: the mean at each step at which all have an evaluation."""
    curves = [dict(curve(run)) for run in runs]
    common = set.intersection(*(set(losses) for losses in curves))
    return [(step, statistics.fmean(losses[step] for losses in curves)) for step in sorted(common)]


def curve(run):
    """[(step, loss) ..] of a run, without the evaluations that were not finite."""
    return [(e["step"], e["val"]) for e in run["evaluations"] if e["val"] is not None]


def step_at_loss(curve, loss):
    """The step at which a curve, [(step, loss) ..], first reaches `loss`; None if it never does.
    Interpolated between the curve's points."""
    last = None  # the point before
    for step, value in curve:
        if value <= loss:
            if last is None:
                return step
            last_step, last_value = last
            share = (last_value - loss) / (last_value - value)
            return last_step + share * (step - last_step)
        last = step, value
    return None


def compare(point, reference):
    """The point against the reference, over the seeds that both finished."""
    ours, theirs = point.finished(), reference.finished()
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return Comparison(interval([]), interval([]), None)
    time_ratio = point.ms() / reference.ms()  # of a step: above 1 the point is slower
    at_end, at_equal_time = [], []  # differences
    for seed in seeds:
        their_loss = theirs[seed]["final_loss"]
        at_end.append(ours[seed]["final_loss"] - their_loss)
        steps, losses = zip(*curve(ours[seed]))
        when_they_ended = theirs[seed]["steps"] / time_ratio  # in our steps
        at_equal_time.append(float(np.interp(when_they_ended, steps, losses)) - their_loss)

    our_curve = mean_curve([ours[seed] for seed in seeds])
    their_curve = mean_curve([theirs[seed] for seed in seeds])
    both_reach = max(our_curve[-1][1], their_curve[-1][1])
    our_step = step_at_loss(our_curve, both_reach)
    their_step = step_at_loss(their_curve, both_reach)
    # None where we began with that loss
    speed_up = their_step / (our_step * time_ratio) if our_step else None
    return Comparison(interval(at_end), interval(at_equal_time), speed_up)


# ---- tables --------------------------------------------------------------------------------------


def table_csv(results, references):
    """A line for every point of the grid. Beside what table_markdown shows, X any of `references`:

    best                whether table_markdown shows the point
    loss_std, norm      the losses' deviation over seeds; the largest gradient norm of any run
    best_loss           the lowest validation loss of a run, its mean over seeds
    minus_X, minus_X_half, minus_X_pairs    the mean difference from X, half of its 95 %
                        interval, and how many pairs of seeds it has
    equal_time_X, equal_time_X_half, speed_up_X     as in the table, against X
    steps, tokens       the most of any run
    """
    points = gather(results)
    chosen = best_rates(points)
    rows = []
    for point in points:
        losses = [run["final_loss"] for run in point.finished().values()]
        row = {
            "arm": point.arm,
            **point.axes,
            "best": point in chosen,
            "runs": len(point.runs),
            "diverged": point.diverged(),
            "loss": point.mean("final_loss"),
            "loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
            "best_loss": point.mean("best_loss"),
            "ms_per_step": point.ms(),
            "gain": point.largest("gain"),
            "norm": point.largest("norm_max"),
            "steps": max(run["steps"] for run in point.runs.values()),
            "tokens": max(run["tokens"] for run in point.runs.values()),
        }
        for name in references:
            reference = reference_of(point, name, chosen)
            if reference is None:
                continue
            loss, equal_time, speed_up = compare(point, reference)
            row[f"minus_{name}"], row[f"minus_{name}_half"], row[f"minus_{name}_pairs"] = loss
            row[f"equal_time_{name}"], row[f"equal_time_{name}_half"], _ = equal_time
            row[f"speed_up_{name}"] = speed_up
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def table_markdown(results, references):
    """The points at their best rates, and their differences from the arms `references`."""
    points = gather(results)
    chosen = best_rates(points)
    axes = list(dict.fromkeys(knob for point in chosen for knob in point.axes))
    names = [name for name in references if any(point.arm == name for point in chosen)]
    timed = ["equal time", "speed-up"] if "residual" in names else []
    heading = ["arm", *axes, "runs", "loss", *(f"- {name}" for name in names), *timed]
    heading += ["ms a step", "gain", "diverged"]
    lines = [heading, ["---"] * len(heading)]
    for point in chosen:
        against = {
            name: compare(point, reference)
            for name in names
            if (reference := reference_of(point, name, chosen)) is not None
        }
        cells = [point.arm, *(axis_text(point, knob, points) for knob in axes)]
        cells += [str(len(point.runs)), number(point.mean("final_loss"), ".4f")]
        cells += [difference_text(against[n].loss) if n in against else "" for n in names]
        if "residual" in against:
            _, equal_time, speed_up = against["residual"]
            cells += [difference_text(equal_time), number(speed_up, ".2f")]
        else:
            cells += ["" for _ in timed]
        cells += [number(point.ms(), ".0f"), number(point.largest("gain"), ".4g")]
        cells.append(str(point.diverged() or ""))
        lines.append(cells)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def axis_text(point, knob, points):
    """The value of a swept knob; a best rate at the edge of its grid says so."""
    if knob not in point.axes:
        return ""
    edge = " (edge)" if knob == RATE and at_edge(point, points) else ""
    return f"{point.axes[knob]}{edge}"


def difference_text(difference):
    """-0.0571 ± 0.0105, in bold where the interval does not hold 0, else with its bound."""
    mean, half, n = difference
    if n < 2:
        return f"{mean:+.4f} (one seed)" if n else ""
    text = f"{mean:+.4f} ± {half:.4f}"
    if difference.leaves_out_0():
        return f"**{text}**"
    return f"{text}, within {math.ceil(difference.bound() * 1000) / 1000:.3f}"


def number(value, form):
    """`value` in the format `form`; a dash where it is None or not finite."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


NOTES = """\
Every difference is paired by seed, and ± is its 95 % interval (Student's t). It is in bold where
the interval does not hold 0; elsewhere "within" is the largest absolute difference in the interval.
One interval in twenty misses. comparison.py defines the columns. table.csv has the whole grid. The
JSON file of a run has its evaluations, its commit, and the command that makes it again.
"""


def report(study, results, planned, others):
    """-> table.md of a study.

    results: those that there are, in the order of the cells. planned: how many cells the study has.
    others: files in its folder that belong to no cell.
    """
    parts = [f"# {study.name}"]
    if study.question:
        parts.append(f"**Question.** {study.question.strip()}")
    if study.decision:
        parts.append(f"**Rule of decision, written before the runs.** {study.decision.strip()}")
    base = shlex.join([*study.files, *(f"--{knob}={value}" for knob, value in study.knobs.items())])
    parts.append(f"{len(results)} of {planned} runs are here, each of `train.py {base}`.")
    missing = "" if len(results) == planned else "the others, or "
    parts.append(f"`{study.command}` runs {missing}all of them again where results/ is empty.")
    if results:
        seeds = ", ".join(map(str, sorted({result["seed"] for result in results})))
        tokens = ", ".join(f"{tokens:,}" for tokens in sorted({run["tokens"] for run in results}))
        origins = sorted({provenance_text(result["provenance"]) for result in results})
        parts.append(f"Seeds: {seeds}. Tokens of a run: {tokens}. {'; '.join(origins)}.")
        parts.append(table_markdown(results, study.references).rstrip())
    if others:
        parts.append(f"Not in the table, since the study has no such cell: {', '.join(others)}.")
    parts.append(NOTES)
    return "\n\n".join(parts)


def provenance_text(provenance):
    """'Commit 4e260d0 (with changes), torch 2.13.0, an AMD EPYC'."""
    commit = (provenance.get("commit") or "unknown")[:7]
    changes = " (with changes)" if provenance.get("clean") is False else ""
    torch_version = provenance.get("torch") or "unknown"
    return f"Commit {commit}{changes}, torch {torch_version}, {provenance['hardware']}"
