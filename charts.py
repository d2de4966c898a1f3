"""
Transportation charts: (n-1)^2 logits -> every doubly stochastic n x n matrix, exactly (TBP and
RTBP, 2605.21724). The mixers tbp and rtbp are these two.

A chart walks over M and asks `choose(lo, hi, rows, cols)` for the mass of a block of M, which may
lie anywhere between lo and hi. In the map, the next logit says where. In the inverse, M is known,
and the logit that gives its mass is written down: on the interior of the polytope that logit exists
and is unique. Every choice leaves a problem that has a solution, so nothing is ever projected or
renormalised.

As in mixers.py, M is a list of n rows of n planes. Rows and columns of a block are ranges.
"""

import itertools

import torch

STRAIGHT_LINE = 8  # streams; with more, the forms at the end walk many entries at a time


class Choose:
    """The map: the next logit says where the mass lies. Which block it is does not matter."""

    def __init__(self, logits):
        self.logits = iter(logits)

    def __call__(self, lo, hi, rows, cols):
        return point(lo, hi, next(self.logits))


class Recall:
    """The inverse: the mass is what M has, and the logit that gives it is written down."""

    def __init__(self, M):
        self.M, self.logits = M, []

    def __call__(self, lo, hi, rows, cols):
        block = self.M[..., rows.start : rows.stop, cols.start : cols.stop]
        mass = block.sum((-2, -1))
        self.logits.append(((mass - lo) / (hi - lo)).logit())
        return mass


def inverse(chart, M, n):
    """M (..., n, n) -> logits (..., (n-1)^2), not finite on the border of the polytope."""
    recall = Recall(M)
    chart(recall, n, torch.ones_like(M[..., 0, 0]))
    return torch.stack(recall.logits, -1)


def point(lo, hi, logit):
    """The point of [lo, hi] at a logit: lo at -inf, hi at +inf."""
    return torch.minimum(lo + (hi - lo) * logit.sigmoid(), hi)  # never above hi by rounding


# ---- tbp -----------------------------------------------------------------------------------------


def tbp(planes, n):
    """The transportation chart, entry by entry (TBP, 2605.21724)."""
    if n > STRAIGHT_LINE:
        return tbp_by_diagonals(torch.stack(planes), n)
    return tbp_chart(Choose(planes), n, torch.ones_like(planes[0]))


def tbp_chart(choose, n, one):
    """With r and c what is left of row i and of column j:

        lo = max(0, r_i - sum_{l>j} c_l)      hi = min(r_i, c_j)      M_ij in [lo, hi]

    The source has a third lower bound, c_j - sum_{k>i} r_k. It is never above 0 here, since the
    rows below are still whole.
    """
    c, M = [one] * n, []
    for i in range(n - 1):
        right = list(itertools.accumulate(reversed(c[1:])))[::-1]  # right[j] = sum_{l>j} c_l
        r, row = one, []
        for j in range(n - 1):
            lo, hi = (r - right[j]).relu(), torch.minimum(r, c[j])
            m = choose(lo, hi, range(i, i + 1), range(j, j + 1))
            r, c[j] = r - m, c[j] - m
            row.append(m)
        c[-1] = (c[-1] - r).relu()
        M.append(row + [r])
    return M + [c]


# ---- rtbp ----------------------------------------------------------------------------------------


def rtbp(planes, n):
    """The transportation chart, recursive (RTBP, 2605.21724)."""
    if n > STRAIGHT_LINE:
        return rtbp_by_quarters(torch.stack(planes), n)
    return rtbp_chart(Choose(planes), n, torch.ones_like(planes[0]))


def rtbp_chart(choose, n, one):
    """Split the mass over four blocks, choose the row and column sums of each, and recurse."""
    return transport(choose, range(n), range(n), [one] * n, [one] * n)


def transport(choose, rows, cols, r, c):
    """The block rows x cols of M, whose rows sum to r and whose columns sum to c."""
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
    # a and g: row sums of the left blocks; u and s: column sums of the top left and top right.
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
    """Share `mass` of the block rows x cols out over its rows, or over its columns, none of which
    takes more than its capacity: a binary tree of choices."""
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


def remaining(margins, taken):
    return [(margin - t).relu() for margin, t in zip(margins, taken)]


# ---- more than 8 streams: the same maps, many entries at a time ----------------------------------
# A straight line over n^2 planes takes a compiler too long when n is large. Here a tensor carries
# the index of an entry in its first dimension, before the tokens. Tests hold these maps to the
# straight lines above.


def tbp_by_diagonals(logits, n):
    """`tbp_chart` one antidiagonal at a time: logits ((n-1)^2, ...) -> n rows of n planes.

    The entries (i, d - i) of antidiagonal d depend only on the antidiagonals before: what is left
    of the columns right of (i + 1, j) is what was left right of (i, j), less what row i has left.
    Each variable has a row for each active i, from the top:
    r      what is left of row i
    c      what is left of column d - i
    right  what is left of all columns right of that one
    lost   the rounding error of `right` so far, kept apart (Neumaier's compensated summation):
           `right` shrinks from n - 1 to where 1e-7 counts
    """
    one = torch.ones_like(logits[:1])
    diagonals, last_column, last_row = [], [], []
    r, c, right, lost = one, one, one * (n - 1), 0 * one
    for d in range(2 * n - 3):
        top, bottom = max(0, d - n + 2), min(d, n - 2)
        t = logits[d + top * (n - 2) : d + bottom * (n - 2) + 1 : n - 2]  # (bottom - top + 1, ...)
        m = point((r - right - lost).relu(), torch.minimum(r, c), t)
        r, c = r - m, c - m
        before, right = right, right - r
        lost = lost + (before - right - r).detach()
        diagonals.append(dict(zip(range(top, bottom + 1), m.unbind(0))))
        if d < n - 2:  # row and column d + 1 join
            r, c = torch.cat([r, one]), torch.cat([one, c])
            right, lost = torch.cat([one * (n - 2 - d), right]), torch.cat([0 * one, lost])
        else:  # the first row is complete, and so is the last column
            last_column.append(r[0])
            last_row.append(c[-1])
            r, c, right, lost = r[1:], c[:-1], right[:-1], lost[:-1]
    corner = one[0]
    for rest in last_column:
        corner = (corner - rest).relu()
    M = [[diagonals[i + j][i] for j in range(n - 1)] + [last_column[i]] for i in range(n - 1)]
    return M + [last_row + [corner]]


def rtbp_by_quarters(logits, n):
    """`rtbp_chart` with the four blocks of a problem as one problem of four times the size: logits
    ((n-1)^2, ...) -> n rows of n planes."""
    one = torch.ones_like(logits[0])
    return transport_by_quarters(logits, [one] * n, [one] * n)


def transport_by_quarters(logits, r, c):
    """`transport` for any n: planes (..., ) with logits (K, ...) in the chart's order."""
    n, choose = len(r), Choose(logits)
    if n <= 4:
        return transport(choose, range(n), range(n), r, c)
    if n % 2:
        corner, last_col, last_row = border(choose, range(n), range(n), r, c)
        r, c = remaining(r[:-1], last_col), remaining(c[:-1], last_row)
        inner = transport_by_quarters(logits[2 * n - 3 :], r, c)
        return [row + [last] for row, last in zip(inner, last_col)] + [last_row + [corner]]

    # The four spreads of `transport`, a, g, u and s, side by side in one tensor. Which rows and
    # columns they are of does not matter to Choose.
    h = n // 2
    R1, C1, C2 = sum(r[:h]), sum(c[:h]), sum(c[h:])
    m11 = choose((R1 - C2).relu(), torch.minimum(R1, C1), range(h), range(h))
    mass = torch.stack([m11, C1 - m11, m11, R1 - m11])
    capacity = [torch.stack(planes) for planes in zip(r[:h], r[h:], c[:h], c[h:])]
    choose_four = Choose(logits[1 : 4 * h - 3].unflatten(0, (4, h - 1)).unbind(1))
    shares = spread(choose_four, mass, capacity, range(h), range(h), by_rows=True)
    a, g, u, s = zip(*(share.unbind(0) for share in shares))

    rows = [torch.stack(planes) for planes in zip(a, remaining(r[:h], a), g, remaining(r[h:], g))]
    cols = [torch.stack(planes) for planes in zip(u, s, remaining(c[:h], u), remaining(c[h:], s))]
    blocks = logits[4 * h - 3 :].unflatten(0, (4, (h - 1) ** 2)).transpose(0, 1)
    quarters = transport_by_quarters(blocks, rows, cols)  # planes (4, ...)
    whole = [[plane.unbind(0) for plane in row] for row in quarters]
    # The four planes of an entry are those of the top left, top right, bottom left, bottom right.
    top = [[p[0] for p in row] + [p[1] for p in row] for row in whole]
    bottom = [[p[2] for p in row] + [p[3] for p in row] for row in whole]
    return top + bottom
