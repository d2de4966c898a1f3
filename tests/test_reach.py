"""dev/reach.py: its targets, its task, and the answers that are known without it."""

import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT

from dev.reach import (
    SOFT,
    TARGETS,
    by_inverse,
    cycles,
    descend,
    distance,
    kept_steps,
    make_targets,
    mixtures,
    show_in_turn,
    squared_distance,
)
from mixers import start_logits

pytestmark = pytest.mark.quick


def shift(n):
    """Stream i gets what stream i + 1 had."""
    return torch.eye(n, dtype=torch.float64).roll(1, 1)


@pytest.mark.parametrize("n", (3, 4, 8))
def test_targets_lie_inside_the_polytope(n):
    targets = make_targets(5, n)
    assert targets.shape == (5 * len(TARGETS), n, n)
    torch.testing.assert_close(targets.sum(-1), torch.ones(len(targets), n).double())
    torch.testing.assert_close(targets.sum(-2), torch.ones(len(targets), n).double())
    assert targets.min() >= SOFT / n


@pytest.mark.parametrize("n", (3, 4, 8))
def test_cycles_come_home_after_n_moves_and_not_before(n):
    M = cycles(6, n)
    for power in range(1, n):
        moved = torch.linalg.matrix_power(M, power)
        assert moved.diagonal(dim1=-2, dim2=-1).sum() == 0, power
    assert torch.equal(torch.linalg.matrix_power(M, n), torch.eye(n).double().expand(6, n, n))


def test_mixtures_have_as_many_permutations_as_asked():
    assert ((mixtures(50, 8, 2) > 0).sum(-1) <= 2).all()
    assert ((mixtures(50, 8, 50) > 0).sum(-1) > 2).all()


@pytest.mark.parametrize("n", (3, 4, 5))
def test_the_task_is_solved_by_a_shift_and_not_by_standing_still(n):
    assert show_in_turn(shift(n)[None]).item() == 0
    # M = I shows stream 0 at all 2n times: right twice, and 2 off at the others
    still = show_in_turn(torch.eye(n, dtype=torch.float64)[None])
    assert still.item() == pytest.approx(2 * (2 * n - 2) / (2 * n))


def test_a_product_of_2_by_2_factors_is_symmetric_and_cannot_shift():
    """The nearest symmetric matrix to T is (T + T^T) / 2, at the norm of (T - T^T) / 2."""
    target = (1 - SOFT) * shift(4)[None] + SOFT / 4
    bound = distance(target, target.mT) / 2
    assert bound.item() == pytest.approx((1 - SOFT) * math.sqrt(2))

    logits = start_logits("kronecker", 4, 0.01).double()[None]
    loss = partial(squared_distance, target=target)
    nearest = descend("kronecker", 4, logits, loss, steps=200)[-1].sqrt()
    assert bound <= nearest * (1 + 1e-9)
    torch.testing.assert_close(nearest, bound, rtol=1e-3, atol=0)
    assert by_inverse("kronecker", target).isinf().all()


@pytest.mark.parametrize("mixer", ("tbp", "rtbp", "sinkhorn", "permutation"))
def test_what_can_be_reached_is_reached(mixer):
    torch.manual_seed(0)
    targets = make_targets(1, 3)
    assert by_inverse(mixer, targets).max() < 1e-5
    logits = start_logits(mixer, 3, 1.0).double().expand(len(targets), -1)
    loss = partial(squared_distance, target=targets)
    assert descend(mixer, 3, logits, loss, steps=200)[-1].sqrt().max() < 0.05


def test_a_descent_keeps_its_best_not_its_last():
    """A loss that only rises: the best is where it began."""
    calls = []

    def rising(M):
        calls.append(1)
        return M.sum((-2, -1)) * 0 + len(calls)

    logits = start_logits("tbp", 3, 0.01).double()[None]
    assert descend("tbp", 3, logits, rising, steps=5).flatten().tolist() == [1] * len(kept_steps(5))


def test_kept_steps_lie_between_the_start_and_the_end():
    assert kept_steps(1) == [0, 1]
    assert kept_steps(5) == [0, 1, 2, 3, 4, 5]
    assert kept_steps(1000)[-3:] == [562, 750, 1000]


def test_one_command_writes_numbers_and_a_figure(tmp_path):
    words = "-m dev.reach --mixers=kronecker,residual --streams=4 --targets=2 --steps=3".split()
    command = [sys.executable, *words, f"--out={tmp_path}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "| kronecker |" in shown
    assert "residual is left out: residual has one stream" in shown
    found = json.loads((tmp_path / "reach.json").read_text())["found"]["4"]
    assert set(found) == {"identity", "kronecker"}
    low, middle, high = found["kronecker"]["n-cycle"]["start"]
    assert (1 - SOFT) * math.sqrt(2) <= low <= middle <= high
    assert found["kronecker"]["n-cycle"]["inverse"] == [None] * 3
    assert (tmp_path / "reach.png").stat().st_size > 1000
    wrong = [*command[:3], "--mixers=tpb", "--targets=2"]
    said = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True).stderr
    assert said.startswith("ValueError: unknown mixer 'tpb'") and "Traceback" not in said
