"""
Mixers: K logits -> the n x n matrix M that mixes the n residual streams.

    >>> M = mixing_matrix("tbp", torch.randn(8, 9), n_streams=4)    # logits (8, 9) -> M (8, 4, 4)
    >>> mixing_logits("tbp", M)                                     # and back: (8, 9)

The contract, `class Mixer`, comes first. Then each mixer has a section of its own: the map, its
inverse, its start, and its entry in `MIXERS`. The model, the tests, the benchmark and the studies
walk that registry, so a new mixer is one section here (and its oracle in tests/oracle.py).

Inside a mixer, M is a list of n rows, and a row is a list of n *planes*. A plane is a tensor of the
shape of one logit: (B, T) in the model, one entry of M for all tokens. A mixer is a straight line
of pointwise operations on planes, which torch.compile fuses into one kernel. For more than
FEW_STREAMS this line gets too long, and a mixer may have another form: one tensor of all planes.

Sources: HC arXiv:2409.19606, mHC 2512.24880, mHC-lite 2601.05732, KromHC 2601.21579, TBP and RTBP
2605.21724, identity mixing 2607.28611.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch

import charts

FEW_STREAMS = 4  # up to this many, coefficients are lists of planes; for more they are tensors

# ---- the contract --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A knob of one mixer. Scripts take its default and its comment from here."""

    default: Any
    comment: str
    allows: Callable  # value -> bool
    must: str  # what a refused value should have been: "must be at least 1"


@dataclass(frozen=True)
class Mixer:
    """One way to mix n streams.

    n_logits(n)                -> K. ValueError for an n where the mixer is not defined.
    map(planes, n, **options)  -> n rows of n planes, from K planes. No rows at all mean M = I.
    inverse(M, n, **options)   -> logits (..., K) of M (..., n, n) in float64, not finite where no
                                  logits give M. None: the inverse is not known.
    start(n, eps)              -> logits (K,) at which training starts. None: the logits of
                                  (1 - eps) I + (eps / n) 11^T, by the inverse.
    map_stacked(logits, n, **options)  -> M (n, n, ...), from logits (K, ...), for more than
                                  FEW_STREAMS. None: `map`, which then compiles slowly.
    options                    {name: Option} of the arguments **options.

    The other fields are promises, and the tests check them:
    doubly_stochastic    M is doubly stochastic, exactly or in the limit of many rounds
    exact_sums           which sums of M are 1 to rounding, at any logits: rows, columns, or both
    nonnegative          no entry of M is ever below 0
    starts_at_blend      training starts at the matrix above. If False, the rows of the matrix at
                         the start sum to 1, and no more is promised.
    bounded              the map bounds the entries of M. If False, HyperConnection puts what a
                         token adds to M through tanh.
    one_stream           the plain residual stream: there is nothing to mix
    """

    n_logits: Callable
    map: Callable
    inverse: Callable | None = None
    start: Callable | None = None
    map_stacked: Callable | None = None
    options: dict[str, Option] = field(default_factory=dict)
    doubly_stochastic: bool = True
    exact_sums: tuple[str, ...] = ("rows", "columns")
    nonnegative: bool = True
    starts_at_blend: bool = True
    bounded: bool = True
    one_stream: bool = False

    def __post_init__(self):
        if not (self.inverse or self.start):
            raise ValueError(
                "a Mixer needs an inverse or a start: without them nobody knows the logits that "
                "training starts from"
            )

    @property
    def exact(self):
        """Whether M is doubly stochastic to rounding, at any logits."""
        return self.doubly_stochastic and self.exact_sums == ("rows", "columns")


MIXERS: dict[str, Mixer] = {}


def find_mixer(name):
    """-> the Mixer. ValueError for an unknown name."""
    if name not in MIXERS:
        raise ValueError(f"unknown mixer {name!r}; there are {', '.join(MIXERS)}")
    return MIXERS[name]


def n_logits(name, n_streams):
    """K, how many logits mixer `name` takes for n streams. ValueError where it is not defined."""
    mixer = find_mixer(name)
    if mixer.one_stream and n_streams != 1:
        raise ValueError(f"{name} has one stream: n_streams must be 1, not {n_streams}")
    if not mixer.one_stream and n_streams < 2:
        raise ValueError(
            f"{name} mixes streams: n_streams must be at least 2, not {n_streams}; one stream is "
            "'residual'"
        )
    return mixer.n_logits(n_streams)


def check_options(name, options):
    """ValueError unless mixer `name` takes these options with these values."""
    known = find_mixer(name).options
    for key, value in options.items():
        if key not in known:
            raise ValueError(
                f"{name} takes no option {key!r}; it takes {', '.join(known) or 'none'}"
            )
        if not known[key].allows(value):
            raise ValueError(f"{key} {known[key].must}, not {value!r}")


def options_of(name, knobs):
    """The options that mixer `name` takes, from `knobs` {name: value}, which has all of OPTIONS.

    ValueError where an option of another mixer is not at its default: it would have no effect.
    """
    own = find_mixer(name).options
    for key, option in OPTIONS.items():
        if key not in own and knobs[key] != option.default:
            raise ValueError(f"{name} takes no option {key!r}; leave it at {option.default!r}")
    return {key: knobs[key] for key in own}


def mixing_matrix(name, logits, n_streams, **options):
    """The mixing matrix of mixer `name`.

    logits (..., K) -> M (..., n, n), computed in float32 (float64 stays float64).
    options: those of the mixer's entry in MIXERS.
    ValueError for an unknown name or option, an n for which the mixer is not defined, or a wrong
    number of logits.
    """
    K = n_logits(name, n_streams)
    check_options(name, options)
    if logits.ndim < 1 or logits.shape[-1] != K:
        raise ValueError(
            f"{name} with {n_streams} streams takes {K} logits in the last dimension, not "
            f"{logits.shape[-1] if logits.ndim else 'a scalar'} (shape {tuple(logits.shape)})"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    M = stacked_matrix(name, logits.movedim(-1, 0), n_streams, **options)
    if M is None:
        eye = torch.eye(n_streams, dtype=logits.dtype, device=logits.device)
        return eye.expand(*logits.shape[:-1], -1, -1)
    return M.movedim((0, 1), (-2, -1))


def stacked_matrix(name, logits, n, **options):
    """`mixing_matrix` in the model's order: logits (K, ...) -> M (n, n, ...), or None for I."""
    mixer = MIXERS[name]
    if n > FEW_STREAMS and mixer.map_stacked:
        return mixer.map_stacked(logits, n, **options)
    rows = mixer.map(logits.unbind(0), n, **options)
    return torch.stack([torch.stack(row) for row in rows]) if rows else None


# How far the sums of a matrix may be from 1 in mixing_logits. An error of float32 rounding passes;
# the error that 20 rounds of Sinkhorn leave does not.
DS_TOLERANCE = 1e-4


def mixing_logits(name, matrix, **options):
    """The inverse of `mixing_matrix`: M (..., n, n) -> logits (..., K), in M's dtype.

    Computed in float64. ValueError for a matrix whose sums or signs the mixer does not allow, for
    one that it reaches only with infinite logits or not at all, and for a mixer without an inverse.
    """
    n = matrix.shape[-1] if matrix.ndim else 0
    if matrix.ndim < 2 or matrix.shape[-2] != n:
        raise ValueError(f"M must have the shape (..., n, n), not {tuple(matrix.shape)}")
    K, mixer = n_logits(name, n), find_mixer(name)
    check_options(name, options)
    if mixer.inverse is None:
        raise ValueError(f"{name} has no inverse in MIXERS, so its logits for M are not known")
    if not matrix.numel():
        return matrix.new_zeros(*matrix.shape[:-2], K)

    M = matrix.detach().double()
    refuse_other_sums(mixer, M)
    logits = mixer.inverse(M, n, **options)
    if not logits.isfinite().all():
        raise ValueError(
            f"{name} reaches this M only with infinite logits (smallest entry {M.min():.3g}); "
            f"move M away from the border: 0.999 * M + 0.001 / {n}"
        )
    return logits.to(matrix.dtype)


def refuse_other_sums(mixer, M):
    """ValueError for M (..., n, n) with sums or signs that the mixer never gives, or with a NaN."""
    if mixer.doubly_stochastic:
        error = ds_error(M).max()
        if not error <= DS_TOLERANCE:
            raise ValueError(
                "M is not doubly stochastic: its worst entry, row or column sum is off by "
                f"{error:.3g}"
            )
        return
    for axis, dim in (("rows", -1), ("columns", -2)):
        error = (M.sum(dim) - 1).abs().max()
        if axis in mixer.exact_sums and not error <= DS_TOLERANCE:
            raise ValueError(f"the {axis} of M do not sum to 1: the worst is off by {error:.3g}")
    if mixer.nonnegative and not M.min() >= 0:
        raise ValueError(f"M has an entry below 0: {M.min():.3g}")


def ds_error(M):
    """How far M (..., n, n) is from doubly stochastic, (...): the largest of |row sum - 1|,
    |column sum - 1| and -(smallest entry)."""
    row_error = (M.sum(-1) - 1).abs().amax(-1)
    column_error = (M.sum(-2) - 1).abs().amax(-1)
    return torch.maximum(torch.maximum(row_error, column_error), -M.amin((-2, -1)))


def composite_gain(matrices):
    """How much a signal can grow on its way through `matrices`, a list of (n, n) in order of depth,
    or a gradient on its way back.

    The largest absolute row or column sum of any product M_L ... M_l with l <= L (the Amax gain of
    2512.24880): row sums bound the signal, column sums bound the gradient. The empty product, I,
    counts as well, so the gain is never below 1.
    """
    largest = torch.ones((), dtype=torch.float64)
    products = None  # (number of products that end at this matrix, n, n)
    for M in matrices:
        M = M[None].double()
        products = M if products is None else torch.cat([M @ products, M])
        sums = torch.cat([products.abs().sum(-1), products.abs().sum(-2)])
        largest = torch.maximum(largest.to(sums.device), sums.max())  # a NaN stays a NaN
    return largest.item()


def blend(n, eps):
    """(1 - eps) I + (eps / n) 11^T, (n, n) in float64: the start of every mixer that reaches it,
    so that differences between runs come from the mixers and not from where they started."""
    return (1 - eps) * torch.eye(n, dtype=torch.float64) + eps / n


def start_logits(name, n, eps, **options):
    """The logits (K,) at which training starts: those of `blend`, or what the mixer says."""
    mixer = find_mixer(name)
    if mixer.start:
        return mixer.start(n, eps)
    return mixer.inverse(blend(n, eps), n, **options)


# ---- residual and identity: nothing to mix -------------------------------------------------------


def identity(planes, n):
    """M = I: the streams meet only in reads and writes (iHC, 2607.28611).

    Returns no rows: HyperConnection then skips the mix."""
    return []


def identity_inverse(M, n):
    error = (M - torch.eye(n).to(M)).abs().max()
    if error > 1e-5:
        raise ValueError(f"M is off by {error:.3g} from I, and the mixer has no other matrix")
    return M.new_zeros(*M.shape[:-2], 0)


MIXERS["residual"] = Mixer(
    n_logits=lambda n: 0, map=identity, inverse=identity_inverse, one_stream=True
)
MIXERS["identity"] = Mixer(
    n_logits=lambda n: 0,
    map=identity,
    inverse=identity_inverse,
    start=lambda n, eps: torch.zeros(0),
    starts_at_blend=False,
)


# ---- hc: no constraint ---------------------------------------------------------------------------


def hc(planes, n):
    """M = the logits, row by row (HC, 2409.19606). Products of many such matrices may explode."""
    return in_rows(planes, n)


def hc_stacked(logits, n):
    return logits.unflatten(0, (n, n))


def hc_inverse(M, n):
    return M.flatten(-2)


MIXERS["hc"] = Mixer(
    n_logits=lambda n: n * n,
    map=hc,
    map_stacked=hc_stacked,
    inverse=hc_inverse,
    start=lambda n, eps: torch.eye(n).flatten(),
    doubly_stochastic=False,
    exact_sums=(),
    nonnegative=False,
    starts_at_blend=False,
    bounded=False,
)


def in_rows(planes, n):
    """n^2 planes, row by row -> n rows of n planes."""
    return [list(planes[i * n : i * n + n]) for i in range(n)]


# ---- rows, columns, orthogonal: half of the constraint, or another one ---------------------------
# Controls for the question of what double stochasticity costs, and what it buys.


def row_softmax(planes, n):
    """Each row a softmax of its n logits: rows sum to 1, columns are free."""
    return [softmax(row) for row in in_rows(planes, n)]


def column_softmax(planes, n):
    """Each column a softmax of its n logits: columns sum to 1, rows are free."""
    return transpose(row_softmax(transpose_planes(planes, n), n))


def row_softmax_stacked(logits, n):
    return logits.unflatten(0, (n, n)).softmax(1)


def column_softmax_stacked(logits, n):
    return logits.unflatten(0, (n, n)).softmax(0)


def log_inverse(M, n):
    return M.log().flatten(-2)


def orthogonal(planes, n):
    """A product of rotations, one for each pair of streams i < j; a logit is the angle of one.

    M is orthogonal, and its entries have signs: no signal grows or shrinks, but the sums of rows
    and columns are free."""
    one, zero = torch.ones_like(planes[0]), torch.zeros_like(planes[0])
    M = [[one if i == j else zero for j in range(n)] for i in range(n)]
    for angle, (i, j) in zip(planes, itertools.combinations(range(n), 2)):
        cos, sin = angle.cos(), angle.sin()
        upper = [cos * a - sin * b for a, b in zip(M[i], M[j])]
        lower = [sin * a + cos * b for a, b in zip(M[i], M[j])]
        M[i], M[j] = upper, lower
    return M


MIXERS["rows"] = Mixer(
    n_logits=lambda n: n * n,
    map=row_softmax,
    map_stacked=row_softmax_stacked,
    inverse=log_inverse,
    doubly_stochastic=False,
    exact_sums=("rows",),
)
MIXERS["columns"] = Mixer(
    n_logits=lambda n: n * n,
    map=column_softmax,
    map_stacked=column_softmax_stacked,
    inverse=log_inverse,
    doubly_stochastic=False,
    exact_sums=("columns",),
)
MIXERS["orthogonal"] = Mixer(
    n_logits=lambda n: n * (n - 1) // 2,
    map=orthogonal,
    start=lambda n, eps: torch.zeros(n * (n - 1) // 2),
    doubly_stochastic=False,
    exact_sums=(),
    nonnegative=False,
    starts_at_blend=False,
)


def softmax(planes):
    """Softmax over a list of planes -> a list of planes."""
    highest = reduce(torch.maximum, planes)
    weights = [(plane - highest).exp() for plane in planes]
    total = sum(weights).clamp(min=1e-30)
    return [weight / total for weight in weights]


def transpose(M):
    return [list(column) for column in zip(*M)]


def transpose_planes(planes, n):
    """n^2 planes, row by row -> the same, column by column."""
    return [plane for j in range(n) for plane in planes[j::n]]


# ---- sinkhorn ------------------------------------------------------------------------------------


def sinkhorn(planes, n, *, sinkhorn_rounds=20):
    """Sinkhorn-Knopp of exp(logits) (mHC, 2512.24880, eq. 9).

    A round divides every column by its sum, then every row. Rows come last, so their sums are 1 to
    rounding: the mix sums over rows. Column sums are 1 only in the limit of many rounds.
    """
    return in_rows(_Sinkhorn.apply(n, sinkhorn_rounds, *planes), n)


def sinkhorn_stacked(logits, n, *, sinkhorn_rounds=20):
    """The first round is taken in logarithms, where no row can underflow to 0."""
    log_M = logits.unflatten(0, (n, n)).log_softmax(0)
    M = log_M.softmax(1)
    for _ in range(sinkhorn_rounds - 1):
        M = M / M.sum(0).clamp(min=1e-30)
        M = M / M.sum(1, keepdim=True).clamp(min=1e-30)
    return M


class _Sinkhorn(torch.autograd.Function):
    """Sinkhorn with a backward written by hand. With autograd's backward, a layer of the model took
    195 launches in the graph for an H100; with this one and larger kernels it takes 73 (LOG.md).

    A half round divides each line by its sum. Let M be the matrix after the half round, and g the
    gradient of log M there. Then the gradient before the half round is g - M * sum(g), line by
    line. The backward runs the rounds again and keeps only the divisors. Then it undoes one half
    round after the other: it multiplies M by the divisors.

    The divisors are stacked, so that Inductor stores them and makes two kernels, one that runs the
    rounds and one that undoes them. A single kernel would hold hundreds of planes and spill a
    GPU's registers.
    """

    @staticmethod
    def forward(ctx, n, rounds, *logits):
        ctx.n, ctx.rounds = n, rounds
        ctx.save_for_backward(*logits)
        M, _ = _sinkhorn_rounds(logits, n, rounds)
        return tuple(M)

    @staticmethod
    def backward(ctx, *grad_M):
        n = ctx.n
        M, divisors = _sinkhorn_rounds(ctx.saved_tensors, n, ctx.rounds)
        stored = torch.stack([*divisors, *grad_M]).unbind(0)
        divisors, grad_M = stored[: -n * n], stored[-n * n :]
        g = [grad * m for grad, m in zip(grad_M, M)]  # the gradient of log M
        g = _sinkhorn_undo(g, M, n)
        for first in range(len(divisors) - n, -1, -n):  # of the n divisors of a half round
            M = [m * divisors[first + k // n] for k, m in enumerate(M)]
            M = transpose_planes(M, n)
            g = _sinkhorn_undo(transpose_planes(g, n), M, n)
        return None, None, *transpose_planes(g, n)


def _sinkhorn_rounds(logits, n, rounds):
    """-> M after all rounds, as n^2 planes row by row, and the divisors, n for each half round
    except the first. A line is a column in the first half round, a row in the second, and so on.

    The first round is taken in logarithms, where no row can underflow to 0.
    """
    highest = [reduce(torch.maximum, logits[j::n]) for j in range(n)]
    log_sums = []
    for j in range(n):
        column = logits[j::n]
        log_sums.append(highest[j] + sum((x - highest[j]).exp() for x in column).log())
    log_M = [x - log_sums[k % n] for k, x in enumerate(logits)]

    highest = [reduce(torch.maximum, row) for row in in_rows(log_M, n)]
    M = [(x - highest[k // n]).exp() for k, x in enumerate(log_M)]
    M, sums = _sinkhorn_divide(M, n)
    divisors = [total * peak.exp() for total, peak in zip(sums, highest)]

    for _ in range(2 * (rounds - 1)):
        M, sums = _sinkhorn_divide(transpose_planes(M, n), n)
        divisors += sums
    return M, divisors


def _sinkhorn_divide(M, n):
    """Divide every line of n planes by its sum -> the new planes, the n sums."""
    sums = [sum(line).clamp(min=1e-30) for line in in_rows(M, n)]
    return [m / sums[k // n] for k, m in enumerate(M)], sums


def _sinkhorn_undo(g, M, n):
    """The gradient of log M after a half round -> the one before it."""
    sums = [sum(line) for line in in_rows(g, n)]
    return [grad - m * sums[k // n] for k, (grad, m) in enumerate(zip(g, M))]


MIXERS["sinkhorn"] = Mixer(
    n_logits=lambda n: n * n,
    map=sinkhorn,
    map_stacked=sinkhorn_stacked,
    inverse=lambda M, n, sinkhorn_rounds=20: log_inverse(M, n),
    options={
        "sinkhorn_rounds": Option(
            default=20,
            comment="sinkhorn: how often columns, then rows, are divided by their sums",
            allows=lambda rounds: rounds >= 1,
            must="must be at least 1",
        )
    },
    exact_sums=("rows",),
)


# ---- permutation ---------------------------------------------------------------------------------


def permutation(planes, n):
    """sum_k softmax(logits)_k P_k over all n! permutations P_k in lexicographic order (mHC-lite,
    2601.05732)."""
    weights = softmax(planes)
    shares = [[[] for _ in range(n)] for _ in range(n)]  # the weights that add up to each entry
    for weight, permuted in zip(weights, itertools.permutations(range(n))):
        for i, j in enumerate(permuted):
            shares[i][j].append(weight)
    return [[sum(entry).clamp(max=1) for entry in row] for row in shares]


def permutation_inverse(M, n):
    """Birkhoff's theorem, greedily: first as much of the uniform matrix as M holds, then, until
    nothing is left, the permutation of which the rest of M holds most."""
    permutations = torch.tensor(list(itertools.permutations(range(n))))  # (n!, n)
    line = torch.arange(n)
    logits = []
    for matrix in M.reshape(-1, n, n):
        uniform = n * matrix.min()
        weights = M.new_full((len(permutations),), uniform / len(permutations))
        rest = matrix - uniform / n
        while True:
            held = rest[line, permutations].amin(-1)  # (n!,) how much of each is left
            if not held.max() > 1e-15:
                break
            k = held.argmax()
            weights[k] += held[k]
            rest[line, permutations[k]] -= held[k]
        logits.append(weights.log())
    return torch.stack(logits).reshape(*M.shape[:-2], -1)


def permutation_start(n, eps):
    """The identity, which is the first permutation, gets 1 - eps; all permutations share eps."""
    weights = torch.full((math.factorial(n),), eps / math.factorial(n), dtype=torch.float64)
    weights[0] += 1 - eps
    return weights.log()


def n_permutations(n):
    if math.factorial(n) > 5040:
        raise ValueError(
            f"a mixture of permutations of {n} streams needs {n}! logits; the most is 7! = 5040. "
            "tbp and rtbp reach every doubly stochastic matrix with (n-1)^2"
        )
    return math.factorial(n)


def permutation_stacked(logits, n):
    # torch.softmax over 5040 strided logits is off by 4e-6 on a CPU; exp and sum are not.
    weights = (logits - logits.amax(0)).exp()
    return marginals(weights / weights.sum(0), n).clamp(max=1)


def marginals(weights, n):
    """sum_k weights_k P_k: (n!, ...) -> (n, n, ...).

    In lexicographic order, the first (n-1)! permutations have the 1 of row 0 in column 0, the next
    (n-1)! have it in column 1, and so on. Without row 0 and that column, each of these groups is a
    smaller sum of the same kind.
    """
    if n == 1:
        return weights[None]
    weights = weights.unflatten(0, (n, -1))  # (n, (n-1)!, ...)
    # smaller[:, :, k] is the sum whose permutations have the 1 of row 0 in column k.
    smaller = marginals(weights.transpose(0, 1), n - 1)  # (n-1, n-1, n, ...)
    below = []  # column j of the rows below row 0
    for j in range(n):
        before = smaller[:, j - 1, :j].sum(1)  # k < j: column j is column j - 1 there
        after = smaller[:, min(j, n - 2), j + 1 :].sum(1)  # k > j: column j is column j
        below.append(before + after)  # for j = 0 `before` is an empty sum, for n - 1 `after` is
    return torch.cat([weights.sum(1)[None], torch.stack(below, 1)])


MIXERS["permutation"] = Mixer(
    n_logits=n_permutations,
    map=permutation,
    map_stacked=permutation_stacked,
    inverse=permutation_inverse,
    start=permutation_start,
)


# ---- kronecker -----------------------------------------------------------------------------------


def kronecker(planes, n):
    """U_K (x) ... (x) U_1 over the prime factors of n in rising order, each U a mixture of
    permutations (KromHC, 2601.21579). The last factor is the outermost, as in numpy.kron(U, M)."""
    M = None
    for p in prime_factors(n):
        own, planes = planes[: math.factorial(p)], planes[math.factorial(p) :]
        U = permutation(own, p)
        if M is None:
            M = U
        else:
            M = [[u * m for u in u_row for m in m_row] for u_row in U for m_row in M]
    return M


def kronecker_stacked(logits, n):
    M = torch.ones_like(logits[:1])[None]  # (1, 1, ...)
    for p in prime_factors(n):
        own, logits = logits[: math.factorial(p)], logits[math.factorial(p) :]
        U = permutation_stacked(own, p)
        M = (U[:, None, :, None] * M[None, :, None]).flatten(2, 3).flatten(0, 1)
    return M


def kronecker_inverse(M, n):
    """The sum of M over the indices of all other factors is a multiple of one factor, since the
    other factors are doubly stochastic."""
    rest, size, logits = M, n, []
    product = torch.ones_like(M[..., :1, :1])
    for p in prime_factors(n):
        size //= p
        blocks = rest.unflatten(-1, (size, p)).unflatten(-3, (size, p))  # (..., size, p, size, p)
        U, rest = blocks.sum((-4, -2)) / size, blocks.sum((-3, -1)) / p
        logits.append(permutation_inverse(U, p))
        product = U[..., :, None, :, None] * product[..., None, :, None, :]
        product = product.flatten(-4, -3).flatten(-2, -1)
    error = (product - M).abs().max()
    if error > 1e-5:
        raise ValueError(
            f"M is no Kronecker product of {prime_factors(n)} (off by {error:.3g}): kronecker "
            "does not reach every doubly stochastic matrix; tbp and rtbp do"
        )
    return torch.cat(logits, -1)


def kronecker_start(n, eps):
    """The blend is no Kronecker product. The start is the product of smaller blends, one for each
    prime. Their common eps, found by bisection, gives the product the diagonal of the blend."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        diagonal = math.prod(1 - middle + middle / p for p in prime_factors(n))
        if diagonal > 1 - eps + eps / n:
            low = middle
        else:
            high = middle
    return torch.cat([permutation_start(p, low) for p in prime_factors(n)])


def prime_factors(n):
    """In rising order: 12 -> [2, 2, 3]."""
    p = next((p for p in range(2, math.isqrt(n) + 1) if n % p == 0), n)
    return [p] + (prime_factors(n // p) if n > p else [])


MIXERS["kronecker"] = Mixer(
    n_logits=lambda n: sum(n_permutations(p) for p in prime_factors(n)),
    map=kronecker,
    map_stacked=kronecker_stacked,
    inverse=kronecker_inverse,
    start=kronecker_start,
    starts_at_blend=False,
)


# ---- tbp and rtbp --------------------------------------------------------------------------------

MIXERS["tbp"] = Mixer(
    n_logits=lambda n: (n - 1) ** 2,
    map=charts.tbp,
    map_stacked=charts.tbp_stacked,
    inverse=lambda M, n: charts.inverse(charts.tbp_chart, M, n),
)

MIXERS["rtbp"] = Mixer(
    n_logits=lambda n: (n - 1) ** 2,
    map=charts.rtbp,
    map_stacked=charts.rtbp_stacked,
    inverse=lambda M, n: charts.inverse(charts.rtbp_chart, M, n),
)


# Every option of every mixer, for the scripts' knobs.
OPTIONS: dict[str, Option] = {}
for _mixer in MIXERS.values():
    OPTIONS |= _mixer.options
