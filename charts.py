"""
Transportation charts: (n-1)^2 logits -> every doubly stochastic n x n matrix, exactly (TBP and
RTBP, 2605.21724). The mixers tbp and rtbp are these two.

The mass of a block of M is the sum of its entries. A chart walks over M and asks
`choose(lo, hi, rows, cols)` for the mass of one block after another; any mass from lo to hi is
possible. In the map, the next logit says which mass. In the inverse, M is known, and the logit that
gives its mass is written down; where no entry of M is 0, that logit exists and is unique. Every
choice leaves a problem that has a solution, so nothing is ever projected or renormalised.

As in mixers.py, M is a list of n rows of n planes. The rows and columns of a block are ranges.
"""

import itertools
from functools import cache, partial

import torch

from compile_options import compiler_options


class Choose:
    """The map: the next logit says where the mass lies, whichever block it is of."""

    def __init__(self, logits):
        self.logits = iter(logits)

    def __call__(self, lo, hi, rows, cols):
        return point(lo, hi, next(self.logits))


class Recall:
    """The inverse: the mass is that of M's block, and the logit that gives it is written down."""

    def __init__(self, M):
        self.M, self.logits = M, []

    def __call__(self, lo, hi, rows, cols):
        block = self.M[..., rows.start : rows.stop, cols.start : cols.stop]
        mass = block.sum((-2, -1))
        self.logits.append(((mass - lo) / (hi - lo)).logit())
        return mass


def inverse(chart, M, n):
    """M (..., n, n) -> logits (..., (n-1)^2), not finite where an entry of M is 0."""
    recall = Recall(M)
    chart(recall, n, torch.ones_like(M[..., 0, 0]))
    return torch.stack(recall.logits, -1)


def point(lo, hi, logit):
    """The point of [lo, hi] at a logit: lo at -inf, hi at +inf."""
    # Rounding could give a sum above hi.
    return torch.minimum(lo + (hi - lo) * logit.sigmoid(), hi)


# ---- tbp -----------------------------------------------------------------------------------------


def tbp(planes, n):
    """The transportation chart, entry by entry (TBP, 2605.21724)."""
    return tbp_chart(Choose(planes), n, torch.ones_like(planes[0]))


def tbp_chart(choose, n, one):
    """Entry by entry, row by row. r_i is what is left of row i, and c_j what is left of column j:

        lo = max(0, r_i - sum_{l>j} c_l)      hi = min(r_i, c_j)      M_ij in [lo, hi]

    The source has a third lower bound, c_j - sum_{k>i} r_k. It is never above 0 here, since each of
    the rows below still has all of its mass, 1.
    """
    c, M = [one] * n, []
    for i in range(n - 1):
        row, c = tbp_row(choose, i, c)
        M.append(row)
    return M + [c]


def tbp_row(choose, i, c):
    """Row i of M. c: what is left of each column before this row -> the row's entries, and what is
    left of each column after it."""
    right = list(itertools.accumulate(reversed(c[1:])))[::-1]  # right[j] = sum_{l>j} c_l
    r, entries, rest = torch.ones_like(c[0]), [], []
    for j in range(len(c) - 1):
        lo, hi = (r - right[j]).relu(), torch.minimum(r, c[j])
        m = choose(lo, hi, range(i, i + 1), range(j, j + 1))
        r = r - m
        entries.append(m)
        rest.append(c[j] - m)
    return entries + [r], rest + [(c[-1] - r).relu()]


# ---- rtbp ----------------------------------------------------------------------------------------


def rtbp(planes, n):
    """The transportation chart, recursive (RTBP, 2605.21724)."""
    return rtbp_chart(Choose(planes), n, torch.ones_like(planes[0]))


def rtbp_chart(choose, n, one):
    """Split the mass over four blocks, choose the row and column sums of each, and recurse."""
    return transport(choose, range(n), range(n), [one] * n, [one] * n)


def transport(choose, rows, cols, r, c):
    """The block rows x cols of M, whose rows sum to r and whose columns sum to c.

    A block of even size is cut into four blocks of half the size; one of odd size first loses its
    last row and column."""
    n = len(rows)
    if n == 2:
        lo, hi = (r[0] - c[1]).relu(), torch.minimum(r[0], c[0])
        m = choose(lo, hi, rows[:1], cols[:1])
        below = c[0] - m
        return [[m, r[0] - m], [below, (r[1] - below).relu()]]
    if n % 2:
        corner, last_col, last_row = border(choose, rows, cols, r, c)
        r, c = remaining(r[:-1], last_col), remaining(c[:-1], last_row)
        inner = transport(choose, rows[:-1], cols[:-1], r, c)
        return [row + [last] for row, last in zip(inner, last_col)] + [last_row + [corner]]

    h = n // 2
    top, bottom, left, right = rows[:h], rows[h:], cols[:h], cols[h:]
    R1, C1, C2 = sum(r[:h]), sum(c[:h]), sum(c[h:])
    m11 = choose((R1 - C2).relu(), torch.minimum(R1, C1), top, left)
    # Row sums of the left blocks: a (top), g (bottom). Column sums of the top: u (left), s (right).
    a = spread(choose, m11, r[:h], top, left, by_rows=True)
    g = spread(choose, C1 - m11, r[h:], bottom, left, by_rows=True)
    u = spread(choose, m11, c[:h], top, left, by_rows=False)
    s = spread(choose, R1 - m11, c[h:], top, right, by_rows=False)

    b, d = remaining(r[:h], a), remaining(r[h:], g)  # what a and g leave for the right blocks
    v, w = remaining(c[:h], u), remaining(c[h:], s)  # what u and s leave for the bottom blocks
    top_left, top_right = transport(choose, top, left, a, u), transport(choose, top, right, b, s)
    bottom_left = transport(choose, bottom, left, g, v)
    bottom_right = transport(choose, bottom, right, d, w)
    upper = [x + y for x, y in zip(top_left, top_right)]
    lower = [x + y for x, y in zip(bottom_left, bottom_right)]
    return upper + lower


def border(choose, rows, cols, r, c):
    """-> the corner entry, the rest of the last column, the rest of the last row."""
    lo, hi = (r[-1] - sum(c[:-1])).relu(), torch.minimum(r[-1], c[-1])
    m = choose(lo, hi, rows[-1:], cols[-1:])
    last_col = spread(choose, c[-1] - m, r[:-1], rows[:-1], cols[-1:], by_rows=True)
    last_row = spread(choose, r[-1] - m, c[:-1], rows[-1:], cols[:-1], by_rows=False)
    return m, last_col, last_row


def spread(choose, mass, capacity, rows, cols, by_rows):
    """Divide the mass of the block rows x cols among its rows (by_rows) or its columns, none of
    which takes more than its capacity: a binary tree of choices between two halves."""
    if len(capacity) == 1:
        return [torch.minimum(mass, capacity[0])]
    h = len(capacity) // 2
    first = (rows[:h], cols) if by_rows else (rows, cols[:h])
    rest = (rows[h:], cols) if by_rows else (rows, cols[h:])
    lo, hi = (mass - sum(capacity[h:])).relu(), torch.minimum(mass, sum(capacity[:h]))
    m = choose(lo, hi, *first)
    return [
        *spread(choose, m, capacity[:h], *first, by_rows),
        *spread(choose, mass - m, capacity[h:], *rest, by_rows),
    ]


def remaining(sums, taken):
    """What is left of each sum; rounding does not take it below 0."""
    return [(total - part).relu() for total, part in zip(sums, taken)]


# ---- many streams: the same maps on tensors ------------------------------------------------------
# A straight line over n^2 planes takes a compiler too long when n is large. Here the first
# dimensions of a tensor count entries, and the tokens come after them. A chart is one operation
# that the compiler of a model does not look into. The tests compare these maps with the straight
# lines above.


def tbp_stacked(logits, n):
    """`tbp` for many streams: logits ((n-1)^2, ...) -> M (n, n, ...).

    In a compiled model one kernel does a row. It is compiled by itself, and all rows of all
    sublayers call it."""
    M, _ = tbp_by_rows(logits, n, torch.compiler.is_compiling())
    return M


@torch.library.custom_op("charts::tbp_by_rows", mutates_args=())
@torch.no_grad()  # or the compiler would make a backward of each row too
def tbp_by_rows(logits: torch.Tensor, n: int, compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ((n-1)^2, ...) -> M (n, n, ...), and for the backward what is left of the columns
    before each row but the last, (n-1, n, ...).

    compiled: whether a row is one kernel."""
    step = row_step(row_forward, n, compiled)
    rows, columns = [], [logits.new_ones(n, *logits.shape[1:])]
    for own in logits.split(n - 1):
        entries, rest = step(own, columns[-1])
        rows.append(entries)
        columns.append(rest)
    return torch.stack([*rows, columns[-1]]), torch.stack(columns[:-1])


@torch.library.custom_op("charts::tbp_by_rows_backward", mutates_args=())
@torch.no_grad()
def tbp_by_rows_backward(
    logits: torch.Tensor, columns: torch.Tensor, grad: torch.Tensor, compiled: bool
) -> torch.Tensor:
    """The gradient of M (n, n, ...) -> that of the logits."""
    n = len(grad)
    step = row_step(row_backward, n, compiled)
    grads, grad_rest = [], grad[-1]
    for own, c, grad_row in reversed(list(zip(logits.split(n - 1), columns, grad))):
        grad_own, grad_rest = step(own, c, grad_row, grad_rest)
        grads.append(grad_own)
    return torch.cat(grads[::-1])


def row_forward(logits, c):
    """The logits of a row (n-1, ...), and c (n, ...), what is left of the columns -> the row's
    entries, and what is left of the columns after it, both (n, ...)."""
    choose = Choose(logits.unbind(0))
    entries, rest = tbp_row(choose, 0, c.unbind(0))  # which row it is matters to Recall alone
    return torch.stack(entries), torch.stack(rest)


def row_backward(logits, c, grad_entries, grad_rest):
    """The gradients of what `row_forward` returns -> those of its arguments. Written by hand:
    autograd's own compiles twice as slowly, and needs more registers."""
    c, grad_m, grad_c = c.unbind(0), grad_entries.unbind(0), list(grad_rest.unbind(0))
    right = list(itertools.accumulate(reversed(c[1:])))[::-1]
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

    # lo falls as the columns to the right have more left: column j is right of all before it.
    for j, total in enumerate(itertools.accumulate(reversed(grad_los)), start=1):
        grad_c[j] = grad_c[j] - total
    return torch.stack(grad_logits[::-1]), torch.stack(grad_c)


@cache
def row_step(function, n, compiled):
    """`row_forward` or `row_backward`, as one kernel if `compiled`: it compiles at its first call.

    PyTorch checks the first call of a compiled graph under other dispatch keys. So a later call
    traces the function again, and finds the kernel in the compiler's cache."""
    if not compiled:
        return function
    return torch.compile(function, fullgraph=True, dynamic=False, options=compiler_options(n))


@torch.library.custom_op("charts::rtbp_stacked", mutates_args=())
def rtbp_stacked(logits: torch.Tensor, n: int) -> torch.Tensor:
    """`rtbp` with parts of a problem side by side, as one problem on more numbers: logits
    ((n-1)^2, ...) -> M (n, n, ...)."""
    return rtbp_side_by_side(logits, n).contiguous()


@torch.library.custom_op("charts::rtbp_stacked_backward", mutates_args=())
def rtbp_stacked_backward(logits: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of M (n, n, ...) -> that of the logits, by autograd."""
    _, backward = torch.func.vjp(partial(rtbp_side_by_side, n=len(grad)), logits)
    return backward(grad)[0].contiguous()


def rtbp_side_by_side(logits, n):
    """The map, in operations that autograd knows."""
    ones = torch.ones_like(logits[:1]).expand(n, *logits.shape[1:])
    return transport_stacked(logits, ones, ones)


def transport_stacked(logits, r, c):
    """`transport`, from logits (K, ...) in the chart's order and the sums r and c (n, ...) of rows
    and columns -> M (n, n, ...)."""
    n, h = len(r), len(r) // 2
    if n == 2:
        m = point((r[0] - c[1]).relu(), torch.minimum(r[0], c[0]), logits[0])
        below = c[0] - m
        entries = torch.stack([m, r[0] - m, below, (r[1] - below).relu()])
        return entries.unflatten(0, (2, 2))
    if n % 2:
        return transport_odd(logits, r, c)

    # The four spreads a, g, u, s of `transport`, and then its four blocks, side by side.
    R1, C1, C2 = r[:h].sum(0), c[:h].sum(0), c[h:].sum(0)
    m11 = point((R1 - C2).relu(), torch.minimum(R1, C1), logits[0])
    mass = torch.stack([m11, C1 - m11, m11, R1 - m11])
    capacity = torch.stack([r[:h], r[h:], c[:h], c[h:]], 1)  # (h, 4, ...)
    spreads, blocks = logits[1 : 4 * h - 3], logits[4 * h - 3 :]
    taken = spread_stacked(side_by_side(spreads, 4), mass, capacity)
    left = (capacity - taken).relu()  # for the other blocks of the same rows or columns
    (a, g, u, s), (b, d, v, w) = taken.unbind(1), left.unbind(1)
    rows, columns = torch.stack([a, b, g, d], 1), torch.stack([u, s, v, w], 1)
    quarters = transport_stacked(side_by_side(blocks, 4), rows, columns)  # (h, h, 4, ...)
    quarters = quarters.unflatten(2, (2, 2))  # (row, column, lower, right, ...)
    return quarters.movedim((2, 3), (0, 2)).flatten(2, 3).flatten(0, 1)


def transport_odd(logits, r, c):
    """As `transport` for odd n: a corner, the rest of its row and column, and an even problem."""
    n = len(r)
    lo, hi = (r[-1] - c[:-1].sum(0)).relu(), torch.minimum(r[-1], c[-1])
    corner = point(lo, hi, logits[0])
    last_column = spread_stacked(logits[1 : n - 1], c[-1] - corner, r[:-1])
    last_row = spread_stacked(logits[n - 1 : 2 * n - 3], r[-1] - corner, c[:-1])
    rest = (r[:-1] - last_column).relu(), (c[:-1] - last_row).relu()
    inner = transport_stacked(logits[2 * n - 3 :], *rest)
    upper = torch.cat([inner, last_column[:, None]], 1)
    lower = torch.cat([last_row, corner[None]])
    return torch.cat([upper, lower[None]])


def spread_stacked(logits, mass, capacity):
    """`spread`: mass (...), capacity (h, ...) -> the shares (h, ...)."""
    h = len(capacity)
    if h == 1:
        return torch.minimum(mass, capacity[0])[None]
    left, right = capacity[: h // 2], capacity[h // 2 :]
    lo, hi = (mass - right.sum(0)).relu(), torch.minimum(mass, left.sum(0))
    m = point(lo, hi, logits[0])
    if h % 2:
        first, rest = logits[1 : h // 2], logits[h // 2 :]
        return torch.cat([spread_stacked(first, m, left), spread_stacked(rest, mass - m, right)])
    halves = torch.stack([m, mass - m]), torch.stack([left, right], 1)
    shares = spread_stacked(side_by_side(logits[1:], 2), *halves)  # (h / 2, 2, ...)
    return shares.transpose(0, 1).flatten(0, 1)


def side_by_side(logits, count):
    """Logits (K, ...) of `count` problems, one after the other -> (K / count, count, ...)."""
    return logits.unflatten(0, (count, -1 if len(logits) else 0)).transpose(0, 1)


# ---- what PyTorch must know about the operations -------------------------------------------------


def like_logits(logits, *_):
    return logits.new_empty(logits.shape)  # contiguous, whatever logits are


@tbp_by_rows.register_fake
def like_tbp_by_rows(logits, n, compiled):
    tokens = logits.shape[1:]
    return logits.new_empty(n, n, *tokens), logits.new_empty(n - 1, n, *tokens)


def keep_rows(ctx, inputs, output):
    logits, _, ctx.compiled = inputs
    _, columns = output
    ctx.save_for_backward(logits, columns)
    ctx.mark_non_differentiable(columns)


def through_rows(ctx, grad_M, _):
    return tbp_by_rows_backward(*ctx.saved_tensors, grad_M, ctx.compiled), None, None


tbp_by_rows.register_autograd(through_rows, setup_context=keep_rows)
tbp_by_rows_backward.register_fake(like_logits)


@rtbp_stacked.register_fake
def like_rtbp_stacked(logits, n):
    return logits.new_empty(n, n, *logits.shape[1:])


def keep_logits(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def through_rtbp(ctx, grad):
    return rtbp_stacked_backward(*ctx.saved_tensors, grad), None


rtbp_stacked.register_autograd(through_rtbp, setup_context=keep_logits)
rtbp_stacked_backward.register_fake(like_logits)
