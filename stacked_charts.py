"""
The transportation charts for many streams: the maps of charts.py on tensors instead of planes.

A chart over n^2 planes is n^2 pieces of code, which takes a compiler too long when n is large. Here
a tensor holds them: its first dimension counts the numbers of a token, its last the N tokens. The
compiler of a model sees a chart as one operation, and does not look inside. Inside, each step (a
row of tbp, or all blocks of one size of rtbp) is compiled once, and all sublayers use it. The tests
compare these maps with those of charts.py.
"""

import itertools
from functools import cache
from types import FunctionType

import torch

from charts import (
    Choose,
    border,
    point,
    remaining,
    spread,
    sums_to_the_right,
    tbp_row,
    transport,
)
from compile_options import compiler_options


def step(function, compiled, logits, sums, *others):
    """A step of a chart, compiled if `compiled`.

    function: takes logits (k, N), then what is left of columns or rows (n, N), then other tensors.
    """
    if compiled:
        function = kernel_of(function, *sums.shape)
    return function(logits, sums, *others)


@cache
def kernel_of(function, n, N):
    """The function, compiled for tensors of these sizes; it compiles at its first call.

    dynamic=False, so each N has a kernel of its own. With the default, PyTorch makes a kernel for
    any N when a second N comes; it could round differently, and a resumed run would not end with
    the same bits. Each N also has a copy of the code, since Dynamo gives up on code that it has
    compiled 8 times.
    The first call runs under other dispatch keys than later ones. So the second call traces the
    function once more, and finds the kernel in the compiler's cache."""
    own = FunctionType(function.__code__.replace(), function.__globals__)
    return torch.compile(own, fullgraph=True, dynamic=False, options=compiler_options(n))


def one_token_dimension(logits):
    """(K, ...) -> (K, N)."""
    return logits.reshape(len(logits), logits[0].numel())


# ---- tbp -----------------------------------------------------------------------------------------


def tbp_stacked(logits, n):
    """`tbp` for many streams, row by row: logits ((n-1)^2, ...) -> M (n, n, ...)."""
    M, _ = tbp_by_rows(one_token_dimension(logits), n, torch.compiler.is_compiling())
    return M.view(n, n, *logits.shape[1:])


@torch.library.custom_op("charts::tbp_by_rows", mutates_args=())
@torch.no_grad()  # otherwise the compiler would make a backward of each row too
def tbp_by_rows(logits: torch.Tensor, n: int, compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ((n-1)^2, N) -> M (n, n, N), and for the backward what is left of the columns before
    each row but the last, (n-1, n, N).

    compiled: whether a row is one kernel, or runs operation by operation."""
    rows, columns = [], [logits.new_ones(n, logits.shape[1])]
    for own in logits.split(n - 1):
        entries, rest = step(row_forward, compiled, own, columns[-1])
        rows.append(entries)
        columns.append(rest)
    return torch.stack([*rows, columns[-1]]), torch.stack(columns[:-1])


@torch.library.custom_op("charts::tbp_by_rows_backward", mutates_args=())
@torch.no_grad()
def tbp_by_rows_backward(
    logits: torch.Tensor, columns: torch.Tensor, grad: torch.Tensor, compiled: bool
) -> torch.Tensor:
    """The gradient of M (n, n, N) -> that of the logits."""
    n = len(grad)
    grads, grad_rest = [], grad[-1]
    for own, c, grad_row in reversed(list(zip(logits.split(n - 1), columns, grad))):
        grad_own, grad_rest = step(row_backward, compiled, own, c, grad_row, grad_rest)
        grads.append(grad_own)
    return torch.cat(grads[::-1])


def row_forward(logits, c):
    """The logits of a row (n-1, N), and c (n, N), what is left of the columns -> the row's entries,
    and what is left of the columns after it, both (n, N)."""
    choose = Choose(logits.unbind(0))
    entries, rest = tbp_row(choose, 0, c.unbind(0))  # 0 stands for any row: only Recall uses it
    return torch.stack(entries), torch.stack(rest)


def row_backward(logits, c, grad_entries, grad_rest):
    """The gradients of what `row_forward` returns -> those of its arguments. Written by hand:
    autograd's own compiles twice as slowly, and needs more registers."""
    c, grad_m, grad_c = c.unbind(0), grad_entries.unbind(0), list(grad_rest.unbind(0))
    right = sums_to_the_right(c)
    r, kept = torch.ones_like(c[0]), []
    for j in range(len(c) - 1):
        lo, hi, share = (r - right[j]).relu(), torch.minimum(r, c[j]), logits[j].sigmoid()
        row_limits = ((r < c[j]).to(r) + (r <= c[j]).to(r)) / 2  # 1/2 where both limit m equally
        kept.append((share, hi - lo, row_limits, lo > 0))
        r = r - point(lo, hi, logits[j])

    grad_c[-1] = grad_c[-1] * (c[-1] > r)
    grad_r = grad_m[-1] - grad_c[-1]
    grad_logits, grad_los = [], []
    for j in reversed(range(len(c) - 1)):
        share, width, row_limits, lo_counts = kept[j]
        grad = grad_m[j] - grad_r - grad_c[j]
        grad_logits.append(grad * width * share * (1 - share))
        grad_hi = grad * share
        grad_lo = (grad - grad_hi) * lo_counts
        grad_r = grad_r + grad_hi * row_limits + grad_lo
        grad_c[j] = grad_c[j] + grad_hi * (1 - row_limits)
        grad_los.append(grad_lo)

    # lo_k = relu(r - sum_{l>k} c_l): c_j is subtracted in lo_k for every k < j.
    for j, total in enumerate(itertools.accumulate(reversed(grad_los)), start=1):
        grad_c[j] = grad_c[j] - total
    return torch.stack(grad_logits[::-1]), torch.stack(grad_c)


# ---- rtbp ----------------------------------------------------------------------------------------


def rtbp_stacked(logits, n):
    """`rtbp` for many streams: logits ((n-1)^2, ...) -> M (n, n, ...).

    All blocks of a size are cut at once, side by side, as one block of more tokens."""
    M = rtbp_by_sizes(one_token_dimension(logits), n, torch.compiler.is_compiling())
    return M.view(n, n, *logits.shape[1:])


@torch.library.custom_op("charts::rtbp_by_sizes", mutates_args=())
@torch.no_grad()
def rtbp_by_sizes(logits: torch.Tensor, n: int, compiled: bool) -> torch.Tensor:
    """Logits ((n-1)^2, N) -> M (n, n, N). compiled: as in `tbp_by_rows`."""
    ones = logits.new_ones(n, logits.shape[1])
    return transport_stacked(logits, ones, ones, compiled)


@torch.library.custom_op("charts::rtbp_by_sizes_backward", mutates_args=())
@torch.no_grad()
def rtbp_by_sizes_backward(
    logits: torch.Tensor, grad: torch.Tensor, compiled: bool
) -> torch.Tensor:
    """The gradient of M (n, n, N) -> that of the logits."""
    ones = logits.new_ones(len(grad), logits.shape[1])
    grad_logits, _, _ = transport_backward(logits, ones, ones, grad, compiled)
    return grad_logits


def transport_stacked(logits, r, c, compiled):
    """`transport`, from logits ((n-1)^2, N) in the chart's order and the sums r and c (n, N) of
    rows and columns -> M (n, n, N)."""
    n = len(r)
    own, inner = own_and_inner(logits, n)
    if n == 2:
        return step(smallest, compiled, own, r, c)
    if n % 2:
        last_column, last_row, r, c = step(peel, compiled, own, r, c)
        upper = torch.cat([transport_stacked(inner, r, c, compiled), last_column[:, None]], 1)
        return torch.cat([upper, last_row[None]])
    r, c = step(quarter, compiled, own, r, c)
    return four_as_one(transport_stacked(side_by_side(inner), r, c, compiled))


def transport_backward(logits, r, c, grad, compiled):
    """The gradient of `transport_stacked`: that of M (n, n, N) -> those of logits, r and c."""
    n = len(r)
    own, inner = own_and_inner(logits, n)
    if n == 2:
        return step(smallest_backward, compiled, own, r, c, grad)
    if n % 2:
        _, _, inner_r, inner_c = step(peel, compiled, own, r, c)
        grad_inner, *grad_sums = transport_backward(
            inner, inner_r, inner_c, grad[:-1, :-1], compiled
        )
        grad_column, grad_row = grad[:-1, -1], grad[-1]
        grads = step(peel_backward, compiled, own, r, c, grad_column, grad_row, *grad_sums)
    else:
        inner_r, inner_c = step(quarter, compiled, own, r, c)
        grad_inner, *grad_sums = transport_backward(
            side_by_side(inner), inner_r, inner_c, one_as_four(grad), compiled
        )
        grad_inner = one_after_another(grad_inner)
        grads = step(quarter_backward, compiled, own, r, c, *grad_sums)
    grad_own, grad_r, grad_c = grads
    return torch.cat([grad_own, grad_inner]), grad_r, grad_c


def own_and_inner(logits, n):
    """The logits of a block of size n -> those of its own cut, and those of the blocks inside.

    Odd n: 1 for the corner, and n - 2 for each of two spreads. Even n: 1 for the mass of the top
    left block, and n/2 - 1 for each of four spreads. Both make 2n - 3."""
    return logits[: 2 * n - 3], logits[2 * n - 3 :]


def smallest(logits, r, c):
    """Logits (1, N), r and c (2, N) -> M (2, 2, N)."""
    M = transport(Choose(logits.unbind(0)), range(2), range(2), r.unbind(0), c.unbind(0))
    return torch.stack([torch.stack(row) for row in M])


def peel(logits, r, c):
    """Takes the last row and column off a block of odd size n: its own logits (2n-3, N), r and c
    (n, N) -> the column without the corner, the row, and r and c of the rest."""
    r, c = r.unbind(0), c.unbind(0)
    corner, column, row = border(Choose(logits.unbind(0)), range(len(r)), range(len(c)), r, c)
    rest = remaining(r[:-1], column), remaining(c[:-1], row)
    return tuple(map(torch.stack, (column, [*row, corner], *rest)))


def quarter(logits, r, c):
    """Cuts a block of even size n into four, in the order top left, top right, bottom left, bottom
    right: its own logits (2n-3, N), r and c (n, N) -> r and c of the four, (n/2, 4 N) each."""
    h = len(r) // 2
    R1, C1, C2 = sum(r[:h]), sum(c[:h]), sum(c[h:])
    m11 = point((R1 - C2).relu(), torch.minimum(R1, C1), logits[0])
    # The four spreads of `transport`, side by side.
    mass = torch.cat([m11, C1 - m11, m11, R1 - m11])
    capacity = torch.cat([r[:h], r[h:], c[:h], c[h:]], 1)
    choose = Choose(side_by_side(logits[1:]).unbind(0))
    # range(h) and range(1) are stand-ins: only Recall uses them.
    taken = torch.stack(spread(choose, mass, capacity.unbind(0), range(h), range(1), by_rows=True))
    rest = (capacity - taken).relu()  # for the other blocks of the same rows or columns
    r_tl, r_bl, c_tl, c_tr = taken.chunk(4, 1)
    r_tr, r_br, c_bl, c_br = rest.chunk(4, 1)
    return torch.cat([r_tl, r_tr, r_bl, r_br], 1), torch.cat([c_tl, c_tr, c_bl, c_br], 1)


# The gradients of these three, by autograd.


def smallest_backward(logits, r, c, grad):
    return torch.func.vjp(smallest, logits, r, c)[1](grad)


def peel_backward(logits, r, c, *grads):
    return torch.func.vjp(peel, logits, r, c)[1](grads)


def quarter_backward(logits, r, c, *grads):
    return torch.func.vjp(quarter, logits, r, c)[1](grads)


def side_by_side(logits):
    """Logits (4 k, N) of four problems, one after the other -> (k, 4 N)."""
    return logits.unflatten(0, (4, len(logits) // 4)).transpose(0, 1).flatten(1)


def one_after_another(logits):
    """The inverse of `side_by_side`: (k, 4 N) -> (4 k, N)."""
    return logits.unflatten(1, (4, logits.shape[1] // 4)).transpose(0, 1).flatten(0, 1)


def four_as_one(blocks):
    """The four blocks of `quarter`, (h, h, 4 N) -> M (2h, 2h, N)."""
    parts = blocks.unflatten(2, (2, 2, blocks.shape[2] // 4))  # (h, h, lower, right, N)
    return parts.movedim((2, 3), (0, 2)).flatten(2, 3).flatten(0, 1)


def one_as_four(M):
    """M (2h, 2h, N) -> its four blocks, (h, h, 4 N)."""
    h = len(M) // 2
    return M.unflatten(1, (2, h)).unflatten(0, (2, h)).movedim((0, 2), (2, 3)).flatten(2)


# ---- what PyTorch must know about the operations -------------------------------------------------


def like_logits(logits, *_):
    return logits.new_empty(logits.shape)  # contiguous, whatever logits are


@tbp_by_rows.register_fake
def like_tbp_by_rows(logits, n, compiled):
    N = logits.shape[1]
    return logits.new_empty(n, n, N), logits.new_empty(n - 1, n, N)


def keep_rows(ctx, inputs, output):
    logits, _, ctx.compiled = inputs
    _, columns = output
    ctx.save_for_backward(logits, columns)
    ctx.mark_non_differentiable(columns)


def through_rows(ctx, grad_M, _):
    return tbp_by_rows_backward(*ctx.saved_tensors, grad_M, ctx.compiled), None, None


tbp_by_rows.register_autograd(through_rows, setup_context=keep_rows)
tbp_by_rows_backward.register_fake(like_logits)


@rtbp_by_sizes.register_fake
def like_rtbp_by_sizes(logits, n, compiled):
    return logits.new_empty(n, n, logits.shape[1])


def keep_logits(ctx, inputs, output):
    logits, _, ctx.compiled = inputs
    ctx.save_for_backward(logits)


def through_sizes(ctx, grad_M):
    return rtbp_by_sizes_backward(*ctx.saved_tensors, grad_M, ctx.compiled), None, None


rtbp_by_sizes.register_autograd(through_sizes, setup_context=keep_logits)
rtbp_by_sizes_backward.register_fake(like_logits)
