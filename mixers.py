"""
Mixers: K logits -> the n x n matrix M that mixes the n residual streams.

    >>> M = mixing_matrix("tbp", torch.randn(8, 9), n_streams=4)    # logits (8, 9) -> M (8, 4, 4)
    >>> mixing_logits("tbp", M)                                     # and back: (8, 9)

The contract, `class Mixer`, comes first. Then come the mixers, each with its map, its inverse, its
start, and its entry in `MIXERS`. The model, the tests, the benchmark and the studies walk that
registry, so a new mixer is one section here (and its oracle in tests/oracle.py). Three families of
maps are long, and have files of their own: sinkhorn.py, permutations.py and charts.py.

Inside a mixer, M is a list of n rows, and a row is a list of n *planes* (planes.py). A plane is a
tensor of the shape of one logit: (B, T) in the model, one entry of M for all tokens. A mixer is a
straight line of pointwise operations on planes, which torch.compile fuses into one kernel. For more
than FEW_STREAMS (4) there are too many of them to compile. There a mixer may have another form,
`map_stacked`, on one tensor that stacks the planes.

Sources: HC arXiv:2409.19606, mHC 2512.24880, mHC-lite 2601.05732, KromHC 2601.21579, TBP and RTBP
2605.21724, identity mixing 2607.28611.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import charts
import permutations
import sinkhorn
import stacked_charts
from planes import FEW_STREAMS, in_rows, softmax, transpose, transpose_planes

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
    inverse(M, n, **options)   -> logits (..., K) of M (..., n, n) in float64. Where no logits give
                                  M they are not finite, or it raises ValueError. None: not known.
    start(n, eps)              -> logits (K,) at which training starts. None: the logits of
                                  (1 - eps) I + (eps / n) 11^T, by the inverse.
    map_stacked(logits, n, **options)  -> M (n, n, ...), from logits (K, ...), for more than
                                  FEW_STREAMS. None: `map`, which then compiles slowly.
    options                    {name: Option} of the arguments **options.

    Promises, which the tests check:
    doubly_stochastic    M is doubly stochastic, exactly or in the limit of many rounds
    exact_sums           which sums of M are 1 to rounding, at any logits: rows, columns, or both
    nonnegative          no entry of M is ever below 0
    starts_at_blend      training starts at `blend`. If False, the rows of the matrix at the start
                         sum to 1, and no more is promised.

    Switches, which the model acts on:
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


# How far the sums of a matrix may be from 1 in mixing_logits. An error of float32 rounding passes.
# A matrix of Sinkhorn passes where its rounds have converged: with large logits 20 are too few.
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
        M = M.cpu().double()[None]  # mps has no float64
        products = M if products is None else torch.cat([M @ products, M])
        sums = torch.cat([products.abs().sum(-1), products.abs().sum(-2)])
        largest = torch.maximum(largest, sums.max())  # a NaN stays a NaN
    return largest.item()


def blend(n, eps):
    """(1 - eps) I + (eps / n) 11^T, (n, n) in float64: the start of the mixers with
    `starts_at_blend`, so that differences between runs come from the mixers and not from where they
    started. hc, identity and orthogonal start at I, whatever eps is."""
    return (1 - eps) * torch.eye(n, dtype=torch.float64) + eps / n


def start_logits(name, n, eps, **options):
    """The logits (K,) at which training starts: those of `blend`, or what the mixer says."""
    mixer = find_mixer(name)
    if mixer.start:
        return mixer.start(n, eps)
    return mixer.inverse(blend(n, eps), n, **options)


def log_inverse(M, n, **options):
    """log M, for maps that divide exp(logits) by sums of lines, which are 1 in M already."""
    return M.log().flatten(-2)


# ---- residual and identity: nothing to mix -------------------------------------------------------


def identity(planes, n):
    """M = I: the streams meet only in reads and writes (iHC, 2607.28611).

    Returns no rows: HyperConnection then skips the mix.
    """
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


def orthogonal(planes, n):
    """A product of rotations, one for each pair of streams i < j; a logit is the angle of one.

    M is orthogonal, and its entries have signs: no signal grows or shrinks, but the sums of rows
    and columns are free.
    """
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


# ---- sinkhorn ------------------------------------------------------------------------------------

MIXERS["sinkhorn"] = Mixer(
    n_logits=lambda n: n * n,
    map=sinkhorn.sinkhorn,
    map_stacked=sinkhorn.sinkhorn_stacked,
    inverse=log_inverse,
    options={
        "sinkhorn_rounds": Option(
            default=20,
            comment="sinkhorn: how often columns, then rows, are divided by their sums",
            allows=lambda rounds: isinstance(rounds, int) and rounds >= 1,
            must="must be a whole number of at least 1",
        )
    },
    exact_sums=("rows",),
)


# ---- permutation and kronecker -------------------------------------------------------------------

MIXERS["permutation"] = Mixer(
    n_logits=permutations.n_permutations,
    map=permutations.permutation,
    map_stacked=permutations.permutation_stacked,
    inverse=permutations.permutation_inverse,
    start=permutations.permutation_start,
)
MIXERS["kronecker"] = Mixer(
    n_logits=permutations.n_kronecker_logits,
    map=permutations.kronecker,
    map_stacked=permutations.kronecker_stacked,
    inverse=permutations.kronecker_inverse,
    start=permutations.kronecker_start,
    starts_at_blend=False,
)


# ---- tbp and rtbp --------------------------------------------------------------------------------

MIXERS["tbp"] = Mixer(
    n_logits=lambda n: (n - 1) ** 2,
    map=charts.tbp,
    map_stacked=stacked_charts.tbp_stacked,
    inverse=lambda M, n: charts.inverse(charts.tbp_chart, M, n),
)
MIXERS["rtbp"] = Mixer(
    n_logits=lambda n: (n - 1) ** 2,
    map=charts.rtbp,
    map_stacked=stacked_charts.rtbp_stacked,
    inverse=lambda M, n: charts.inverse(charts.rtbp_chart, M, n),
)


# Every option of every mixer, for the scripts' knobs. It stays last: it would miss what is below.
OPTIONS = {name: option for mixer in MIXERS.values() for name, option in mixer.options.items()}
