"""
What a run reports while it goes: counts, a clock, and the lines of its log.

    progress = Progress()
    tally, clock = Tally(progress.tally, device), Clock(progress.step)
    tally.add(bad, norm, limit)                 # every step; the host does not wait
    line = metrics_line(step, logged_step, tally, clock, loss, norm, lr)    # here it does
    print(log_line(line, max_iters, tokens_per_step))
"""

import math
import time
from dataclasses import dataclass, field

import torch


@dataclass
class Progress:
    """What a checkpoint carries beside weights and moments."""

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
