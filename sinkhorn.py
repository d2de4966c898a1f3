"""
Sinkhorn-Knopp, the mixer sinkhorn: n^2 logits -> M, whose rows sum to 1 exactly, and whose columns
sum to 1 in the limit of many rounds (mHC, 2512.24880, eq. 9).

As in mixers.py, M is a list of n rows of n planes.
"""

from functools import reduce

import torch

from planes import in_rows, transpose_planes


def sinkhorn(planes, n, *, sinkhorn_rounds=20):
    """The matrix exp(logits) after some rounds, each of which divides every column by its sum, then
    every row. Rows come last, since the mix sums over rows: their sums are 1 to rounding.
    """
    return in_rows(Sinkhorn.apply(n, sinkhorn_rounds, *planes), n)


def sinkhorn_stacked(logits, n, *, sinkhorn_rounds=20):
    """As `sinkhorn`, for many streams: logits (n^2, ...) -> M (n, n, ...).

    The first round is taken in logarithms, where no row can underflow to 0. In all later rounds the
    sum of a line is at least 1/n.
    """
    log_M = logits.unflatten(0, (n, n)).log_softmax(0)
    M = log_M.softmax(1)
    for _ in range(sinkhorn_rounds - 1):
        M = M / M.sum(0)
        M = M / M.sum(1, keepdim=True)
    return M


class Sinkhorn(torch.autograd.Function):
    """The rounds with a backward written by hand. With autograd's, a layer of the model took 195
    launches in the graph for an H100; with this one and larger kernels it takes 73 (LOG.md).

    A half round divides each line by its sum. Let M be the matrix after the half round, and g the
    gradient of log M there. Then the gradient before the half round is g - M * sum(g), line by
    line. The backward first runs all rounds again and keeps only the divisors. Then it undoes one
    half round after the other, by multiplying M by the divisors.

    The divisors are stacked, so that Inductor stores them and makes two kernels, one that runs the
    rounds and one that undoes them. A single kernel would hold hundreds of planes and spill a
    GPU's registers.
    """

    @staticmethod
    def forward(ctx, n, rounds, *logits):
        ctx.n, ctx.rounds = n, rounds
        ctx.save_for_backward(*logits)
        M, _ = run_rounds(logits, n, rounds)
        return tuple(M)

    @staticmethod
    def backward(ctx, *grad_M):
        n = ctx.n
        M, divisors = run_rounds(ctx.saved_tensors, n, ctx.rounds)
        stored = torch.stack([*divisors, *grad_M]).unbind(0)
        divisors, grad_M = stored[: -n * n], stored[-n * n :]
        g = [grad * m for grad, m in zip(grad_M, M)]  # the gradient of log M
        g = undo_division(g, M, n)
        for first in range(len(divisors) - n, -1, -n):  # of the n divisors of a half round
            M = [m * divisors[first + k // n] for k, m in enumerate(M)]
            M = transpose_planes(M, n)
            g = undo_division(transpose_planes(g, n), M, n)
        return None, None, *transpose_planes(g, n)


def run_rounds(logits, n, rounds):
    """-> M after all rounds, as n^2 planes row by row, and the divisors, n for each half round
    except the first. A line is a column in the first half round, a row in the second, and so on.

    The first round is taken in logarithms, where no row can underflow to 0; in all later rounds the
    sum of a line is at least 1/n. Before a half round of columns M is transposed, and after it
    again, so that a line is always a row.
    """
    highest = [reduce(torch.maximum, logits[j::n]) for j in range(n)]
    log_sums = []
    for j in range(n):
        column = logits[j::n]
        log_sums.append(highest[j] + sum((x - highest[j]).exp() for x in column).log())
    log_M = [x - log_sums[k % n] for k, x in enumerate(logits)]

    highest = [reduce(torch.maximum, row) for row in in_rows(log_M, n)]
    M = [(x - highest[k // n]).exp() for k, x in enumerate(log_M)]
    M, sums = divide_lines(M, n)
    divisors = [total * peak.exp() for total, peak in zip(sums, highest)]

    for _ in range(2 * (rounds - 1)):
        M, sums = divide_lines(transpose_planes(M, n), n)
        divisors += sums
    return M, divisors


def divide_lines(M, n):
    """Divide every line of n planes by its sum -> the new planes, the n sums."""
    sums = [sum(line) for line in in_rows(M, n)]
    return [m / sums[k // n] for k, m in enumerate(M)], sums


def undo_division(g, M, n):
    """The gradient of log M after a half round -> the one before it."""
    sums = [sum(line) for line in in_rows(g, n)]
    return [grad - m * sums[k // n] for k, (grad, m) in enumerate(zip(g, M))]
