"""
How near a mixer gets to doubly stochastic matrices: by its inverse, and by gradient descent.

    python -m dev.reach                                    # every mixer, n = 3, 4, 8
    python -m dev.reach --mixers=tbp,kronecker --streams=4 --out=out/reach

Targets T are 250 random matrices of each kind in `TARGETS`, all moved by 1 % towards the uniform
matrix, since permutation matrices have infinite logits. Adam fits a matrix to each target, from two
starts: where training starts (mix_start .01), and the uniform matrix. The best of three learning
rates counts. Distances are Frobenius norms of M - T; the distance of M = I stands beside them.

The task asks for one matrix M that shows each of n streams in turn: the first row of M^t should be
stream t's unit vector, for t = 1 .. 2n. Its loss is the mean squared distance of those rows. Some
n-cycle is needed, a permutation that visits every stream.

    reach.json     for every mixer, n and kind: the median, and the lowest and the highest tenth
    reach.png      the medians as a figure
"""

import argparse
import math
import os
from functools import partial
from pathlib import Path

import torch

import plots
from data import write_json
from mixers import (
    MIXERS,
    ds_error,
    find_mixer,
    mixing_logits,
    mixing_matrix,
    n_logits,
    start_logits,
)
from runtime import provenance, run_script

SOFT = 0.01  # how far a target is moved towards the uniform matrix
RATES = (0.03, 0.1, 0.3)
STARTS = {"start": 0.01, "uniform": 1.0}  # of `blend`
SOLVED = 0.01  # the task is solved at a lower loss
TRIES = 16  # at the task, with noise of standard deviation .1 on the starting logits


# ---- targets -------------------------------------------------------------------------------------


def cycles(count, n):
    """Random n-cycles: stream i moves to where the next stream was. (count, n, n)"""
    order = torch.rand(count, n).argsort(-1)
    M = torch.zeros(count, n, n, dtype=torch.float64)
    M[torch.arange(count)[:, None], order, order.roll(-1, 1)] = 1
    return M


def mixtures(count, n, n_permutations):
    """Mixtures of random permutations, with weights uniform on the simplex. (count, n, n)"""
    weights = -torch.rand(count, n_permutations, dtype=torch.float64).log()
    weights /= weights.sum(-1, keepdim=True)
    chosen = torch.rand(count, n_permutations, n).argsort(-1)
    permutations = torch.nn.functional.one_hot(chosen, n).double()
    return (weights[..., None, None] * permutations).sum(1)


def sinkhorn_samples(count, n):
    """Sinkhorn-Knopp of exp(2 z), z normal, with rounds until the sums are exact. (count, n, n)"""
    M = (2 * torch.randn(count, n, n, dtype=torch.float64)).exp()
    while ds_error(M).max() > 1e-9:
        M = M / M.sum(-2, keepdim=True)
        M = M / M.sum(-1, keepdim=True)
    return M


TARGETS = {
    "n-cycle": cycles,
    "two permutations": lambda count, n: mixtures(count, n, 2),
    # Caratheodory: no doubly stochastic matrix needs more
    "many permutations": lambda count, n: mixtures(count, n, (n - 1) ** 2 + 1),
    "sinkhorn sample": sinkhorn_samples,
}


def make_targets(count, n):
    """`count` of each kind, in the order of TARGETS. (kinds * count, n, n)"""
    targets = torch.cat([make(count, n) for make in TARGETS.values()])
    return (1 - SOFT) * targets + SOFT / n


# ---- how near ------------------------------------------------------------------------------------


def distance(M, target):
    return (M - target).norm(dim=(-2, -1))


def by_inverse(name, targets):
    """How far M(inverse(T)) is from T; infinite where the mixer says that it has no such M."""
    found = []
    for target in targets:
        try:
            M = mixing_matrix(name, mixing_logits(name, target), len(target))
            found.append(distance(M, target))
        except ValueError:
            found.append(torch.tensor(torch.inf, dtype=torch.float64))
    return torch.stack(found)


def descend(name, n, logits, loss, steps):
    """Adam at each of RATES, side by side.

    logits: (count, K), where each rate begins. loss: a function of M (count, n, n) -> (count,).
    -> (kept steps, count): at each step of `kept_steps`, the lowest loss so far at any rate.
    """
    parameters = [logits.clone().requires_grad_() for _ in RATES]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, RATES)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    lowest, kept = torch.full((len(logits),), torch.inf, dtype=torch.float64), []

    for step in range(steps + 1):
        matrices = mixing_matrix(name, torch.cat(parameters), n).chunk(len(RATES))
        losses = [loss(M) for M in matrices]
        for now in losses:
            lowest = torch.minimum(lowest, now.detach())
        if step in kept_steps(steps):
            kept.append(lowest)
        optimizer.zero_grad()
        sum(now.sum() for now in losses).backward()
        optimizer.step()
        schedule.step()
    return torch.stack(kept)


def kept_steps(steps):
    """Steps at which a distance is kept: 0, about eight in every power of 10, and the last."""
    spaced = {round(10 ** (k / 8)) for k in range(8 * 6)}
    return sorted({0, steps} | {step for step in spaced if step < steps})


def squared_distance(M, target):
    """A loss of `descend`."""
    return (M - target).square().sum((-2, -1))


def show_in_turn(M):
    """The loss of the task, (count,): how far the first rows of M, M^2 .. M^2n are from the unit
    vectors of stream 1, 2 .. n - 1, 0, 1 .."""
    n = M.shape[-1]
    row = torch.eye(n, dtype=M.dtype)[0].expand(len(M), 1, n)
    wanted, off = torch.eye(n, dtype=M.dtype), 0
    for t in range(1, 2 * n + 1):
        row = row @ M
        off = off + (row[:, 0] - wanted[t % n]).square().sum(-1)
    return off / (2 * n)


def tenths(numbers):
    """-> [a tenth lies below, median, a tenth lies above]; None for infinity, which JSON lacks."""
    found = [numbers.quantile(q, interpolation="lower").item() for q in (0.1, 0.5, 0.9)]
    return [None if math.isinf(number) else number for number in found]


def study(name, n, targets, steps):
    """How near mixer `name` gets to the targets: {kind: {way: tenths}}.

    The ways: "inverse", and "start" and "uniform", where Adam began. Of these two there are also
    "start_medians" and "uniform_medians", the median at each of `kept_steps`. Under the kind "task"
    are the losses of the task, and how many of the TRIES solved it.
    """
    ways = {"inverse": by_inverse(name, targets)}
    logits = [
        start_logits(name, n, eps).double().expand(len(targets), -1) for eps in STARTS.values()
    ]
    from_all = partial(squared_distance, target=targets.repeat(len(STARTS), 1, 1))
    lowest = descend(name, n, torch.cat(logits), from_all, steps).sqrt()
    histories = dict(zip(STARTS, lowest.chunk(len(STARTS), dim=1)))
    ways |= {start: history[-1] for start, history in histories.items()}

    found = {}
    for k, kind in enumerate(TARGETS):
        found[kind] = {way: tenths(off.chunk(len(TARGETS))[k]) for way, off in ways.items()}
        for start, history in histories.items():
            medians = history.chunk(len(TARGETS), dim=1)[k].quantile(0.5, dim=1)
            found[kind][start + "_medians"] = medians.tolist()

    logits = start_logits(name, n, STARTS["start"]).double()
    logits = logits + 0.1 * torch.randn(TRIES, len(logits), dtype=torch.float64)
    losses = descend(name, n, logits, show_in_turn, steps)[-1]
    found["task"] = {"start": tenths(losses), "solved": (losses < SOLVED).sum().item()}
    return found


def why_not(name, n):
    """Why the mixer cannot be asked, or ''. ValueError for an unknown name."""
    if not find_mixer(name).doubly_stochastic:
        return "its M is not doubly stochastic"
    try:
        return "" if n_logits(name, n) else "it has no logits"
    except ValueError as error:
        return str(error)


# ---- what is written -----------------------------------------------------------------------------


def of_identity(targets):
    """How far M = I is, in the form of `study`. It has no logits that Adam could change."""
    off = distance(torch.eye(targets.shape[-1], dtype=targets.dtype), targets).chunk(len(TARGETS))
    return {kind: dict.fromkeys(STARTS, tenths(numbers)) for kind, numbers in zip(TARGETS, off)}


def table(found):
    """A line for each n and mixer: the median distance by gradient descent from the start, and how
    often the task was solved."""
    lines = []
    for n, mixers in found.items():
        heads = [f"n = {n}", *TARGETS, f"task, of {TRIES}"]
        lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for name, of_mixer in mixers.items():
            cells = [f"{of_mixer[kind]['start'][1]:.4f}" for kind in TARGETS]
            cells.append(str(of_mixer["task"]["solved"]) if "task" in of_mixer else "")
            lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def reach_figure(found, steps):
    """A row for each n, a column for each kind of target: median distance against steps of Adam."""
    figure = plots.new_figure(2.0 * len(found) + 0.8)
    grid = figure.subplots(len(found), len(TARGETS), sharex=True, sharey=True, squeeze=False)
    for row, (n, mixers) in zip(grid, found.items()):
        row[0].set_ylabel(f"n = {n}\ndistance from target")
        for axes, kind in zip(row, TARGETS):
            for name, of_mixer in mixers.items():
                ink = plots.colour(name)
                for start, dashes in (("start", "-"), ("uniform", (0, (1, 1)))):
                    if medians := of_mixer[kind].get(start + "_medians"):
                        axes.plot(kept_steps(steps)[1:], medians[1:], color=ink, linestyle=dashes)
            axes.axhline(mixers["identity"][kind]["start"][1], color=plots.colour("identity"))
    for axes, kind in zip(grid[0], TARGETS):
        axes.set_title(kind)
    for axes in grid[-1]:
        axes.set_xlabel("steps of Adam")
    grid[0, 0].set(xscale="log", yscale="log", xlim=(1, steps), ylim=(1e-3, 4))
    name_lines(figure, found)
    return figure


def name_lines(figure, found):
    from matplotlib.lines import Line2D

    names = dict.fromkeys(name for mixers in found.values() for name in mixers)
    lines = [Line2D([], [], color=plots.colour(name), label=name) for name in names]
    for label, dashes in (("from the start of training", "-"), ("from the uniform M", (0, (1, 1)))):
        lines.append(Line2D([], [], color=plots.INK, linestyle=dashes, label=label))
    style = {"fontsize": plots.LABEL_SIZE, "frameon": False}
    figure.legend(handles=lines, loc="outside lower center", ncols=4, **style)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--mixers", default="", help="with commas; empty: all that are defined")
    parser.add_argument("--streams", default="3,4,8", help="n, with commas")
    parser.add_argument("--targets", type=int, default=250, help="random matrices of a kind")
    parser.add_argument("--steps", type=int, default=500, help="of Adam")
    path = os.path.expanduser  # a shell leaves the ~ of --out=~/reach
    parser.add_argument("--out", type=path, default="out/reach", help="folder for what is written")
    options = parser.parse_args()
    wanted = options.mixers.split(",") if options.mixers else list(MIXERS)

    found = {}
    for n in map(int, options.streams.split(",")):
        torch.manual_seed(n)
        targets = make_targets(options.targets, n)
        found[n] = {"identity": of_identity(targets)}
        for name in wanted:
            if reason := why_not(name, n):
                print(f"n = {n}: {name} is left out: {reason}")
                continue
            torch.manual_seed(n)  # the noise of the task
            found[n][name] = study(name, n, targets, options.steps)
            print(f"n = {n}: {name} is done", flush=True)

    settings = {"provenance": provenance(), "targets": options.targets, "steps": options.steps}
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "reach.json", {**settings, "found": found})
    plots.save(out / "reach.png", reach_figure, found, options.steps)
    print(table(found))
    print(f"written: {out / 'reach.json'}, {out / 'reach.png'}")


if __name__ == "__main__":
    run_script(main)
