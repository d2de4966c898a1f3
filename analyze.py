"""
What trained mixers do, and how runs compare: tables, JSON and figures.

    python analyze.py --out_dir=out/laptop-tbp                    # one run, finished or still going
    python analyze.py --out_dir=out/laptop-tbp --loss_tokens=0    # faster: no M is replaced
    python analyze.py --runs='out/laptop-*'                       # many runs: losses, norms, gains
    python analyze.py --runs='out/laptop-*' --figure=gain         # composite gain by depth alone
    python analyze.py --runs=results/constraint-english           # a study's results

One run leaves analysis.json (`analysis` says what is in it) and analysis.png in its out_dir. Many
runs leave, in the folder that holds them,

    loss.png        validation loss against tokens, steps and time; bands over seeds
    training.png    norm of the gradient, and composite gain, while training
    study.png       differences in the last loss, paired by seed, with 95 % intervals
    gain.png        composite gain by depth, from the checkpoints; the numbers in gain.json

Composite gain: the most that a signal can grow on its way through sublayers in a row, or a gradient
on its way back: the largest absolute row or column sum of a product of their M. It is 1 where every
M is doubly stochastic. The table of one run has a line for each sublayer; M is a mean over tokens:

    M - I, M - 1/n      Frobenius norms: 0 where streams do not mix; where they become their mean
    sigma 1, 2          M's largest singular values; the second is 0 where streams mix at once
    spread, ds error    how far a token's M is from this mean; from doubly stochastic, at most
    forward, backward   composite gain from the first sublayer to here, from the last to here
    cosine, streams     how alike the streams are before it; how many there are in effect
    reads most          the stream that it reads most, and that stream's share of the read
    loss, M = I         by how much the loss changes if this M alone is replaced by I, and by
    loss, M = mean      its mean over tokens; ±: the standard error
"""

import functools
import glob
import json
import os
from pathlib import Path

import torch

import checkpoint as checkpoints
import curves
import plots
import run_figure
from comparison import number
from configurator import configure
from data import DataError, TokenBlocks, write_json
from measure import gains_by_depth, look_at, loss_changes
from mixers import composite_gain
from runtime import RunError, pick_device, provenance, run_script
from trained import find_checkpoint, load_model
from warm_start import check_tokens

# One run
out_dir = "out"  # of the run
checkpoint = "latest"  # latest, best, or a path (the module of this name is `checkpoints` here)
tokens = 8192  # validation tokens on which streams and matrices are observed
loss_tokens = 8192  # validation tokens for the losses with one M replaced; 0: no such losses
# Many runs
runs = ""  # folders of runs, with commas between, * for any name; or a study's results
figure = "all"  # loss, training, study, gain, or all
references = "residual,identity"  # arms to compare with; loss.png takes the first that is there
# Both
out = ""  # folder for what is written; empty: the run's, or the one that holds the runs
data_dir = ""  # where the data sets are; empty: where the run found them
dataset = ""  # a folder of data_dir; empty: the run's
device = "auto"  # auto, cpu, cuda, cuda:1, mps
configure(globals())

AT_ONCE = 4096  # tokens in a batch, whose streams before every sublayer are in memory at once


def main():
    if tokens < 1 or loss_tokens < 0:
        raise ValueError(
            f"tokens = {tokens} must be at least 1, and loss_tokens = {loss_tokens} at least 0"
        )
    if runs:
        compare_runs()
    else:
        look_at_run()


def look_at_run():
    path = find_checkpoint(out_dir, checkpoint)
    found = analysis(path, pick_device(device))
    print(table(found))
    folder = Path(out or path.parent).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "analysis.json", found)
    print(f"written: {folder / 'analysis.json'}")
    plots.save(folder / "analysis.png", run_figure.draw, found)
    print(f"written: {folder / 'analysis.png'}")


# ---- one run: its checkpoint, and what is measured of it -----------------------------------------


def open_validation(path, state, most):
    """The validation split of a run's data set, TokenBlocks. Says so where it has fewer than `most`
    tokens. Raises RunError, or ValueError where the data set has other tokens than the model."""
    run = state["config"]
    if not dataset and "dataset" not in run:
        raise RunError(
            f"{path} was converted, and names no data set: name one that has its tokens, with "
            "--dataset=… (a folder in data, or in --data_dir=…)"
        )
    folder = Path(data_dir or run.get("data_dir", "data")) / (dataset or run["dataset"])
    try:
        blocks = TokenBlocks(folder, "val", state["model_config"]["block_size"])
    except DataError as error:
        raise DataError(
            f"{error}. If the data set is elsewhere, name the folder that it is in: --data_dir=…"
        ) from error
    check_tokens(path, state, blocks.meta)
    count = blocks.n_blocks * blocks.block_size
    if count < most:
        print(f"{folder}: val has {count:,} tokens in whole sequences; all are read, not {most:,}")
    return blocks


def validation_batches(blocks, count, device):
    """The first `count` tokens of `blocks`, in whole sequences: at least one, at most all.

    -> a list of (idx, targets), each (B, T) on the torch.device.
    """
    sequences = min(max(1, count // blocks.block_size), blocks.n_blocks)
    at_once = max(1, AT_ONCE // blocks.block_size)
    starts = range(0, sequences, at_once)
    batches = [blocks.in_order(start, min(at_once, sequences - start)) for start in starts]
    return [(idx.to(device), targets.to(device)) for idx, targets in batches]


def analysis(path, device):
    """What analysis.json holds of the checkpoint at `path`.

    checkpoint, step, mixer, n_streams, dynamic: of the run. provenance: of this analysis.
    tokens: how many were looked at, the first of the validation split.
    composite_gain: mixers.composite_gain of the mean matrices.
    loss, loss_tokens: validation loss in nats a token, and on how many tokens; None and 0 with
        --loss_tokens=0.
    sublayers: a list in order of depth, of dicts. M is the mean over the tokens unless the line
    says otherwise. Where reads are taken ahead (sees="input"), read and dominant_stream of
    a sublayer are what the next one reads, or the head:
      name            its layer and branch, "3 mlp", or "3 block" with wraps=block
      mix, read, write          means (n, n), (n,), (n,)
      mix_spread, read_spread, write_spread   standard deviations over tokens, entry by entry
      spread          root mean square, over tokens, of the Frobenius norm of M - mean M
      from_identity, from_uniform       Frobenius norms of M - I and of M - 11^T / n
      singular_values           of M, largest first. Doubly stochastic: the first is 1, and the
                      second says how slowly the streams mix: 0 at once, 1 never
      ds_error        mixers.ds_error, the largest over the tokens
      forward_gain_from_first, backward_gain_from_first     largest absolute row sum and column
                      sum of the product of the matrices from the first sublayer to this one
      forward_gain_to_last, backward_gain_to_last           the same from this one to the last
      cosine          between two streams before the sublayer, mean over pairs and tokens
      effective_streams         before the sublayer, see `effective_streams`; mean over tokens
      dominant_stream, dominant_share   the stream (from 0) with the largest mean |read|, and
                      |its read| / sum |read|, mean over tokens
      loss_change     {"identity": [change, error], "mean": [change, error]}: by how much the loss
                      changes when this M alone is replaced, for every token, by I or by its mean.
                      error: the standard error over sequences. None without loss_tokens
    A number that is not finite, or not defined with one stream, is null.
    """
    state, model = load_model(path, stream_dtype="auto")  # float32, whatever the run's was
    model.to(device)
    blocks = open_validation(path, state, max(tokens, loss_tokens))
    sublayers, n_tokens = look_at(model, validation_batches(blocks, tokens, device))
    means = mean_matrices(sublayers)
    for sublayer, gains in zip(sublayers, gains_by_depth(means)):
        sublayer.update(gains, loss_change=None)
    found = {
        "checkpoint": str(path),
        "provenance": provenance(),
        "step": state["step"],
        "mixer": model.config.mixer,
        "n_streams": model.config.n_streams,
        "dynamic": model.config.dynamic,
        "tokens": n_tokens,
        "composite_gain": composite_gain(means),
        "loss": None,
        "loss_tokens": 0,
        "sublayers": sublayers,
    }
    if loss_tokens:
        batches = validation_batches(blocks, loss_tokens, device)
        found["loss"], changes = loss_changes(model, means, batches)
        found["loss_tokens"] = sum(idx.numel() for idx, _ in batches)
        for sublayer, change in zip(sublayers, changes):
            sublayer["loss_change"] = change
    return found


def mean_matrices(sublayers):
    return [torch.tensor(sublayer["mix"], dtype=torch.float64) for sublayer in sublayers]


# ---- one run: what is written --------------------------------------------------------------------


def read_most_text(sublayer):
    """The stream that is read most, and its share of the read, for the table."""
    return f"{sublayer['dominant_stream']}: {number(sublayer['dominant_share'], '.0%')}"


def loss_change_text(kind, sublayer):
    """The change of the loss with M replaced, and its standard error, for the table."""
    if sublayer["loss_change"] is None:
        return "-"
    change, error = sublayer["loss_change"][kind]
    return f"{number(change, '+.4f')} ± {number(error, '.4f')}"


def singular_values_text(sublayer):
    """The two largest of M, for the table: for a doubly stochastic M the first is 1."""
    return " ".join(number(value, ".3f") for value in sublayer["singular_values"][:2])


COLUMNS = [  # of the table: heading, and sublayer -> text
    ("sublayer", lambda s: s["name"]),
    ("M - I", lambda s: number(s["from_identity"], ".3f")),
    ("M - 1/n", lambda s: number(s["from_uniform"], ".3f")),
    ("sigma 1, 2", singular_values_text),
    ("spread", lambda s: number(s["spread"], ".3f")),
    ("ds error", lambda s: number(s["ds_error"], ".0e")),
    ("forward", lambda s: number(s["forward_gain_from_first"], "#.3g")),
    ("backward", lambda s: number(s["backward_gain_to_last"], "#.3g")),
    ("cosine", lambda s: number(s["cosine"], ".3f")),
    ("streams", lambda s: number(s["effective_streams"], ".2f")),
    ("reads most", read_most_text),
    ("loss, M = I", functools.partial(loss_change_text, "identity")),
    ("loss, M = mean", functools.partial(loss_change_text, "mean")),
]


def table(found):
    """`analysis` as text: a line a sublayer."""
    title = f"{found['checkpoint']}: step {found['step']}, {found['mixer']}, n = "
    title += f"{found['n_streams']}, composite gain {found['composite_gain']:.3f}"
    if found["loss"] is not None:
        title += f", loss {found['loss']:.4f} on {found['loss_tokens']:,} tokens"
    lines = [title, ""]
    cells = [[heading for heading, _ in COLUMNS]]
    cells += [[show(sublayer) for _, show in COLUMNS] for sublayer in found["sublayers"]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths))
        lines.append("  ".join([row[0].ljust(widths[0]), *others]))
    return "\n".join(lines)


# ---- many runs -----------------------------------------------------------------------------------


def compare_runs():
    if figure not in ("all", *FIGURES):
        raise ValueError(f"figure must be all or one of {', '.join(FIGURES)}, not {figure!r}")
    folders = []
    for pattern in runs.split(","):
        found = sorted(glob.glob(os.path.expanduser(pattern)))
        if not found:
            raise RunError(
                f"--runs={pattern}: there is no such folder; a pattern is --runs='out/laptop-*'"
            )
        folders += map(Path, found)
    target = Path(out or os.path.commonpath(folders)).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    points = curves.points_of(curves.read_results(folders))
    for line in curves.differing_knobs(points):
        print(f"warning: {line}")
    for name in FIGURES if figure == "all" else (figure,):
        try:
            FIGURES[name](points, target)
            print(f"written: {target / name}.png")
        except NothingToDraw as reason:
            if name == figure:
                raise
            print(f"no {name}.png: {reason}")


class NothingToDraw(ValueError):
    """The runs have nothing that the figure could show; the message says what is missing."""


def draw_loss(points, target):
    losses = curves.by_tokens(points, "val")
    if not losses:
        raise NothingToDraw("no run has a loss that is finite")
    arms = {point.arm for point in points}
    name = next((name for name in references.split(",") if name in arms), None)
    if not name:
        print(f"loss.png has no differences: no run is of --references={references}")
    differences = curves.differences(points, name) if name else []
    plots.save(
        target / "loss.png",
        plots.loss_figure,
        losses,
        curves.by_seconds(points, "val"),
        differences,
        name,
        curves.tokens_of_a_step(points),
    )


def draw_training(points, target):
    norms, gains = curves.by_tokens(points, "norm_max"), curves.by_tokens(points, "gain")
    if not norms:
        raise NothingToDraw("no run has a step between two evaluations yet")
    step = curves.tokens_of_a_step(points)
    plots.save(target / "training.png", plots.training_figure, norms, gains, step)


def draw_study(points, target):
    """The last losses against those of each of `references`."""
    unfinished = [
        point
        for point in points
        if any(run["steps"] < run["knobs"]["max_iters"] for run in point.finished().values())
    ]
    for point in unfinished:
        print(f"{curves.label(point)} is not in study.png: it has runs that are not finished")
    points = [point for point in points if point not in unfinished]
    panels = {name: curves.last_differences(points, name) for name in references.split(",")}
    unused = [
        f"no differences from {name}: {curves.why_no_differences(points, name)}"
        for name, rows in panels.items()
        if not rows
    ]
    panels = {name: rows for name, rows in panels.items() if rows}
    if not panels:
        raise NothingToDraw(f"{'; '.join(unused)}. Name other arms with --references=…")
    for line in unused:
        print(f"study.png has {line}")
    plots.save(target / "study.png", plots.study_figure, curves.arms_in_order(points), panels)


def draw_gain(points, target):
    """From the newest checkpoints, else from the gain.json of an earlier call."""
    path = target / "gain.json"
    with_checkpoint = [
        (point, seed, run["folder"])
        for point in points
        for seed, run in point.runs.items()
        if run["folder"] and checkpoints.checkpoints(run["folder"])
    ]
    if with_checkpoint:
        asked = sum(len(point.runs) for point in points)
        if asked > len(with_checkpoint):
            print(f"{asked - len(with_checkpoint)} of {asked} runs have no checkpoint for gain.png")
        kept = gains_of_runs(with_checkpoint)
        write_json(path, {"provenance": provenance(), "runs": kept})
    elif path.exists():
        kept = json.loads(path.read_text())["runs"]
    else:
        raise NothingToDraw(
            f"no checkpoint in the runs, and no {path}; name the folders of the runs themselves, "
            f"with --out={target}"
        )
    plots.save(target / "gain.png", plots.gain_figure, *curves.by_depth(kept))


def gains_of_runs(with_checkpoint):
    """[(point, seed, folder)] -> the runs in gain.json; says which cannot be loaded, and why."""
    kept = []
    for point, seed, folder in with_checkpoint:
        try:
            kept.append(gain_of_run(point, seed, folder))
        except (RunError, ValueError) as error:
            print(f"{curves.label(point)}, seed {seed}, is not in gain.png: {error}")
    if not kept:
        raise NothingToDraw("none of the checkpoints can be loaded")
    return kept


def gain_of_run(point, seed, folder):
    """One run in gain.json: the gains by depth, as in `analysis`, of its newest checkpoint."""
    path, where = checkpoints.find(folder), pick_device(device)
    state, model = load_model(path, stream_dtype="auto")
    model.to(where)
    blocks = open_validation(path, state, tokens)
    sublayers, n_tokens = look_at(model, validation_batches(blocks, tokens, where))
    gains = gains_by_depth(mean_matrices(sublayers))
    return {
        "arm": curves.label(point),
        "mixer": model.config.mixer,
        "seed": seed,
        "checkpoint": str(path),
        "step": state["step"],
        "tokens": n_tokens,
        "forward_gain_from_first": [gain["forward_gain_from_first"] for gain in gains],
        "backward_gain_to_last": [gain["backward_gain_to_last"] for gain in gains],
    }


FIGURES = {"loss": draw_loss, "training": draw_training, "study": draw_study, "gain": draw_gain}


if __name__ == "__main__":
    run_script(main)
