"""
Everything that is particular to many residual streams.

A *mixer* turns K logits into an n x n matrix M, doubly stochastic but for the baselines; M mixes the n streams of the
residual state at every sublayer. Each is one pure function and one line of `MIXERS`; the tests, the model, the
benchmark and the diagnostics walk that registry.

    >>> M = mixing_matrix("tbp", torch.randn(8, 9), n_streams=4)    # (8, 9) logits -> (8, 4, 4) matrices
    >>> mixing_logits("tbp", M)                                     # and back
    >>> hc = HyperConnection("tbp", n_streams=4, n_embd=64)
    >>> x, square = hc(x, mean_square(x), branch)                   # (B, T, 4, 64), branch: (B, T, 64) -> (B, T, 64)

Inside, a matrix is n rows of n *planes*: tensors of the shape of one logit, so that a mixer is a straight-line program
which a compiler fuses into one kernel. Sources: HC arXiv:2409.19606, mHC 2512.24880, mHC-lite 2601.05732,
KromHC 2601.21579, TBP and RTBP 2605.21724, identity mixing 2607.28611.
"""
import inspect
import itertools
import math
from dataclasses import dataclass
from functools import partial, reduce
from typing import Callable

import torch
import torch._inductor.config
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# The mixers: K planes of logits -> n rows of n planes


def identity(logits, n):
    """M = I: streams meet only through what is read and written (iHC, 2607.28611). No planes at all stand for it."""
    return []


def unconstrained(logits, n):
    """M = the logits themselves, row by row (HC, 2409.19606): no constraint, so products of many may explode."""
    return [list(logits[i * n:(i + 1) * n]) for i in range(n)]


def sinkhorn(logits, n, *, sinkhorn_rounds=20):
    """Sinkhorn-Knopp of exp(logits) (mHC, 2512.24880, eq. 9): columns, then rows, divided by their sums, `rounds` times.

    Rows, over which the mixing sums, come last and are exact to rounding; columns only in the limit. The first round
    is taken in logarithms, where no row can underflow to nothing.
    """
    return unconstrained(_Sinkhorn.apply(n, sinkhorn_rounds, *logits), n)


class _Sinkhorn(torch.autograd.Function):
    """The iteration, and its derivative half round by half round: of what autograd records a compiler makes three times as
    many kernels.

    Where lines are divided by their sums, the gradient of the logarithms loses M times its sum over the line. The backward
    takes the rounds again and then M back, step by step, with their divisors. Stacked, these are stored between two kernels:
    one for the rounds and the way back would hold hundreds of planes at a time, more than a GPU's registers.
    """

    @staticmethod
    def forward(ctx, *args):
        ctx.n, ctx.rounds = args[:2]
        ctx.save_for_backward(*args[2:])
        return tuple(_sinkhorn_rounds(args[2:], *args[:2])[0])

    @staticmethod
    def backward(ctx, *g):
        n, (M, divisors) = ctx.n, _sinkhorn_rounds(ctx.saved_tensors, ctx.n, ctx.rounds)
        stored = torch.stack([*divisors, *g]).unbind(0)
        divisors, g = stored[:-n * n], stored[-n * n:]
        g = _before_division([g_ * m for g_, m in zip(g, M)], M, n)                # of the logarithms of M
        for first in range(len(divisors) - n, -1, -n):
            M = _transposed([m * divisors[first + k // n] for k, m in enumerate(M)], n)
            g = _before_division(_transposed(g, n), M, n)
        return None, None, *_transposed(g, n)


def _before_division(g, M, n):
    sums = _line_sums(g, n)
    return [g_ - m * sums[k // n] for k, (g_, m) in enumerate(zip(g, M))]


def _sinkhorn_rounds(logits, n, rounds):
    """The n^2 planes after all rounds, and what each half round but the first divided its n lines by, one after the other.
    Lines are columns in the first half round, rows in the second, ..."""
    highest = [reduce(torch.maximum, logits[j::n]) for j in range(n)]
    log_sums = [peak + sum((l - peak).exp() for l in logits[j::n]).log() for j, peak in enumerate(highest)]
    L = [l - log_sums[k % n] for k, l in enumerate(logits)]
    peaks = [reduce(torch.maximum, L[i * n:i * n + n]) for i in range(n)]
    M, sums = _divided_lines([(l - peaks[k // n]).exp() for k, l in enumerate(L)], n)
    divisors = [s * peak.exp() for s, peak in zip(sums, peaks)]
    for _ in range(2 * (rounds - 1)):
        M, sums = _divided_lines(_transposed(M, n), n)
        divisors += sums
    return M, divisors


def _line_sums(planes, n):
    return [sum(planes[i * n:i * n + n]) for i in range(n)]


def _divided_lines(planes, n):
    sums = [s.clamp(min=1e-30) for s in _line_sums(planes, n)]
    return [p / sums[k // n] for k, p in enumerate(planes)], sums


def _transposed(planes, n):
    return [p for j in range(n) for p in planes[j::n]]


def permutation(logits, n):
    """sum_k softmax(logits)_k P_k over all n! permutations in lexicographic order (mHC-lite, 2601.05732)."""
    if len(logits) > 24:                                # too many for a straight line
        logits = torch.stack(logits)                    # (n!, ...)
        weights = (logits - logits.amax(0)).exp()       # softmax() over 5040 strided logits is off by 4e-6, sum() is not
        M = _marginals(weights / weights.sum(0), n)
        return [list(row.clamp(max=1).unbind(0)) for row in M]
    peak = reduce(torch.maximum, logits)
    weights = _divided([(l - peak).exp() for l in logits])
    shares = [[[] for j in range(n)] for i in range(n)]
    for weight, columns in zip(weights, itertools.permutations(range(n))):
        for i, j in enumerate(columns):
            shares[i][j].append(weight)
    return [[sum(share).clamp(max=1) for share in row] for row in shares]


def _marginals(weights, n):
    """sum_k weights_k P_k: (n!, ...) -> (n, n, ...). No table: the order says where the first row's one stands."""
    if n == 1:
        return weights[None]
    weights = weights.unflatten(0, (n, -1))                                     # (n, (n-1)!, ...)
    minors = _marginals(weights.transpose(0, 1), n - 1)                         # (n-1, n-1, n, ...): without row 0, column k
    below = [minors[:, j - 1, :j].sum(1) + minors[:, min(j, n - 2), j + 1:].sum(1) for j in range(n)]
    return torch.cat([weights.sum(1)[None], torch.stack(below, 1)])


def kronecker(logits, n):
    """U_K (x) ... (x) U_1 over the prime factors of n in rising order, each U a `permutation` mixture (KromHC)."""
    M, logits = None, iter(logits)
    for p in prime_factors(n):
        U = permutation(list(itertools.islice(logits, math.factorial(p))), p)
        M = [[u * m for u in u_row for m in m_row] for u_row in U for m_row in M] if M else U
    return M


def tbp(pick, n, one):
    """Transportation chart, entry by entry (TBP, 2605.21724): with r and c what is left of row i and column j,

        lo = max(0, r_i - sum_{l>j} c_l)    hi = min(r_i, c_j)    M_ij = a point of [lo, hi]

    The source's third bound, c_j - sum_{k>i} r_k, is never above 0 here: the rows below are still whole.
    `pick(lo, hi, cells)` chooses the point; see `_chart`.
    """
    c, rows = [one] * n, []
    for i in range(n - 1):
        right = list(itertools.accumulate(reversed(c[1:])))[::-1]        # right[j] = sum_{l>j} c_l
        r, row = one, []
        for j in range(n - 1):
            m = pick((r - right[j]).relu(), torch.minimum(r, c[j]), [(i, j)])
            r, c[j] = r - m, c[j] - m
            row.append(m)
        c[-1] = (c[-1] - r).relu()
        rows.append(row + [r])
    return rows + [c]


def rtbp(pick, n, one):
    """Transportation chart, recursive (RTBP, 2605.21724): the mass of a block, how it spreads over margins, its parts."""
    return _transport(pick, range(n), range(n), [one] * n, [one] * n)


def _transport(pick, rows, cols, r, c):
    """The cells rows x cols of M as a transportation problem with row margins r and column margins c."""
    n = len(rows)
    if n == 1:
        return [[r[0]]]
    if n == 2:
        m = pick((r[0] - c[1]).relu(), torch.minimum(r[0], c[0]), _cells(rows[:1], cols[:1]))
        return [[m, r[0] - m], [c[0] - m, (r[1] - (c[0] - m)).relu()]]
    if n % 2:                                       # the corner, the rest of its column and of its row; n - 1 is even
        m, right, below = _border(pick, rows, cols, r, c)
        inner = _transport(pick, rows[:-1], cols[:-1], _left(r[:-1], right), _left(c[:-1], below))
        return [row + [last] for row, last in zip(inner, right)] + [below + [m]]
    h = n // 2
    R, C1, C2 = sum(r[:h]), sum(c[:h]), sum(c[h:])
    m11 = pick((R - C2).relu(), torch.minimum(R, C1), _cells(rows[:h], cols[:h]))
    a = _spread(pick, m11, r[:h], [_cells([i], cols[:h]) for i in rows[:h]])
    g = _spread(pick, C1 - m11, r[h:], [_cells([i], cols[:h]) for i in rows[h:]])
    u = _spread(pick, m11, c[:h], [_cells(rows[:h], [j]) for j in cols[:h]])
    s = _spread(pick, R - m11, c[h:], [_cells(rows[:h], [j]) for j in cols[h:]])
    upper = (_transport(pick, rows[:h], cols[:h], a, u), _transport(pick, rows[:h], cols[h:], _left(r[:h], a), s))
    lower = (_transport(pick, rows[h:], cols[:h], g, _left(c[:h], u)),
             _transport(pick, rows[h:], cols[h:], _left(r[h:], g), _left(c[h:], s)))
    return [left + right for half in (upper, lower) for left, right in zip(*half)]


def _border(pick, rows, cols, r, c):
    """The last cell, and what the last column has above it and the last row before it."""
    m = pick((r[-1] - sum(c[:-1])).relu(), torch.minimum(r[-1], c[-1]), _cells(rows[-1:], cols[-1:]))
    right = _spread(pick, c[-1] - m, r[:-1], [_cells([i], cols[-1:]) for i in rows[:-1]])
    below = _spread(pick, r[-1] - m, c[:-1], [_cells(rows[-1:], [j]) for j in cols[:-1]])
    return m, right, below


def _spread(pick, mass, capacity, parts):
    """Shares of `mass` within the capacities, by a binary tree of choices; parts[k]: the cells that share k covers."""
    if len(capacity) == 1:
        return [torch.minimum(mass, capacity[0])]
    h = len(capacity) // 2
    left, right = sum(capacity[:h]), sum(capacity[h:])
    m = pick((mass - right).relu(), torch.minimum(mass, left), sum(parts[:h], []))
    return _spread(pick, m, capacity[:h], parts[:h]) + _spread(pick, mass - m, capacity[h:], parts[h:])


def _cells(rows, cols):
    return list(itertools.product(rows, cols))


def _left(margins, taken):
    return [(m - t).relu() for m, t in zip(margins, taken)]


def _divided(planes):
    total = sum(planes).clamp(min=1e-30)
    return [p / total for p in planes]


def prime_factors(n):
    """The prime factors of n in rising order: 12 -> [2, 2, 3]."""
    p = next((p for p in range(2, math.isqrt(n) + 1) if n % p == 0), n)
    return [p] + (prime_factors(n // p) if n > p else [])


# ---------------------------------------------------------------------------------------------------------------------
# Charts: one walk over the cells serves both directions


def _chart(walk, in_parallel):
    """(rows, inverse) of a transportation chart; the walk asks `pick(lo, hi, cells)` for the mass of some cells.

    Forward, the mass is the point of [lo, hi] that the next logit says. Backward, the mass is known, and the logit is
    what says it: on the interior it exists and is unique. Every choice leaves a feasible problem, so nothing is ever
    projected or renormalised. Beyond 8 streams, where a straight line takes too long to compile, `in_parallel` walks the
    same cells, many at a time.
    """
    def rows(logits, n, *, interval_map="plain"):
        if n > 8:
            return in_parallel(torch.stack(logits), n, interval_map)
        return walk(_picker(logits, interval_map), n, torch.ones_like(logits[0]))

    def inverse(M, n, *, interval_map="plain"):
        logits = []

        def pick(lo, hi, cells):
            mass = sum(M[..., i, j] for i, j in cells)
            share = (mass - lo) / (hi - lo)
            logits.append(share.logit() * (1 if interval_map == "plain" else (hi - lo + 1e-3) / 4))
            return mass
        walk(pick, n, torch.ones_like(M[..., 0, 0]))
        return torch.stack(logits, -1)
    return rows, inverse


def _picker(logits, interval_map):
    t = iter(logits)
    return lambda lo, hi, cells: _point(lo, hi, next(t), interval_map)


def _tbp_by_diagonals(logits, n, interval_map):
    """`tbp` an antidiagonal at a time: its cells (i, d - i) need only what the diagonals before left over.

    Of the active rows i, downwards: r, what is left of row i; c, of column d - i; right, of the columns right of that, which
    falls from n - 1 to where 1e-7 counts: what its rounding loses is kept in `lost`.
    """
    one, diagonals, last_column, last_row = torch.ones_like(logits[:1]), [], [], []
    r, c, right, lost = one, one, one * (n - 1), 0 * one
    for d in range(2 * n - 3):
        top, bottom = max(0, d - n + 2), min(d, n - 2)
        t = logits[d + top * (n - 2): d + bottom * (n - 2) + 1: n - 2]              # (bottom - top + 1, ...)
        m = _point((r - right - lost).relu(), torch.minimum(r, c), t, interval_map)
        r, c = r - m, c - m
        before, right = right, right - r
        lost = lost + (before - right - r).detach()
        diagonals.append(dict(zip(range(top, bottom + 1), m.unbind(0))))
        if d < n - 2:                                       # row and column d + 1 join
            r, c = torch.cat([r, one]), torch.cat([one, c])
            right, lost = torch.cat([one * (n - 2 - d), right]), torch.cat([0 * one, lost])
        else:                                               # the first row is done, and the last column
            last_column.append(r[0])
            last_row.append(c[-1])
            r, c, right, lost = r[1:], c[:-1], right[:-1], lost[:-1]
    corner = one[0]
    for rest in last_column:
        corner = (corner - rest).relu()
    rows = [[diagonals[i + j][i] for j in range(n - 1)] + [last_column[i]] for i in range(n - 1)]
    return rows + [last_row + [corner]]


def _rtbp_by_quarters(logits, n, interval_map):
    """`rtbp` with the four blocks of a problem as one of four times the size."""
    return _transport_by_quarters(logits, [torch.ones_like(logits[0])] * n, [torch.ones_like(logits[0])] * n, interval_map)


def _transport_by_quarters(logits, r, c, interval_map):
    n = len(r)
    if n <= 4:
        return _transport(_picker(logits, interval_map), range(n), range(n), r, c)
    if n % 2:
        m, right, below = _border(_picker(logits, interval_map), range(n), range(n), r, c)
        inner = _transport_by_quarters(logits[2 * n - 3:], _left(r[:-1], right), _left(c[:-1], below), interval_map)
        return [row + [last] for row, last in zip(inner, right)] + [below + [m]]
    h = n // 2
    R, C1, C2 = sum(r[:h]), sum(c[:h]), sum(c[h:])
    m11 = _point((R - C2).relu(), torch.minimum(R, C1), logits[0], interval_map)
    mass = torch.stack([m11, C1 - m11, m11, R - m11])
    capacity = [torch.stack(planes) for planes in zip(r[:h], r[h:], c[:h], c[h:])]
    spread, blocks = logits[1:4 * h - 3].unflatten(0, (4, h - 1)), logits[4 * h - 3:].unflatten(0, (4, (h - 1) ** 2))
    shares = _spread(_picker(spread.unbind(1), interval_map), mass, capacity, [[]] * h)     # forward, nobody asks which cells
    a, g, u, s = zip(*(share.unbind(0) for share in shares))
    rows = [torch.stack(planes) for planes in zip(a, _left(r[:h], a), g, _left(r[h:], g))]
    cols = [torch.stack(planes) for planes in zip(u, s, _left(c[:h], u), _left(c[h:], s))]
    quarters = _transport_by_quarters(blocks.transpose(0, 1), rows, cols, interval_map)
    whole = [[plane.unbind(0) for plane in row] for row in quarters]
    return [[planes[2 * half + side] for side in (0, 1) for planes in row] for half in (0, 1) for row in whole]


def _point(lo, hi, t, interval_map):
    """The point of [lo, hi] at logit t; `scaled` keeps the slope at the middle however narrow the interval."""
    width = hi - lo
    if interval_map == "scaled":
        t = 4 * t / (width + 1e-3)
    return torch.minimum(lo + width * t.sigmoid(), hi)      # rounding must not leave a negative remainder


# ---------------------------------------------------------------------------------------------------------------------
# Inverses: float64 matrices (..., n, n) -> logits (..., K), not finite where no logits give the matrix


def _entries(M, n):
    return M.flatten(-2)


def _log_entries(M, n, *, sinkhorn_rounds=20):
    return _entries(M.log(), n)


def _permutation_logits(M, n):
    """Birkhoff's theorem, greedily: the uniform matrix as far as it goes, then the permutation that carries most."""
    columns, logits = torch.tensor(list(itertools.permutations(range(n)))), []            # (n!, n)
    for matrix in M.reshape(-1, n, n):
        uniform = n * matrix.min()
        weights = M.new_full((len(columns),), uniform / len(columns))
        rest = matrix - uniform / n
        while (carried := rest[torch.arange(n), columns].amin(-1)).max() > 1e-15:           # (n!,)
            k = carried.argmax()
            weights[k] += carried[k]
            rest[torch.arange(n), columns[k]] -= carried[k]
        logits.append(weights.log())
    return torch.stack(logits).reshape(*M.shape[:-2], -1)


def _kronecker_logits(M, n):
    """Each factor is what is left of M when the others are summed out."""
    rest, size, logits = M, n, []
    product = torch.ones_like(M[..., :1, :1])
    for p in prime_factors(n):
        size //= p
        blocks = rest.unflatten(-1, (size, p)).unflatten(-3, (size, p))                     # (..., size, p, size, p)
        U, rest = blocks.sum((-4, -2)) / size, blocks.sum((-3, -1)) / p
        logits.append(_permutation_logits(U, p))
        product = (U[..., :, None, :, None] * product[..., None, :, None, :]).flatten(-4, -3).flatten(-2, -1)
    if (error := (product - M).abs().max()) > 1e-5:
        raise ValueError(f"the matrix is no Kronecker product of {prime_factors(n)} (off by {error:.3g}): kronecker "
                         "reaches only part of the polytope; tbp and rtbp reach all of it")
    return torch.cat(logits, -1)


# ---------------------------------------------------------------------------------------------------------------------
# The registry


def _blend(n, eps):
    """(1 - eps) I + (eps / n) 11^T: where every mixer starts, so that a comparison of mixers compares mixers."""
    return (1 - eps) * torch.eye(n, dtype=torch.float64) + eps / n


def _permutation_blend(n, eps):
    """All permutations share eps, the identity, which is the first, has the rest."""
    weights = torch.full((math.factorial(n),), eps / math.factorial(n), dtype=torch.float64)
    weights[0] += 1 - eps
    return weights.log()


def _kronecker_blend(n, eps):
    """The blend is no Kronecker product: the product of such blends with the same diagonal, which is."""
    lo, hi = 0.0, 1.0
    for _ in range(60):
        mid = (lo + hi) / 2
        diagonal = math.prod(1 - mid + mid / p for p in prime_factors(n))
        lo, hi = (mid, hi) if diagonal > 1 - eps + eps / n else (lo, mid)
    return torch.cat([_permutation_blend(p, lo) for p in prime_factors(n)])


@dataclass(frozen=True)
class Mixer:
    """One way to mix n streams.

    n_logits(n) -> K, or ValueError where the mixer is not defined
    rows(K planes of logits, n, **options) -> n rows of n planes; no rows stand for M = I
    inverse(M (..., n, n) in float64, n, **options) -> logits (..., K), not finite where there are none; None: not known
    start(n, eps) -> logits (K,) that training starts from; None: the inverse's of (1 - eps) I + (eps / n) 11^T
    exact: doubly stochastic to rounding at any logits
    bounded: the map bounds M by itself; otherwise HyperConnection bounds what a token adds to it by tanh
    """
    n_logits: Callable
    rows: Callable
    inverse: Callable | None = None
    start: Callable | None = None
    exact: bool = True
    bounded: bool = True

    def __post_init__(self):
        if not (self.inverse or self.start):
            raise ValueError("a Mixer needs an inverse or a start: without them nobody knows the logits that training starts from")


def _n_permutations(n):
    if math.factorial(n) > 5040:
        raise ValueError(f"a mixture of permutations of {n} streams needs {n}! logits; the most is 7! = 5040. tbp and rtbp "
                         "reach every doubly stochastic matrix with (n-1)^2")
    return math.factorial(n)


def _no_logits(M, n):
    if (error := (M - torch.eye(n).to(M)).abs().amax((-2, -1), keepdim=True)).gt(1e-5).any():
        raise ValueError(f"the matrix is off by {error.max():.3g} from I, the only one without logits")
    return M.new_zeros(*M.shape[:-2], 0)


MIXERS = {
    "residual": Mixer(lambda n: 0, identity, _no_logits, lambda n, eps: torch.zeros(0)),
    "identity": Mixer(lambda n: 0, identity, _no_logits, lambda n, eps: torch.zeros(0)),
    "hc": Mixer(lambda n: n * n, unconstrained, _entries, lambda n, eps: torch.eye(n).flatten(), exact=False, bounded=False),
    "sinkhorn": Mixer(lambda n: n * n, sinkhorn, _log_entries, exact=False),
    "permutation": Mixer(_n_permutations, permutation, _permutation_logits, _permutation_blend),
    "kronecker": Mixer(lambda n: sum(map(_n_permutations, prime_factors(n))), kronecker, _kronecker_logits, _kronecker_blend),
    "tbp": Mixer(lambda n: (n - 1) ** 2, *_chart(tbp, _tbp_by_diagonals)),
    "rtbp": Mixer(lambda n: (n - 1) ** 2, *_chart(rtbp, _rtbp_by_quarters)),
}


def mixer_options(name):
    """The names of the options that mixer `name` takes, with their defaults. ValueError for an unknown name."""
    if name not in MIXERS:
        raise ValueError(f"unknown mixer {name!r}; there are {', '.join(MIXERS)}")
    parameters = inspect.signature(MIXERS[name].rows).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


def n_logits(name, n_streams):
    """K, how many logits mixer `name` takes for n streams. ValueError for an n where it is not defined."""
    mixer_options(name)
    if name == "residual" and n_streams != 1:
        raise ValueError(f"residual is the plain one-stream GPT: n_streams must be 1, not {n_streams}")
    if name != "residual" and n_streams < 2:
        raise ValueError(f"{name} mixes streams: n_streams must be at least 2, not {n_streams}; one stream is 'residual'")
    return MIXERS[name].n_logits(n_streams)


def _check_options(name, options):
    """ValueError unless mixer `name` takes these options with these values."""
    known = mixer_options(name)
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{name} takes no option {key!r}; it takes {', '.join(known) or 'none'}")
        if key == "interval_map" and value not in ("plain", "scaled"):
            raise ValueError(f"interval_map must be 'plain' or 'scaled', not {value!r}")
        if key == "sinkhorn_rounds" and value < 1:
            raise ValueError(f"sinkhorn_rounds must be at least 1, not {value}")


def mixing_matrix(name, logits, n_streams, **options):
    """The mixing matrix of mixer `name`: logits (..., K) -> (..., n, n), computed in float32 (float64 stays float64).

    Options: interval_map='plain' or 'scaled' (tbp, rtbp), sinkhorn_rounds=20 (sinkhorn). ValueError for an unknown
    name or option, an n where the mixer is not defined, or a wrong number of logits.
    """
    K = n_logits(name, n_streams)
    _check_options(name, options)
    if logits.ndim < 1 or logits.shape[-1] != K:
        raise ValueError(f"{name} with {n_streams} streams takes {K} logits in the last dimension, not "
                         f"{logits.shape[-1] if logits.ndim else 'a scalar'} (shape {tuple(logits.shape)})")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not K:
        return torch.eye(n_streams, dtype=logits.dtype, device=logits.device).expand(*logits.shape[:-1], -1, -1)
    return torch.stack([torch.stack(row, -1) for row in MIXERS[name].rows(logits.unbind(-1), n_streams, **options)], -2)


def mixing_logits(name, matrix, **options):
    """Logits (..., K) at which mixer `name` gives `matrix` (..., n, n); the inverse of `mixing_matrix`, in float64.

    ValueError for a matrix that is not doubly stochastic, lies on the border of the polytope, or that the mixer
    cannot reach, and for a mixer without an inverse. The result has the matrix's dtype.
    """
    n = matrix.shape[-1] if matrix.ndim else 0
    if matrix.ndim < 2 or matrix.shape[-2] != n:
        raise ValueError(f"matrices (..., n, n) are wanted, not a tensor of shape {tuple(matrix.shape)}")
    K = n_logits(name, n)
    _check_options(name, options)
    if not MIXERS[name].inverse:
        raise ValueError(f"{name} has no inverse in MIXERS, so its logits for a given matrix are not known")
    M = matrix.detach().double()
    if MIXERS[name].bounded and M.numel() and not (error := ds_error(M).max()) <= DS_TOLERANCE:      # nor a NaN
        raise ValueError(f"the matrix is not doubly stochastic: its worst entry, row or column sum is off by {error:.3g}")
    if not M.numel():
        return matrix.new_zeros(*matrix.shape[:-2], K)
    logits = MIXERS[name].inverse(M, n, **options)
    if not logits.isfinite().all():
        raise ValueError(f"the matrix lies on the border of the polytope (smallest entry {M.min():.3g}), which {name} reaches "
                         f"only with infinite logits; move it inside: 0.999 * M + 0.001 / {n}")
    return logits.to(matrix.dtype)


DS_TOLERANCE = 1e-4     # what mixing_logits takes for doubly stochastic: float32 rounding, not 20 Sinkhorn rounds


def ds_error(M):
    """How far (..., n, n) is from doubly stochastic: max of |row sum - 1|, |column sum - 1| and -min entry. (...)"""
    sums = torch.maximum((M.sum(-1) - 1).abs().amax(-1), (M.sum(-2) - 1).abs().amax(-1))
    return torch.maximum(sums, -M.amin((-2, -1)))


def composite_gain(matrices):
    """The largest absolute row or column sum of any product M_L ... M_l of (n, n) matrices, l <= L: how much a signal
    can grow on its way forward or backward (the Amax gain of 2512.24880). 1 if they are all doubly stochastic, or none."""
    largest, products = torch.ones((), dtype=torch.float64), None
    for M in matrices:
        products = M[None].double() if products is None else torch.cat([M.double() @ products, M[None].double()])
        sums = torch.cat([products.abs().sum(-1), products.abs().sum(-2)])
        largest = torch.maximum(largest.to(sums.device), sums.max())           # a NaN stays one
    return largest.item()


# ---------------------------------------------------------------------------------------------------------------------
# What touches the streams. Plain torch both ways, so a compiler generates every kernel; Functions, because a derivative
# taken by autograd keeps float32 copies of the streams and moves them through memory almost twice as often.

# Three settings, for the whole process. A sum over the streams that is left a loop can be fused with the kernel that wrote
# them, be n large or small; below this number Inductor would read them stream by stream, in a kernel of its own. Where that
# is wanted we write it so.
torch._inductor.config.unroll_reductions_threshold = 1
# A mixer is hundreds of small operations on planes, and one kernel; the sums over the channels for all of its gradients are
# one loop.
torch._inductor.config.max_fusion_size = torch._inductor.config.cpp.max_horizontal_fusion_size = 1024


class _Project(torch.autograd.Function):
    """x (B, T, n, C), its mean square (B, T), phi (K, n*C) -> y = phi @ x (K, B, T) and r = 1 / rms(x) (B, T) in float32.

    phi @ RMSNorm(x) is y * r: divided after the product, and with the mean square from whoever wrote x, x is read once.
    The gradient of the mean square is part of this function's, and not of the square's.
    """

    @staticmethod
    def forward(ctx, x, square, phi):
        y = _matmul(phi.to(x.dtype), x.flatten(0, 1).flatten(1).t()).unflatten(1, x.shape[:2])
        r = torch.rsqrt(square + 1e-6)
        ctx.save_for_backward(x, phi, r)
        return y, r

    @staticmethod
    def backward(ctx, gy, gr):
        x, phi, r = ctx.saved_tensors
        flat, gy = x.flatten(0, 1).flatten(1), gy.to(x.dtype).flatten(1)                    # (B*T, n*C), (K, B*T)
        shrink = (gr * r * r * r / flat.shape[1]).to(x.dtype)[..., None, None]
        with torch.autocast(x.device.type, enabled=False):
            gx = gy.t() @ phi.to(x.dtype)
        return gx.view_as(x) - x * shrink, None, _matmul(gy, flat)


class _Logits(torch.autograd.Function):
    """y (K, B, T), r (B, T), alpha (3,), bias (K,) -> the K planes (B, T) of bias + alpha * f(y * r): alpha of read, write or
    mix, f the identity or tanh. One sum over the tokens gives the gradients of alpha and bias."""

    @staticmethod
    def forward(ctx, y, r, alpha, bias, parts, bounded):
        ctx.parts, ctx.bounded = parts, bounded
        ctx.save_for_backward(y, r, alpha)
        z = [y_k * r for y_k in y.unbind(0)]
        gain = [a for a, part in zip(alpha.unbind(0), parts) for _ in range(part)]
        return tuple(b + g * (z_k if bounded else z_k.tanh()) for z_k, g, b in zip(z, gain, bias.unbind(0)))

    @staticmethod
    def backward(ctx, *planes):
        y, r, alpha = ctx.saved_tensors
        read, write, _ = ctx.parts
        k = torch.arange(len(y), device=y.device)
        gate_of = ((k >= read).int() + (k >= read + write) == torch.arange(3, device=y.device)[:, None]).to(alpha.dtype)   # one-hot
        g, f = torch.stack(planes), y * r if ctx.bounded else (y * r).tanh()                # (K, B, T)
        ggain, gbias = torch.stack([g * f, g]).sum((-2, -1))
        gz = g * sum((alpha[:, None] * gate_of).unbind(0))[:, None, None]
        gz = gz if ctx.bounded else gz * (1 - f * f)
        return gz * r, (gz * y).sum(0), (ggain * gate_of).sum(1), gbias, None, None


# In these two the coefficients come twice: stacked, as numbers, and plane by plane, for their gradients to go back to.
# A stack that gradients go through would be cut into planes again by a kernel of its own. (`*args`, since Dynamo without
# gradients drops the ctx of a forward that happens to have as many parameters as there are arguments.)


class _Read(torch.autograd.Function):
    """x (B, T, n, C), a (B, T, n), M (B, T, n, n) or None for I, the planes of both -> what the branch reads, sum_j a_j x_j
    (B, T, C) in x's dtype, and, but for I, what its result is added to, sum_j M_ij x_j (B, T, n, C) in float32.

    One function for the two, so that the backward, in which both gradients are there, passes over x once for those of a and M.
    """

    @staticmethod
    def forward(ctx, *args):
        x, a, M = args[:3]
        ctx.save_for_backward(x, a, M)
        # One product over all streams, not n: the compiler then keeps u for the backward and does not read x again.
        u = sum((a[..., None] * x).unbind(-2)).to(x.dtype)
        return u if M is None else (u, sum(M[..., :, j, None] * x[..., None, j, :] for j in range(x.shape[-2])))

    @staticmethod
    def backward(ctx, gu, g=None):
        x, a, M = ctx.saved_tensors
        shape, x_j = a.shape[:-1], x.unbind(-2)
        gx = a[..., None] * gu[..., None, :]
        ga = [(_wide(gu) * x_).sum(-1) for x_ in x_j]
        if M is None:
            return gx.to(x.dtype), None, None, *_summed_to(shape, ga)
        gx = gx + sum(M[..., i, :, None] * g[..., None, i, :] for i in range(x.shape[-2]))
        gM = [(g_ * x_).sum(-1) for g_ in g.unbind(-2) for x_ in x_j]
        return gx.to(x.dtype), None, None, *_summed_to(shape, ga + gM)


class _Write(torch.autograd.Function):
    """What is added to (B, T, n, C), v (B, T, C), w (B, T, n), a dtype, the planes of w -> x'_i = mixed_i + w_i v in that
    dtype, and its mean square over streams and channels (B, T) in float32."""

    @staticmethod
    def forward(ctx, *args):
        mixed, v, w, dtype = args[:4]
        ctx.save_for_backward(v, w)
        new = mixed + w[..., None] * v[..., None, :]                                        # float32
        square = new.square().mean((-2, -1))
        ctx.mark_non_differentiable(square)
        return new.to(dtype), square

    @staticmethod
    def backward(ctx, g, _):
        v, w = ctx.saved_tensors
        gw = _summed_to(w.shape[:-1], [(_wide(g_) * v).sum(-1) for g_ in g.unbind(-2)])
        gv = (w[..., None] * g).sum(-2).to(v.dtype)                   # in the kernel that wrote g
        return g, gv, None, None, *gw


def _summed_to(shape, planes):
    """Planes (B, T) summed to `shape`, that of the coefficients: (B, T) or, static, (1, 1), by one sum for all of them."""
    return planes if planes[0].shape == shape else torch.stack(planes).sum((-2, -1), keepdim=True).unbind(0)


def _matmul(a, b):
    """a @ b, summed and returned in float32."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return _wide(a) @ _wide(b)


def _wide(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))


@torch.no_grad()
def mean_square(x):
    """x (B, T, n, C) -> (B, T) in float32, what HyperConnection wants to know of x, whose derivative it takes itself."""
    return _wide(x).square().mean((-2, -1))


# ---------------------------------------------------------------------------------------------------------------------
# The module around a branch


class HyperConnection(nn.Module):
    """n residual streams around a branch F: read u = sum_j a_j x_j, and x'_i = sum_j M_ij x_j + w_i F(u).

    a, w and M depend on the token (`dynamic`, mHC eq. 5-8 of 2512.24880) or are parameters of the layer (static). At
    the start a sums to 1, w is 1 and M's rows sum to 1: on equal streams the module is exactly x + F(x).

    layer: the index of the sublayer; stream layer % n is read most, with weight `read_start`, so that different
    layers read different streams, which is what drives equal streams apart. mix_start: the eps of the starting
    matrix (1 - eps) I + (eps / n) 11^T. options: the mixer's own. The residual mixer is x + F(x), with one stream.
    """

    def __init__(self, mixer, n_streams, n_embd, *, layer=0, dynamic=True, mix_start=0.01, read_start=0.7, **options):
        super().__init__()
        K = n_logits(mixer, n_streams)
        _check_options(mixer, options)
        for name, value in (("mix_start", mix_start), ("read_start", read_start)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {value}")
        self.mixer, self.n_streams, self.n_embd = mixer, n_streams, n_embd
        self.parts, self.options = (n_streams, n_streams, K), options
        self.dynamic = dynamic and mixer != "residual"
        self.start = layer % n_streams, mix_start, read_start
        if mixer != "residual":
            self.bias = nn.Parameter(torch.empty(sum(self.parts)))          # read, write, mix
            if self.dynamic:
                self.phi = nn.Parameter(torch.empty(sum(self.parts), n_streams * n_embd))   # (out, in), as in nn.Linear
                self.alpha = nn.Parameter(torch.empty(3))                   # gates of read, write, mix
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        if self.mixer == "residual":
            return
        favoured, mix_start, read_start = self.start
        n, spec = self.n_streams, MIXERS[self.mixer]
        read = torch.full((n,), (1 - read_start) / (n - 1), dtype=torch.float64)
        read[favoured] = read_start
        mix = spec.start(n, mix_start) if spec.start else spec.inverse(_blend(n, mix_start), n, **self.options)
        write = torch.zeros(n) if spec.bounded else torch.ones(n)           # 2 sigmoid(0) = 1
        self.bias.copy_(torch.cat([read.logit() if spec.bounded else read, write, mix]))
        if self.dynamic:
            self.phi.zero_()
            self.alpha.fill_(0.01)

    def coefficients(self, x, square):
        """x (B, T, n, C), its mean_square (B, T) -> the read's n planes (B, T), the write's n, the mix's n^2 row by row
        (none for M = I), in float32. Static: (1, 1) each, whatever x."""
        def of_tokens(y, r, alpha, bias):
            return self.maps(_Logits.apply(y, r, alpha, bias, self.parts, MIXERS[self.mixer].bounded))

        def of_layer(bias):
            return self.maps(_wide(bias)[None, None].unbind(-1))

        # What lies between these arguments and the coefficients is not kept for the backward, but computed again; from the
        # arguments alone, since by then the module may have other parameters (torch.func.functional_call).
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        if self.dynamic:
            return again(of_tokens, *_Project.apply(x, square, self.phi), self.alpha, self.bias)
        return again(of_layer, self.bias)

    def maps(self, planes):
        """Planes of logits -> planes of read, write and mix."""
        n, spec = self.n_streams, MIXERS[self.mixer]
        read, write = planes[:n], planes[n:2 * n]
        if spec.bounded:
            read, write = [a.sigmoid() for a in read], [2 * w.sigmoid() for w in write]
        mix = sum(spec.rows(planes[2 * n:], n, **self.options), [])
        return [*read], [*write], [m.view_as(m) for m in mix]       # a mixer may give one plane for two cells, Dynamo may not

    def matrices(self, x, square):
        """M for every token of x, (B, T, n, n) in float32 (static: (1, 1, n, n)), to look at."""
        n, mix = self.n_streams, [] if self.mixer == "residual" else self.coefficients(x, square)[2]
        return torch.stack(mix, -1).unflatten(-1, (n, n)) if mix else torch.eye(n, device=x.device)[None, None]

    def forward(self, x, square, branch):
        """x (B, T, n, C), its mean_square (B, T), branch: (B, T, C) -> (B, T, C); the new x in the old one's dtype, and
        its mean square, or whatever was given for it where nothing depends on it (static, residual)."""
        if self.mixer == "residual":
            return x + branch(x.squeeze(2)).unsqueeze(2), square
        n, (read, write, mix) = self.n_streams, self.coefficients(x, square)
        planes = read + write + mix
        # Nine or more are stored once; Inductor would compute eight or fewer again for each channel.
        stacked = torch.stack(planes + planes[:1] * (9 - len(planes)), -1)                  # (B, T, 2n + n^2 or more)
        a, w = stacked[..., :n], stacked[..., n:2 * n]
        M = stacked[..., 2 * n:len(planes)].unflatten(-1, (n, n)) if mix else None
        u, mixed = _Read.apply(x, a, M, *read, *mix) if mix else (_Read.apply(x, a, M, *read), x)
        x, new_square = _Write.apply(mixed, branch(u), w, x.dtype, *write)
        return x, new_square if self.dynamic else square
