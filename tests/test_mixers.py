"""Every mixer of the registry against its oracle and its promises. No test knows a mixer by name:
what differs between mixers is a property of their entries."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ORACLES

from mixers import (
    MIXERS,
    OPTIONS,
    Mixer,
    blend,
    composite_gain,
    ds_error,
    mixing_logits,
    mixing_matrix,
    n_logits,
    start_logits,
)

EXACT = [name for name, mixer in MIXERS.items() if mixer.exact and not mixer.one_stream]
WITH_LOGITS = [name for name in MIXERS if not MIXERS[name].one_stream and MIXERS[name].n_logits(4)]
DOUBLY_STOCHASTIC = [name for name in WITH_LOGITS if MIXERS[name].doubly_stochastic]


def refused(name, n):
    try:
        n_logits(name, n)
    except ValueError:
        return True


def defined(name, ns):
    """The numbers of streams among ns for which the mixer is defined and small enough to test."""
    ns = [1] if MIXERS[name].one_stream else ns
    return [n for n in ns if not refused(name, n) and n_logits(name, n) <= 720]


def cases(names=MIXERS, ns=range(2, 17)):
    """(name, n) for each mixer and size."""
    return [(name, n) for name in names for n in defined(name, ns)]


def random_logits(name, n, count, seed=None):
    generator = torch.Generator().manual_seed(n if seed is None else seed)
    return torch.randn(count, n_logits(name, n), generator=generator, dtype=torch.float64)


def interior(n, count, seed=0):
    """Random doubly stochastic matrices (count, n, n) in float64, away from the border."""
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(count, n, n, generator=generator, dtype=torch.float64).exp()
    for _ in range(1000):
        M = M / M.sum(-2, keepdim=True)
        M = M / M.sum(-1, keepdim=True)
    return M


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("name, n", cases())
def test_values_against_the_oracle(name, n):
    if name not in ORACLES:
        pytest.skip(f"{name} is not in tests/oracle.py yet")
    logits = random_logits(name, n, 3)
    M = mixing_matrix(name, logits, n)
    assert M.shape == (3, n, n)
    for row, got in zip(logits, M):
        np.testing.assert_allclose(got, ORACLES[name](row.tolist(), n), atol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize("name", WITH_LOGITS)
def test_some_size_tells_a_matrix_from_its_transpose(name):
    """A test with symmetric matrices alone could not see a mixer that returns the transpose."""
    matrices = [mixing_matrix(name, random_logits(name, n, 3), n) for n in defined(name, (3, 4))]
    assert max((M - M.mT).abs().max() for M in matrices) > 1e-3


@pytest.mark.quick
@pytest.mark.parametrize("where", ["random", "start", "border"])
@pytest.mark.parametrize("name, n", cases(WITH_LOGITS, ns=(5, 6, 7, 8, 32)))
def test_stacked_planes_give_the_same_matrix_and_gradient(name, n, where):
    """Where a mixer has a form on tensors, for many streams, it is the map of its planes. At the
    start, what is left of a row and of a column is often equal; at the border it is often 0."""
    mixer, logits = MIXERS[name], random_logits(name, n, 2)
    if where == "start":
        logits = start_logits(name, n, 0.01).to(logits).expand_as(logits)
    if where == "border":
        logits = torch.where(random_logits(name, n, 2).flip(0) > 0, 60 * logits.sign(), logits)
    logits = logits.T.contiguous().requires_grad_()
    if mixer.map_stacked is None:
        pytest.skip(f"{name} has only planes")
    if name == "kronecker" and n in (5, 7) or name == "permutation":
        pytest.skip("n! permutations as planes take long")
    rows = mixer.map(logits.unbind(0), n)
    plain = torch.stack([torch.stack(row) for row in rows])
    stacked = mixer.map_stacked(logits, n)
    weight = torch.randn(n, n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    gradients = [torch.autograd.grad((M * weight).sum(), logits)[0] for M in (stacked, plain)]
    torch.testing.assert_close(stacked, plain, rtol=0, atol=1e-13)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name, n", cases(WITH_LOGITS, ns=(2, 3, 4, 5, 9)))
def test_gradients_in_float64(name, n):
    """Of large matrices, in a random direction."""
    logits = (random_logits(name, n, 2) / 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: mixing_matrix(name, t, n), logits, fast_mode=n > 4)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("value", [1, 2, 3])
def test_gradients_with_small_options(option, value):
    """After 20 rounds some terms of the derivative have died away; after 1, 2 or 3 none have."""
    for name in [name for name in MIXERS if option in MIXERS[name].options]:
        logits = random_logits(name, 3, 2, seed=value).requires_grad_()
        matrix = partial(mixing_matrix, name, n_streams=3, **{option: value})
        assert torch.autograd.gradcheck(matrix, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", EXACT)
def test_computes_in_at_least_float32(name, dtype):
    M = mixing_matrix(name, random_logits(name, 4, 5).to(dtype), 4)
    assert M.dtype == torch.promote_types(dtype, torch.float32) and ds_error(M).max() < 1e-6


# ---- exactness at any logits ---------------------------------------------------------------------

SCALES = (1, 20, 100, 1e4)


def draws(count, K, generator):
    """(what, logits (count, K)): normal logits at each scale, and a mixture of what is hardest."""
    for scale in SCALES:
        yield f"{scale:g}", scale * torch.randn(count, K, generator=generator)
    few = count // 4
    sign = torch.randn(3 * few, K, generator=generator).sign()
    magnitude = 10 ** (8 * torch.rand(few, K, generator=generator) - 4)  # 1e-4 to 1e4
    sparse = 1e4 * (torch.rand(few, K, generator=generator) < 0.2)  # the rest halve intervals
    uniform = 1e4 * (2 * torch.rand(count, generator=generator) - 1)
    equal = torch.cat([torch.tensor([0, 1e4, -1e4]), uniform])[: count - 3 * few]
    yield (
        "adversarial",
        torch.cat(
            [
                1e4 * sign[:few],
                magnitude * sign[few : 2 * few],
                sparse * sign[2 * few :],
                equal[:, None].expand(-1, K),
            ]
        ),
    )


def measure(call, n, logits, generator):
    """Asserts that M = call(logits) lies in [0, 1], to the bit, and that its gradient is finite.
    -> the worst error of a row's sum, of a column's sum, and the share of zero gradients."""
    M = call(logits.requires_grad_())
    assert M.min() >= 0 and M.max() <= 1  # a NaN is neither
    dead = 0.0
    if logits.numel():
        weights = torch.randn(n, n, generator=generator)
        (gradient,) = torch.autograd.grad((M * weights).sum(), logits)
        assert gradient.isfinite().all()
        dead = (gradient == 0).float().mean().item()
    return (M.sum(-1) - 1).abs().max().item(), (M.sum(-2) - 1).abs().max().item(), dead


def tolerance(n):
    if n <= 8:
        return 1e-6
    return 2e-6 if n <= 16 else 2.5e-6


@pytest.mark.parametrize("name, n", cases(EXACT, ns=(*range(2, 17), 32)))
def test_exactly_doubly_stochastic_at_any_logits(name, n):
    generator, K = torch.Generator().manual_seed(n), n_logits(name, n)
    for what, logits in draws(2000 if K < 300 else 100, K, generator):
        found = measure(lambda t: mixing_matrix(name, t, n), n, logits, generator)
        assert max(found[:2]) <= tolerance(n), what
        assert what != "1" or found[2] < 0.01 or n > 16


@pytest.mark.parametrize("n", [2, 4, 7, 16])
@pytest.mark.parametrize("name", [name for name in WITH_LOGITS if MIXERS[name].nonnegative])
def test_promised_sums_are_exact_and_gradients_finite(name, n):
    if n not in defined(name, [n]):
        pytest.skip(f"{name} is not defined, or too large, for {n} streams")
    for scale in (1, 100, 1e4):
        logits = (scale * random_logits(name, n, 500)).float().requires_grad_()
        M = mixing_matrix(name, logits, n)
        (gradient,) = torch.autograd.grad((M * torch.arange(n * n).view(n, n)).sum(), logits)
        assert M.min() >= 0 and gradient.isfinite().all()
        for axis, dim in (("rows", -1), ("columns", -2)):
            if axis in MIXERS[name].exact_sums:
                assert (M.sum(dim) - 1).abs().max() < 1e-6
        assert scale > 1 or not MIXERS[name].doubly_stochastic or ds_error(M).max() < 0.05


@pytest.mark.quick
@pytest.mark.parametrize("n", [2, 3, 4, 9])
def test_orthogonal_matrices_are_orthogonal(n):
    M = mixing_matrix("orthogonal", 3 * random_logits("orthogonal", n, 20), n)
    assert (M @ M.mT - torch.eye(n)).abs().max() < 1e-12


@settings(max_examples=200)
@given(st.data())
def test_stays_in_the_polytope_at_adversarial_logits(data):
    name = data.draw(st.sampled_from(EXACT))
    n = data.draw(st.sampled_from(defined(name, range(2, 10))))
    K = n_logits(name, n)
    logits = data.draw(st.lists(st.floats(-1e4, 1e4, width=32), min_size=K, max_size=K))
    M = mixing_matrix(name, torch.tensor(logits), n)
    assert M.min() >= 0 and M.max() <= 1 and ds_error(M) <= 2e-6


@pytest.mark.long
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["identity", *DOUBLY_STOCHASTIC])
def test_a_million_logit_vectors(name, compiled, report):
    """For each n where the mixer is defined; compiled, for those that compile soon. Columns that
    are exact only in the limit are reported and not asserted."""
    exact = MIXERS[name].exact
    if compiled and not exact:
        pytest.skip("compiled, only exact mixers are tried")
    count = 1_000_000 // (len(SCALES) + 1)
    what = f"{name} compiled" if compiled else name
    report(f"{what}: the worst error of a sum / the share of zero gradients, logits at scale")
    for n in range(2, 17):
        if refused(name, n) or compiled and n > 4:
            continue

        def call(logits, n=n):
            return mixing_matrix(name, logits, n)

        if compiled:
            torch.compiler.reset()
            call = torch.compile(call, fullgraph=True)
        K, generator, found = n_logits(name, n), torch.Generator().manual_seed(n), {}
        batch = min(count, max(200, 4_000_000 // max(K, 1)))
        for _ in range(-(-count // batch)):
            for scale, logits in draws(batch, K, generator):
                rows, columns, dead = measure(call, n, logits, generator)
                assert rows <= tolerance(n)
                found.setdefault(scale, []).append((max(rows, columns), dead))
        worst = {scale: max(error for error, _ in values) for scale, values in found.items()}
        dead = {s: sum(share for _, share in found[s]) / len(found[s]) for s in found}
        report(f"n = {n:2} " + " ".join(f"| {s} {worst[s]:.1e} / {dead[s]:.1%}" for s in found))
        assert not exact or max(worst.values()) <= tolerance(n) and dead["1"] < 0.01


# ---- inverses and starts -------------------------------------------------------------------------


@pytest.mark.parametrize("name, n", cases([m for m in WITH_LOGITS if MIXERS[m].inverse]))
def test_inverse_of_what_the_mixer_gives(name, n):
    """logits -> M -> logits -> M gives M again. A mixer that is doubly stochastic only in the limit
    has logits for matrices that are."""
    M = mixing_matrix(name, random_logits(name, n, 3), n)
    if MIXERS[name].doubly_stochastic and not MIXERS[name].exact:
        M = interior(n, 3)
    logits = mixing_logits(name, M)
    assert logits.shape == (3, n_logits(name, n)) and logits.dtype == torch.float64
    assert (mixing_matrix(name, logits, n) - M).abs().max() < 1e-9


def reaches_everything(name):
    """By counting: the polytope has (n-1)^2 dimensions, here for n = 4."""
    return n_logits(name, 4) >= 9


@pytest.mark.parametrize("name, n", cases(DOUBLY_STOCHASTIC))
def test_inverse_reaches_any_interior_matrix(name, n):
    if MIXERS[name].inverse is None or not reaches_everything(name):
        with pytest.raises(ValueError):
            mixing_logits(name, interior(4, 1))
        return
    M = interior(n, 4)
    logits = mixing_logits(name, M)
    assert (mixing_matrix(name, logits, n) - M).abs().max() < 1e-9
    if n_logits(name, n) == (n - 1) ** 2:  # a bijection: the logits come back as well
        again = mixing_logits(name, mixing_matrix(name, logits, n))
        assert (again - logits).abs().max() < 1e-5


@pytest.mark.quick
@pytest.mark.parametrize("name, n", cases([name for name in MIXERS if not MIXERS[name].one_stream]))
def test_every_mixer_starts_at_the_same_matrix(name, n):
    """(1 - eps) I + (eps / n) 11^T, where the mixer reaches it; elsewhere its rows sum to 1."""
    M = mixing_matrix(name, start_logits(name, n, 0.05).double(), n)
    if MIXERS[name].starts_at_blend:
        assert torch.allclose(M, 0.95 * torch.eye(n).double() + 0.05 / n, atol=1e-6)
    assert (M.sum(-1) - 1).abs().max() < 1e-6
    assert MIXERS[name].starts_at_blend or (M.diagonal() >= 0.95 + 0.05 / n - 1e-6).all()


def test_blend_is_the_formula():
    for n, eps in ((2, 0.1), (4, 0.01)):
        expected = np.full((n, n), eps / n) + (1 - eps) * np.eye(n)
        np.testing.assert_allclose(blend(n, eps), expected)


# ---- shapes, refusals, the registry --------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("name", MIXERS)
def test_leading_shapes_and_single_matrices(name):
    n = 1 if MIXERS[name].one_stream else 4
    logits = torch.randn(2, 3, 5, n_logits(name, n))
    M = mixing_matrix(name, logits, n)
    assert M.shape == (2, 3, 5, n, n)
    assert torch.equal(M[1, 2, 3], mixing_matrix(name, logits[1, 2, 3], n))


@pytest.mark.quick
@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: n_logits("sinkhron", 4), "sinkhorn"),
        (lambda: n_logits("tbp", 1), "n_streams must be at least 2, not 1"),
        (lambda: n_logits("residual", 4), "must be 1, not 4"),
        (lambda: n_logits("permutation", 8), "needs 8! logits"),
        (lambda: n_logits("kronecker", 22), "22 has the prime factor 11, so kronecker needs 11! "),
        (lambda: mixing_matrix("tbp", torch.zeros(8), 4), "takes 9 logits in the last dimension"),
        (lambda: mixing_matrix("tbp", torch.tensor(1.0), 4), "scalar"),
        (lambda: mixing_matrix("tbp", torch.zeros(9), 4, rounds=3), "no option 'rounds'"),
        (lambda: mixing_matrix("sinkhorn", torch.zeros(16), 4, sinkhorn_rounds=0), "not 0"),
        (lambda: mixing_logits("tbp", torch.ones(4, 4)), "not doubly stochastic"),
        (lambda: mixing_logits("tbp", torch.full((4, 4), math.nan)), "not doubly stochastic"),
        (lambda: mixing_logits("tbp", torch.ones(4, 3)), "(4, 3)"),
        (lambda: mixing_logits("tbp", torch.eye(4)), "tbp reaches this M only with infinite"),
        (lambda: mixing_logits("sinkhorn", torch.eye(4)), "(smallest entry 0)"),
        (
            lambda: mixing_logits("permutation", torch.eye(4)),
            "permutation reaches this M only with",
        ),
        (lambda: mixing_logits("kronecker", interior(4, 1)), "no Kronecker product"),
        (lambda: mixing_logits("identity", torch.full((2, 2), 0.5)), "off by 0.5 from I"),
        (lambda: mixing_logits("orthogonal", torch.eye(2)), "has no inverse"),
        (lambda: mixing_logits("rows", torch.full((2, 2), 0.6)), "the rows of M do not sum to 1"),
        (lambda: mixing_logits("columns", torch.full((2, 2), 0.6)), "the columns of M do not"),
    ],
)
def test_refusals_name_the_value(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)


@pytest.mark.parametrize("name", [name for name in MIXERS if MIXERS[name].inverse])
def test_no_matrices_have_no_logits(name):
    n = 1 if MIXERS[name].one_stream else 3
    assert mixing_logits(name, torch.zeros(0, n, n)).shape == (0, n_logits(name, n))


def test_an_option_is_declared_once():
    """The scripts' knobs are those of the entries, and no two mixers mean different things."""
    declared = [(key, o) for mixer in MIXERS.values() for key, o in mixer.options.items()]
    assert dict(declared) == OPTIONS and all(OPTIONS[key] == option for key, option in declared)
    assert all(option.allows(option.default) and option.comment for option in OPTIONS.values())


def test_an_entry_needs_an_inverse_or_a_start():
    with pytest.raises(ValueError, match="needs an inverse or a start"):
        Mixer(n_logits=lambda n: 1, map=lambda planes, n: [])


# ---- diagnostics ---------------------------------------------------------------------------------


def test_composite_gain():
    M = [mixing_matrix("rtbp", 3 * torch.randn(9), 4) for _ in range(48)]
    assert abs(composite_gain(M) - 1) < 1e-5
    a = torch.tensor([[1.0, -2.0], [0.0, 1.0]])
    b = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    products = [a, b, b @ a]  # later matrices stand on the left
    expected = max(max(p.abs().sum(0).max(), p.abs().sum(1).max()).item() for p in products)
    assert composite_gain([a, b]) == expected
    assert composite_gain([]) == 1
    assert math.isnan(composite_gain([a, a * math.nan, b]))


def test_ds_error_is_the_worst_of_sums_and_entries():
    M = torch.tensor([[0.5, 0.7], [0.5, 0.3]])
    assert abs(ds_error(M) - 0.2) < 1e-6
    assert abs(ds_error(torch.tensor([[1.25, -0.25], [-0.25, 1.25]])) - 0.25) < 1e-6
