"""
From the files of many runs to curves with bands over seeds.

    points = points_of(read_results([Path("results/constraint-english")]))  # or out/studies/…
    by_tokens(points, "val")                                                # plots.py draws them

A result (a run), a point (an arm with its runs by seed) and their differences are comparison.py's.
"""

import json
import math
import re
import statistics
from typing import NamedTuple

import comparison
from data import as_number
from runtime import RunError

# Knobs that the name of an arm leaves out: the mixer, with which the name begins; the seed, in
# which the runs of an arm differ; and those that say where a run's files are, how fast it is, how
# often and where it reports, but not what it computes.
NOT_NAMED = {
    *("mixer", "seed", "provenance", "out_dir", "data_dir", "init_from"),
    *("eval_interval", "log_interval", "checkpoint_interval", "keep_checkpoints"),
    *("batch_size", "device", "compile", "activation_memory_budget", "peak_flops"),
    *("eval_only", "tensorboard", "wandb_project", "hang_minutes"),
}
# Runs that differ in one of these are no comparison of arms alone.
COMPARED = ("dataset", "block_size", "total_batch_tokens", "max_iters", "eval_tokens")
SECOND_RUN = re.compile(r"seed-?\d+-again\d+")  # the folder that study.py --cell makes


class Curve(NamedTuple):
    """One arm: a number along x, its mean over seeds, the lowest and the highest seed."""

    label: str
    mixer: str
    seeds: int
    x: list
    mean: list
    low: list
    high: list


# ---- reading -------------------------------------------------------------------------------------


def read_results(folders):
    """Every run in and under `folders` -> a list of results, each with the `folder` of its run.

    A run is a folder with config.json and metrics.jsonl, finished or not, or a file that study.py
    keeps of one (with None for `folder`). A cell that was run again counts once. Raises RunError
    where there is none.
    """
    found = []
    for folder in folders:
        for path in sorted(folder.rglob("*.json")):
            if SECOND_RUN.fullmatch(path.parent.name):
                continue
            try:
                found += results_of_file(path)
            except RunError as error:
                print(f"left out: {error}")
    if not found:
        raise RunError(
            f"{', '.join(map(str, folders)) or 'nothing'}: no run is there, neither a folder with "
            "config.json and metrics.jsonl nor results of study.py"
        )
    name_arms([result for result in found if result["arm"] is None])
    return found


def results_of_file(path):
    """-> the run that a JSON file belongs to, in a list, which is empty where it is of no run.
    Raises RunError for a damaged file."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error})") from error
    if not isinstance(content, dict):
        return []
    if path.name == "config.json" and "total_batch_tokens" in content:
        return result_of_run(path.parent)
    return [{**content, "folder": None}] if "arm" in content else []


def result_of_run(folder):
    """-> the run in `folder` so far, in a list, which is empty where there is no evaluation yet."""
    knobs, records = comparison.read_run(folder)
    if not any("val" in record for record in records):
        print(f"{folder} is left out: it has no evaluation yet")
        return []
    arm, axes = arm_of_folder(folder, knobs)
    own = {"arm": arm, "axes": axes, "seed": knobs["seed"], "knobs": knobs, "folder": folder}
    gave_up = comparison.ends_in_bad_steps(records, knobs)
    return [own | comparison.summary(records, knobs["total_batch_tokens"], gave_up)]


def arm_of_folder(folder, knobs):
    """-> the arm and the axes of a run of study.py, whose folder is ARM/KNOB=VALUE/.../seedN.
    None and {} for another run."""
    if folder.name != f"seed{knobs['seed']}":
        return None, {}
    axes, folder = {}, folder.parent
    while (knob := folder.name.partition("=")[0]) in knobs:
        axes = {knob: knobs[knob], **axes}
        folder = folder.parent
    return folder.name, axes


def name_arms(results):
    """Name the arm of each result: its mixer, and every knob that differs from most of the runs.

    Learning rates, where there are several, become an axis, as in a study.
    """
    if not results:
        return
    names = sorted({knob for result in results for knob in result["knobs"]} - NOT_NAMED)
    values = {name: [result["knobs"].get(name) for result in results] for name in names}
    several_rates = len(set(values.pop(comparison.RATE))) > 1
    if several_rates:
        values.pop("min_lr", None)  # changes with it
    # One stream is what the residual mixer always has, so the arm's name does not say it.
    values["n_streams"] = [n for n in values["n_streams"] if n != 1] or [1]
    usual = {name: statistics.mode(seen) for name, seen in values.items()}
    for result in results:
        own = result["knobs"]
        differing = [name for name in usual if own.get(name) != usual[name]]
        if own["n_streams"] == 1 and "n_streams" in differing:
            differing.remove("n_streams")
        words = [f"{name}={own.get(name)}" for name in differing]
        result["arm"] = ", ".join([own["mixer"], *words])
        if several_rates:
            result["axes"] = {comparison.RATE: own[comparison.RATE]}


def points_of(results):
    """Results -> a list of points, each arm at its best learning rate. Prints which rates are left
    out, and how many runs diverged.

    Raises ValueError where two runs are of the same seed and arm.
    """
    points = comparison.gather(results)
    if sum(len(point.runs) for point in points) < len(results):
        raise ValueError(
            "two of the runs have the same arm and the same seed, and would be taken for one; name "
            "fewer folders"
        )
    chosen = comparison.best_rates(points)
    for point in points:
        if point not in chosen:
            knobs = next(iter(point.runs.values()))["knobs"]  # a study may not sweep the rate
            rate = point.axes.get(comparison.RATE, knobs[comparison.RATE])
            print(f"{label(point)} at learning rate {rate} is left out: another rate did better")
        elif note := diverged_text(point):
            print(f"{label(point)}: {note}; its curves are of the others, if there are any")
    return chosen


def differing_knobs(points):
    """-> a line for each knob of COMPARED that differs between runs, unless it is a swept one."""
    lines = []
    for knob in COMPARED:
        arms = {}  # the names of the points by their value
        for point in points:
            for run in point.runs.values():
                if knob in run["knobs"] and knob not in point.axes:
                    arms.setdefault(run["knobs"][knob], set()).add(label(point))
        if len(arms) > 1:
            listed = "; ".join(f"{value} ({', '.join(sorted(arms[value]))})" for value in arms)
            lines.append(f"the runs differ in {knob}, and not in the arm alone: {listed}")
    return lines


# ---- curves --------------------------------------------------------------------------------------


def label(point):
    """What a point is called in a figure."""
    axes = [f"{knob}={value}" for knob, value in point.axes.items() if knob != comparison.RATE]
    return ", ".join([point.arm, *axes])


def first_knobs(point):
    """The knobs of its first run; those of the others differ in the seed."""
    return next(iter(point.runs.values()))["knobs"]


def diverged_text(point):
    """How many of its runs diverged, in words; empty if none did."""
    lost = point.diverged()
    return f"{lost} of {len(point.runs)} diverged" if lost else ""


def at_evaluations(point, key):
    """{seed: {step: number}} of the runs that did not diverge, or of all if all did. Numbers that
    are missing or not finite are left out."""
    return {
        seed: {e["step"]: e[key] for e in run["evaluations"] if e[key] is not None}
        for seed, run in (point.finished() or point.runs).items()
    }


def make_curve(point, by_seed, scale=1):
    """{seed: {step: number}} -> a Curve over the steps that all seeds have, where x is the step
    times `scale`. None where there is no such step."""
    steps = sorted(set.intersection(*map(set, by_seed.values()))) if by_seed else []
    if not steps:
        return None
    numbers = [[seed[step] for seed in by_seed.values()] for step in steps]
    x = [step * scale for step in steps]
    return band(label(point), first_knobs(point)["mixer"], x, numbers)


def band(label, mixer, x, numbers):
    """numbers: for each x, those of all seeds. -> a Curve."""
    mean = [statistics.fmean(seeds) for seeds in numbers]
    low, high = [min(seeds) for seeds in numbers], [max(seeds) for seeds in numbers]
    return Curve(label, mixer, len(numbers[0]), x, mean, low, high)


def by_tokens(points, key):
    """A figure at the evaluations (val, gain or norm_max) against tokens -> a list of curves."""
    curves = [
        make_curve(point, at_evaluations(point, key), first_knobs(point)["total_batch_tokens"])
        for point in points
    ]
    return [curve for curve in curves if curve]


def by_seconds(points, key):
    """The same against seconds of training, evaluations and compiling not counted."""
    curves = [
        make_curve(point, at_evaluations(point, key), point.ms() / 1000)
        for point in points
        if point.ms() is not None
    ]
    return [curve for curve in curves if curve]


def differences(points, arm):
    """Validation losses minus those of the reference `arm` with the same seed and swept knobs,
    against tokens -> curves."""
    curves = []
    for point in points:
        reference = comparison.reference_of(point, arm, points)
        if reference is None:
            continue
        theirs = at_evaluations(reference, "val")
        ours, by_seed = at_evaluations(point, "val"), {}
        for seed in ours.keys() & theirs.keys():
            steps = ours[seed].keys() & theirs[seed].keys()
            by_seed[seed] = {step: ours[seed][step] - theirs[seed][step] for step in steps}
        curves.append(make_curve(point, by_seed, first_knobs(point)["total_batch_tokens"]))
    return [curve for curve in curves if curve]


def tokens_of_a_step(points):
    """How many tokens a step has, if it is the same number for all points, else None."""
    sizes = {first_knobs(point)["total_batch_tokens"] for point in points}
    return sizes.pop() if len(sizes) == 1 else None


def by_depth(kept):
    """The runs of gain.json -> two lists of curves over sublayers: gain forward, gain backward."""
    arms = {}
    for run in kept:
        arms.setdefault(run["arm"], []).append(run)
    directions = []
    for key in ("forward_gain_from_first", "backward_gain_to_last"):
        curves = []
        for arm, runs in arms.items():
            by_run = [[as_number(gain) for gain in run[key]] for run in runs]
            by_sublayer = list(zip(*by_run))  # the gains of all seeds
            sublayers = list(range(len(by_sublayer)))
            curves.append(band(arm, runs[0]["mixer"], sublayers, by_sublayer))
        directions.append(curves)
    return directions


def arms_in_order(points):
    """Points -> [(label, mixer, note)], the lowest mean loss first. note: how many diverged."""
    return [
        (label(point), first_knobs(point)["mixer"], diverged_text(point))
        for point in sorted(points, key=mean_loss)
    ]


def mean_loss(point):
    loss = point.mean("final_loss")
    return math.inf if loss is None else loss


def last_differences(points, reference_arm):
    """-> {label: Difference} (intervals.py) of the last losses of each point from those of the
    reference arm, for the points that share a seed with it."""
    found = {}
    for point in points:
        reference = comparison.reference_of(point, reference_arm, points)
        if reference is not None:
            difference = comparison.compare(point, reference).loss
            if difference.n:
                found[label(point)] = difference
    return found


def why_no_differences(points, reference_arm):
    """In words, why last_differences has none."""
    own = [point for point in points if point.arm == reference_arm]
    if not own:
        return "no arm of this name has a finished run"
    if len(own) == len(points):
        return "there is no other arm whose runs are finished"
    if not any(point.finished() for point in own):
        return "all its runs diverged"
    if not any(comparison.reference_of(point, reference_arm, points) for point in points):
        return "no other arm has the same swept knobs"
    return "no seed of it is also a finished one of another arm"
