"""
What a run reports while it goes: counts, a clock, the lines of its log, and metrics.jsonl.

    progress = Progress()
    tally, clock = Tally(progress.tally, device), Clock(progress.step)
    tally.add(bad, norm, limit)                 # every step; the host does not wait
    line = metrics_line(step, logged_step, tally, clock, loss, norm, lr)    # here it does
    print(log_line(line, max_iters, tokens_per_step))
    Metrics(out_dir, step).write(**line)
"""

import errno
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data import finite, write_atomic
from runtime import RunError


@dataclass
class Progress:
    """How far a run is. A checkpoint carries this beside weights and moments."""

    step: int = 0
    best_val: float = math.inf
    evaluated: int | None = None  # the step of the last evaluation
    logged_step: int = 0  # the step of the last log line
    tally: list = field(default_factory=lambda: [0.0] * 5)  # what a Tally has counted since then
    scaler: dict = field(default_factory=dict)  # the loss scale of float16


class Tally:
    """Counts on the device: only `read` makes the host wait for it.

    bad_in_a_row    steps in a row, up to now, whose loss or gradient was not finite
    worst           the most of them in a row
    skipped         steps that were not finite; their updates were skipped
    clipped         steps whose gradient was clipped
    norm_max        the largest norm of a finite gradient

    `reset` sets all but the first to 0.
    """

    def __init__(self, counts, device):
        """counts: what `read` returned."""
        (
            self.bad_in_a_row,
            self.worst,
            self.skipped,
            self.clipped,
            self.norm_max,
        ) = torch.tensor(counts, device=device)

    def add(self, bad, norm, limit):
        """Count a step. bad: whether its loss or gradient is not finite. norm: of its gradient,
        which is clipped where it is above `limit`. All are tensors but the limit."""
        self.bad_in_a_row = (self.bad_in_a_row + 1) * bad
        self.worst = torch.maximum(self.worst, self.bad_in_a_row)
        self.skipped = self.skipped + bad
        self.clipped = self.clipped + (~bad & (norm > limit))
        self.norm_max = torch.where(bad, self.norm_max, torch.maximum(self.norm_max, norm))

    def read(self):
        counts = [self.bad_in_a_row, self.worst, self.skipped, self.clipped, self.norm_max]
        return torch.stack(counts).tolist()

    def reset(self):
        zeros = torch.zeros(4, device=self.worst.device)
        self.worst, self.skipped, self.clipped, self.norm_max = zeros


class Clock:
    """Seconds since `restart`, and how many of them the loop waited for data."""

    def __init__(self, step):
        self.restart(step)

    def restart(self, step):
        self.step, self.began, self.waited = step, time.perf_counter(), 0.0

    def seconds_per_step(self, step):
        return (time.perf_counter() - self.began) / (step - self.step)


def metrics_line(step, logged_step, tally, clock, loss, norm, lr):
    """-> a line of metrics, as a dict.

    loss, norm and lr are the last step's; norm_max, clipped and skipped cover the steps since
    logged_step; ms and data_ms, milliseconds a step, those since the clock's restart. clipped is a
    share of the steps, bad counts the newest steps in a row that were not finite, worst the most in
    a row since the last line.
    """
    loss, norm = torch.stack([loss, norm]).tolist()
    bad_in_a_row, worst, skipped, clipped, norm_max = tally.read()
    return {
        "step": step,
        "loss": loss,
        "norm": norm,
        "norm_max": norm_max,
        "lr": lr,
        "clipped": clipped / (step - logged_step),
        "skipped": int(skipped),
        "bad": int(bad_in_a_row),
        "worst": int(worst),
        "ms": clock.seconds_per_step(step) * 1e3,
        "data_ms": clock.waited / (step - clock.step) * 1e3,
    }


def log_line(line, max_iters, tokens_per_step, ideal_ms=0.0, seconds_left=0.0):
    """A line of metrics as text. ideal_ms: of a step at the devices' peak flops. For this and
    seconds_left, 0 means unknown."""
    tokens_per_second = tokens_per_step / line["ms"] * 1e3
    text = (
        f"step {line['step']}/{max_iters} | loss {line['loss']:.4f} | norm {line['norm']:.3f} | "
        f"lr {line['lr']:.2e} | {line['ms']:.0f} ms | {tokens_per_second:,.0f} tok/s"
    )
    if ideal_ms:
        text += f" | mfu {ideal_ms / line['ms']:.1%}"
    if seconds_left:
        text += f" | {duration(seconds_left)} left"
    if line["skipped"]:
        text += f" | {line['skipped']} not finite, skipped ({line['bad']} in a row)"
    return text


def duration(seconds):
    """3725.0 -> "1h 2m": the two largest units that are not 0."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = ((days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s"))
    return " ".join([f"{count}{unit}" for count, unit in units if count][:2]) or "0s"


# ---- metrics.jsonl -------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl: one JSON object on each line.

    step      where the run goes on: the lines that a killed run wrote beyond it are dropped. None:
              the run begins, and all lines are dropped.
    trackers  objects whose `write` gets each line as well, as a dict
    Raises RunError or DataError when the disk is full or not writable.
    """

    def __init__(self, out_dir, step, trackers=()):
        self.trackers = trackers
        self.path = Path(out_dir) / "metrics.jsonl"
        try:
            if self.path.exists():
                lines = self.path.read_bytes().splitlines(keepends=True)
                kept = [line for line in lines if step is not None and _step_of(line) <= step]
                write_atomic(self.path, *kept)
            self.file = open(self.path, "ab", buffering=0)  # a line at a time: a kill loses none
        except OSError as error:
            raise RunError(
                f"{self.path}: could not be opened ({error.strerror}). Make it writable, or name "
                "another --out_dir"
            ) from error

    def write(self, **record):
        record = finite(record)
        line = json.dumps(record).encode() + b"\n"
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RunError(
                f"{self.path}: could not be written ({error.strerror}). Free some space, then go "
                "on with --init_from=resume"
            ) from error
        for tracker in self.trackers:
            tracker.write(record)


def _step_of(line):
    """The step of a line of metrics; infinite where a kill or a full disk left half of one."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
