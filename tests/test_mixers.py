import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mixers import (MIXERS, HyperConnection, Mixer, composite_gain, ds_error, mean_square, mixer_options, mixing_logits,
                    mixing_matrix, n_logits)
from oracle import ORACLES

EXACT = [name for name, mixer in MIXERS.items() if mixer.exact and name != "residual"]
CHARTS = [(name, interval_map) for name in ("tbp", "rtbp") for interval_map in ("plain", "scaled")]


def defined(name, ns):
    """The numbers of streams among ns for which the mixer is defined and small enough for a test."""
    ns = [1] if name == "residual" else ns
    return [n for n in ns if not refused(name, n) and n_logits(name, n) <= 720]


def refused(name, n):
    try:
        n_logits(name, n)
    except ValueError:
        return True


def cases(names=MIXERS, ns=range(2, 17)):
    """(name, n, options) for each mixer, size and way of mapping intervals."""
    return [(name, n, options) for name in names for n in defined(name, ns)
            for options in ([{"interval_map": m} for m in ("plain", "scaled")] if "interval_map" in mixer_options(name) else [{}])]


def interior(n, count, seed=0):
    """Random doubly stochastic matrices (count, n, n), float64, away from the border and without symmetry."""
    M = torch.randn(count, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
    for _ in range(1000):
        M = M / M.sum(-2, keepdim=True)
        M = M / M.sum(-1, keepdim=True)
    return M


@pytest.mark.parametrize("name, n, options", cases())
def test_values_against_the_oracle(name, n, options):
    if name not in ORACLES:
        pytest.skip(f"{name} is not in tests/oracle.py yet")
    logits = torch.randn(3, n_logits(name, n), generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    M = mixing_matrix(name, logits, n, **options)
    assert M.shape == (3, n, n)
    for row, got in zip(logits, M):
        np.testing.assert_allclose(got, ORACLES[name](row.tolist(), n, **options), atol=1e-12)
    if name not in ("residual", "identity") and n & (n - 1 if name == "kronecker" else n - 2):      # 2 x 2 is symmetric
        assert (M - M.mT).abs().max() > 1e-3, "a symmetric matrix could not tell M from its transpose"


@pytest.mark.parametrize("name, n, options", cases(ns=(2, 3, 4, 5, 9)))
def test_gradients_in_float64(name, n, options):
    if n_logits(name, n):
        logits = torch.randn(2, n_logits(name, n), generator=torch.Generator().manual_seed(n), dtype=torch.float64) / 2
        assert torch.autograd.gradcheck(lambda t: mixing_matrix(name, t, n, **options), logits.requires_grad_())


@pytest.mark.parametrize("rounds", [1, 2, 3])       # after 20 rounds some terms of the derivative have died away
def test_sinkhorn_s_derivative_of_few_rounds(rounds):
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(rounds), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: mixing_matrix("sinkhorn", t, 3, sinkhorn_rounds=rounds), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_computes_in_at_least_float32(dtype):
    M = mixing_matrix("tbp", torch.randn(5, 9).to(dtype), 4)
    assert M.dtype == torch.promote_types(dtype, torch.float32) and ds_error(M).max() < 1e-6


SCALES = (1, 20, 100, 1e4)


def draws(count, K, generator):
    """(what, logits (count, K)): normal logits at each scale, and a mixture of what is hardest."""
    for scale in SCALES:
        yield f"{scale:g}", scale * torch.randn(count, K, generator=generator)
    few = count // 4
    sign = torch.randn(3 * few, K, generator=generator).sign()
    magnitude = 10 ** (8 * torch.rand(few, K, generator=generator) - 4)                     # 1e-4 to 1e4
    sparse = 1e4 * (torch.rand(few, K, generator=generator) < 0.2)                          # the rest halve their intervals
    equal = torch.cat([torch.tensor([0, 1e4, -1e4]), 1e4 * (2 * torch.rand(count, generator=generator) - 1)])
    yield "adversarial", torch.cat([1e4 * sign[:few], magnitude * sign[few:2 * few], sparse * sign[2 * few:],
                                    equal[:count - 3 * few, None].expand(-1, K)])


def measure(call, n, logits, generator):
    """Asserts that M = call(logits) lies within [0, 1], to the bit, and that its gradient is finite.
    -> the worst error of a row's sum, of a column's sum, and the share of the logits that get a zero gradient."""
    M = call(logits.requires_grad_())
    assert M.min() >= 0 and M.max() <= 1                    # a NaN is neither
    dead = 0.0
    if logits.numel():
        gradient, = torch.autograd.grad((M * torch.randn(n, n, generator=generator)).sum(), logits)
        assert gradient.isfinite().all()
        dead = (gradient == 0).float().mean().item()
    return (M.sum(-1) - 1).abs().max().item(), (M.sum(-2) - 1).abs().max().item(), dead


def tolerance(n):
    return 1e-6 if n <= 8 else 2e-6


@pytest.mark.parametrize("name, n, options", cases(EXACT))
def test_exactly_doubly_stochastic_at_any_logits(name, n, options):
    generator, K = torch.Generator().manual_seed(n), n_logits(name, n)
    for what, logits in draws(2000 if K < 300 else 100, K, generator):
        rows, columns, dead = measure(lambda logits: mixing_matrix(name, logits, n, **options), n, logits, generator)
        assert max(rows, columns) <= tolerance(n), what
        if what == "1" and options != {"interval_map": "scaled"}:       # whose slope, where an interval is narrow, is steep
            assert dead < 0.01


@pytest.mark.long
@pytest.mark.parametrize("name, options, compiled", [
    (name, options, compiled) for compiled in (False, True) for name, _, options in cases([*EXACT, "sinkhorn"], ns=[2])
    if not compiled or name != "sinkhorn"])
def test_a_million_logit_vectors(name, options, compiled, report):
    """For each n where the mixer is defined; compiled, for those that compile soon. Sinkhorn's columns are reported and
    not asserted: 20 rounds bring them as near as they do."""
    count = 1_000_000 // (len(SCALES) + 1)
    what = " ".join([name, *options.values(), *["compiled"] * compiled])
    report(f"{what}: the worst error of a sum / the share of gradients that are zero, logits at scale")
    for n in range(2, 17):
        if refused(name, n) or compiled and n > 4:
            continue

        def call(logits):
            return mixing_matrix(name, logits, n, **options)

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
        errors, deads = ({scale: of(values) for scale, values in found.items()} for of in (
            lambda values: max(error for error, _ in values), lambda values: sum(dead for _, dead in values) / len(values)))
        report(f"n = {n:2} " + " ".join(f"| {scale} {errors[scale]:.1e} / {deads[scale]:.1%}" for scale in found))
        if name != "sinkhorn":
            assert max(errors.values()) <= tolerance(n)
            assert deads["1"] < 0.01 or options == {"interval_map": "scaled"}


@pytest.mark.parametrize("n", [2, 4, 7, 16])
@pytest.mark.parametrize("scale", [1, 100, 1e4])
def test_sinkhorn_is_finite_non_negative_and_has_exact_rows(n, scale):
    logits = (scale * torch.randn(500, n * n, generator=torch.Generator().manual_seed(n))).requires_grad_()
    M = mixing_matrix("sinkhorn", logits, n)
    gradient, = torch.autograd.grad((M * torch.arange(n)).sum(), logits)
    assert M.min() >= 0 and gradient.isfinite().all() and (M.sum(-1) - 1).abs().max() < 1e-6
    assert scale > 1 or ds_error(M).max() < 0.05


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_charts_stay_in_the_polytope_at_adversarial_logits(data):
    name, interval_map = data.draw(st.sampled_from(CHARTS))
    n = data.draw(st.integers(2, 9))
    logits = data.draw(st.lists(st.floats(-1e4, 1e4, width=32), min_size=(n - 1) ** 2, max_size=(n - 1) ** 2))
    M = mixing_matrix(name, torch.tensor(logits), n, interval_map=interval_map)
    assert M.min() >= 0 and M.max() <= 1 and ds_error(M) <= 2e-6


@pytest.mark.parametrize("name, n, options", cases(["tbp", "rtbp", "sinkhorn", "permutation"], ns=range(2, 17)))
def test_inverse_reaches_any_interior_matrix(name, n, options):
    M = interior(n, 4)
    logits = mixing_logits(name, M, **options)
    assert logits.shape == (4, n_logits(name, n)) and logits.dtype == torch.float64
    assert (mixing_matrix(name, logits, n, **options) - M).abs().max() < 1e-9
    if name in ("tbp", "rtbp"):                 # a bijection: the logits come back as well
        assert (mixing_logits(name, mixing_matrix(name, logits, n, **options), **options) - logits).abs().max() < 1e-5


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8, 9, 10, 12, 16])
def test_inverse_of_a_kronecker_product(n):
    M = mixing_matrix("kronecker", torch.randn(3, n_logits("kronecker", n)).double(), n)
    assert (mixing_matrix("kronecker", mixing_logits("kronecker", M), n) - M).abs().max() < 1e-9


def test_leading_shapes_and_single_matrices():
    logits = torch.randn(2, 3, 5, 9)
    M = mixing_matrix("rtbp", logits, 4)
    assert M.shape == (2, 3, 5, 4, 4)
    assert torch.equal(M[1, 2, 3], mixing_matrix("rtbp", logits[1, 2, 3], 4))
    assert mixing_matrix("identity", torch.zeros(7, 0), 3).shape == (7, 3, 3)


@pytest.mark.parametrize("call, says", [
    (lambda: n_logits("sinkhron", 4), "sinkhorn"),
    (lambda: n_logits("tbp", 1), "n_streams must be at least 2, not 1"),
    (lambda: n_logits("residual", 4), "must be 1, not 4"),
    (lambda: n_logits("permutation", 8), "needs 8! logits"),
    (lambda: n_logits("kronecker", 22), "needs 11! logits"),
    (lambda: mixing_matrix("tbp", torch.zeros(8), 4), "takes 9 logits in the last dimension, not 8"),
    (lambda: mixing_matrix("tbp", torch.tensor(1.0), 4), "scalar"),
    (lambda: mixing_matrix("tbp", torch.zeros(9), 4, rounds=3), "no option 'rounds'; it takes interval_map"),
    (lambda: mixing_matrix("tbp", torch.zeros(9), 4, interval_map="scald"), "'scald'"),
    (lambda: mixing_matrix("sinkhorn", torch.zeros(16), 4, sinkhorn_rounds=0), "not 0"),
    (lambda: mixing_logits("tbp", torch.ones(4, 4)), "not doubly stochastic"),
    (lambda: mixing_logits("tbp", torch.full((4, 4), math.nan)), "not doubly stochastic"),
    (lambda: mixing_logits("tbp", torch.ones(4, 3)), "(4, 3)"),
    (lambda: mixing_logits("tbp", torch.eye(4)), "border of the polytope"),
    (lambda: mixing_logits("sinkhorn", torch.eye(4)), "smallest entry 0"),
    (lambda: mixing_logits("permutation", torch.eye(4)), "which permutation reaches only with infinite"),
    (lambda: mixing_logits("kronecker", interior(4, 1)), "no Kronecker product"),
    (lambda: HyperConnection("tbp", 4, 8, read_start=1.0), "read_start"),
    (lambda: HyperConnection("tbp", 4, 8, sinkhorn_rounds=3), "no option 'sinkhorn_rounds'"),
])
def test_refusals_name_the_value(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)


def test_a_new_mixer_is_a_function_and_a_line(monkeypatch):
    def blend(logits, n):
        s = logits[0].sigmoid()
        return [[s * (i == j) + (1 - s) / n for j in range(n)] for i in range(n)]
    with pytest.raises(ValueError, match="needs an inverse or a start"):
        Mixer(lambda n: 1, blend)
    monkeypatch.setitem(MIXERS, "blend", Mixer(lambda n: 1, blend, start=lambda n, eps: torch.tensor([1 - eps]).logit()))
    M = HyperConnection("blend", 3, 8, dynamic=False, mix_start=0.05).matrices(torch.zeros(1, 1, 3, 8), None)
    assert torch.allclose(M, 0.95 * torch.eye(3) + 0.05 / 3)
    with pytest.raises(ValueError, match="blend has no inverse in MIXERS"):
        mixing_logits("blend", M)


@pytest.mark.parametrize("name, n, options", cases([name for name in MIXERS if name not in ("residual", "hc", "identity")]))
def test_every_mixer_starts_at_the_same_matrix(name, n, options):
    """(1 - eps) I + (eps / n) 11^T; kronecker, which cannot, has at least its diagonal."""
    M = HyperConnection(name, n, 8, dynamic=False, mix_start=0.05, **options).matrices(torch.zeros(1, 1, n, 8), None)[0, 0]
    start = 0.95 * torch.eye(n) + 0.05 / n
    if name == "kronecker":
        assert torch.allclose(M.diagonal(), start.diagonal(), atol=1e-5) and ds_error(M) < 1e-6
    else:
        assert torch.allclose(M, start, atol=1e-5)


def plain_hyper_connection(hc, x, branch):
    """maths.md's formulas one after the other, for autograd to derive."""
    n, (read, write, mix) = hc.n_streams, hc.parts
    logits = hc.bias.expand(*x.shape[:2], -1)
    if hc.dynamic:
        flat = x.flatten(2)
        z = (flat @ hc.phi.t()) * torch.rsqrt((flat ** 2).mean(-1, keepdim=True) + 1e-6)
        logits = hc.bias + torch.cat([a.expand(k) for a, k in zip(hc.alpha, hc.parts)]) * (z if MIXERS[hc.mixer].bounded else z.tanh())
    a, w, t = logits.split(hc.parts, -1)
    if MIXERS[hc.mixer].bounded:
        a, w = a.sigmoid(), 2 * w.sigmoid()
    M = mixing_matrix(hc.mixer, t, n, **hc.options)
    v = branch(torch.einsum("btj,btjc->btc", a, x))
    return torch.einsum("btij,btjc->btic", M, x) + w[..., None] * v[:, :, None]


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "residual"])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("n", [2, 4])
def test_hyper_connection_and_its_gradients_are_the_plain_formulation_s(name, dynamic, n):
    torch.manual_seed(0)
    hc = HyperConnection(name, n, 6, dynamic=dynamic, mix_start=0.3).double()
    with torch.no_grad():
        for p in hc.parameters():
            p += 0.3 * torch.randn_like(p)
    branch = torch.nn.Linear(6, 6).double()
    x = torch.randn(2, 3, n, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    leaves = [x, *hc.parameters(), *branch.parameters()]

    def results(new):
        return new, *torch.autograd.grad((new * weight).sum(), leaves)
    new, square = hc(x, mean_square(x), branch)
    if dynamic:
        torch.testing.assert_close(square, (new ** 2).mean((-2, -1)))
    for mine, plain in zip(results(new), results(plain_hyper_connection(hc, x, branch))):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dynamic", [True, False])
def test_gradients_are_those_of_the_parameters_that_the_forward_had(dynamic):
    """The backward computes the coefficients again, when torch.func.functional_call has put the module's own back."""
    torch.manual_seed(0)
    hc, branch = HyperConnection("tbp", 3, 6, dynamic=dynamic).double(), torch.nn.Linear(6, 6).double()
    x = torch.randn(2, 3, 3, 6, dtype=torch.float64)
    other = {name: (p + 0.3 * torch.randn_like(p)).detach().requires_grad_() for name, p in hc.named_parameters()}
    new, _ = torch.func.functional_call(hc, other, (x, mean_square(x), branch))
    gradients = torch.autograd.grad(new.square().sum(), other.values())
    with torch.no_grad():
        for name, p in hc.named_parameters():
            p.copy_(other[name])
    expected = torch.autograd.grad(hc(x, mean_square(x), branch)[0].square().sum(), hc.parameters())
    torch.testing.assert_close(gradients, expected)


def test_composite_gain():
    M = [mixing_matrix("rtbp", 3 * torch.randn(9), 4) for _ in range(48)]
    assert abs(composite_gain(M) - 1) < 1e-5
    a, b = torch.tensor([[1.0, -2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    products = [a, b, b @ a]                    # later matrices stand on the left
    assert composite_gain([a, b]) == max(max(p.abs().sum(0).max(), p.abs().sum(1).max()).item() for p in products)
    assert composite_gain([]) == 1
    assert math.isnan(composite_gain([a, a * math.nan, b]))


def test_what_only_the_identity_has_no_logits_for():
    assert mixing_logits("identity", torch.eye(3).expand(2, 3, 3)).shape == (2, 0)
    with pytest.raises(ValueError, match="off by 0.5 from I"):
        mixing_logits("identity", torch.full((2, 2), 0.5))


@pytest.mark.parametrize("name", ["identity", "sinkhorn", "permutation", "kronecker", "tbp", "rtbp"])
def test_no_matrices_have_no_logits(name):
    assert mixing_logits(name, torch.zeros(0, 3, 3)).shape == (0, n_logits(name, 3))
