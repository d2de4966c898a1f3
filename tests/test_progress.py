"""What a run reports while it goes: its counts, and durations in words."""

import math

import pytest
import torch

from progress import Tally, duration

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
