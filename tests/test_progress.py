"""What a run reports while it goes: its counts, the lines of its log, and durations in words."""

import math
from types import SimpleNamespace

import pytest
import torch

from progress import Clock, Tally, duration, log_line, metrics_line

pytestmark = pytest.mark.quick


def test_a_tally_counts_bad_steps_and_clipped_ones_and_the_largest_norm():
    """A bad step is not a clipped one, and its norm is not the largest, be it NaN or infinite."""
    tally = Tally([0.0] * 5, torch.device("cpu"))
    for norm in (0.5, 3.0, math.nan, math.inf, 2.0, math.inf):
        norm = torch.tensor(norm)
        tally.add(~norm.isfinite(), norm, 1.0)
    assert tally.read() == [1, 2, 3, 2, 3.0]  # bad in a row, worst, skipped, clipped, norm_max
    tally.reset()
    assert tally.read() == [1, 0, 0, 0, 0]
    tally.add(torch.tensor(True), torch.tensor(math.nan), 1.0)
    assert tally.read() == [2, 2, 1, 0, 0]  # the row goes on after the log line


def test_a_line_is_of_the_steps_since_the_last_one(monkeypatch):
    """The last line was at step 10, and an evaluation at step 12, which the clock leaves out."""
    times = iter([100.0, 102.0])
    monkeypatch.setattr("progress.time", SimpleNamespace(perf_counter=lambda: next(times)))
    tally, clock = Tally([1.0, 2.0, 3.0, 4.0, 0.5], torch.device("cpu")), Clock(12)
    clock.waited = 0.75
    line = metrics_line(20, 10, tally, clock, torch.tensor(3.0), torch.tensor(0.25), 1e-3)
    counts = {"norm_max": 0.5, "clipped": 0.4, "skipped": 3, "bad": 1, "worst": 2}
    seen = {"step": 20, "loss": 3.0, "norm": 0.25, "lr": 1e-3}
    assert line == {**seen, **counts, "ms": 250.0, "data_ms": 93.75}
    start = "step 20/30 | loss 3.0000 | norm 0.250 | lr 1.00e-03 | 250 ms | 4,000 tok/s"
    bad = " | 3 not finite, skipped (1 in a row)"
    assert log_line(line, 30, 1000) == start + bad
    text = log_line({**line, "skipped": 0}, 30, 1000, ideal_ms=100.0, seconds_left=61.0)
    assert text == start + " | mfu 40.0% | 1m 1s left"


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0s"),
        (59.6, "1m"),
        (61, "1m 1s"),
        (3725, "1h 2m"),
        (3605, "1h 5s"),
        (2 * 86400 + 3 * 3600 + 59, "2d 3h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text
