"""
Transportation charts: (n-1)^2 logits -> every doubly stochastic n x n matrix without a 0, exactly
(TBP and RTBP, 2605.21724). The mixers tbp and rtbp are these two.

The mass of a block of M is the sum of its entries. A chart walks over M and asks
`choose(lo, hi, rows, cols)` for the mass of one block after another; any mass from lo to hi is
possible. In the map, the next logit says which mass. In the inverse, M is known, and the logit that
gives its mass is written down; where no entry of M is 0, that logit exists and is unique. Every
choice leaves a problem that has a solution, so nothing is ever projected or renormalised.

As in mixers.py, M is a list of n rows of n planes. The rows and columns of a block are ranges. For
many streams stacked_charts.py has the same maps on tensors.
"""

import itertools

import torch


class Choose:
    """The map: the next logit says where the mass lies between lo and hi, for any block."""

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
    right = sums_to_the_right(c)
    r, entries, rest = torch.ones_like(c[0]), [], []
    for j in range(len(c) - 1):
        lo, hi = (r - right[j]).relu(), torch.minimum(r, c[j])
        m = choose(lo, hi, range(i, i + 1), range(j, j + 1))
        r = r - m
        entries.append(m)
        rest.append(c[j] - m)
    return entries + [r], rest + [(c[-1] - r).relu()]  # relu: rounding could go below 0


def sums_to_the_right(c):
    """c_0 .. c_{n-1} -> sum_{l>j} c_l for each j but the last."""
    return list(itertools.accumulate(reversed(c[1:])))[::-1]


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
        return [[m, r[0] - m], [below, (r[1] - below).relu()]]  # relu: as in tbp_row
    if n % 2:
        corner, last_col, last_row = border(choose, rows, cols, r, c)
        r, c = remaining(r[:-1], last_col), remaining(c[:-1], last_row)
        inner = transport(choose, rows[:-1], cols[:-1], r, c)
        return [row + [last] for row, last in zip(inner, last_col)] + [last_row + [corner]]

    h = n // 2
    top, bottom, left, right = rows[:h], rows[h:], cols[:h], cols[h:]
    R1, C1, C2 = sum(r[:h]), sum(c[:h]), sum(c[h:])
    m11 = choose((R1 - C2).relu(), torch.minimum(R1, C1), top, left)
    # Row sums of the two left blocks, then column sums of the two top ones. Each spread takes the
    # next logits.
    r_tl = spread(choose, m11, r[:h], top, left, by_rows=True)
    r_bl = spread(choose, C1 - m11, r[h:], bottom, left, by_rows=True)
    c_tl = spread(choose, m11, c[:h], top, left, by_rows=False)
    c_tr = spread(choose, R1 - m11, c[h:], top, right, by_rows=False)

    # What they leave for the other blocks of the same rows or columns.
    r_tr, r_br = remaining(r[:h], r_tl), remaining(r[h:], r_bl)
    c_bl, c_br = remaining(c[:h], c_tl), remaining(c[h:], c_tr)
    top_left = transport(choose, top, left, r_tl, c_tl)
    top_right = transport(choose, top, right, r_tr, c_tr)
    bottom_left = transport(choose, bottom, left, r_bl, c_bl)
    bottom_right = transport(choose, bottom, right, r_br, c_br)
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
