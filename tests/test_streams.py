"""Hyper-connections against the plain formulas of their docstring, derived by autograd."""

import math

import pytest
import torch
from torch.nn import functional as F

from mixers import MIXERS, Mixer, ds_error, mixing_matrix, n_logits
from passes import mean_square
from streams import (
    SEES,
    HyperConnection,
    ReadOut,
    Residual,
    ScaledResidual,
    Streams,
    scale_rows,
    start_streams,
)

MIXING = [name for name in MIXERS if not MIXERS[name].one_stream]


def rms_norm(x):
    """x (B, T, n, C) -> (B, T, n*C), over all numbers of a token, without a gain."""
    return F.rms_norm(x.flatten(2), (x.shape[2] * x.shape[3],), eps=1e-6)


def plain_logits(module, x, squashed=(False,)):
    """bias + alpha * f(phi @ RMSNorm(x)), part by part: (B, T, size) for each part.

    squashed: for each part, whether f is tanh."""
    bias = module.bias.split(module.sizes)
    if not module.dynamic:
        return [b.expand(*x.shape[:2], -1) for b in bias]
    z = (rms_norm(x) @ module.phi.t()).split(module.sizes, -1)
    f = [z_.tanh() if squash else z_ for z_, squash in zip(z, squashed, strict=True)]
    return [b + a * f_ for b, a, f_ in zip(bias, module.alpha, f)]


def plain_coefficients(hc, x):
    """a and w (B, T, n), M (B, T, n, n) from the streams x that the coefficients see."""
    free = hc.gates == "free"
    a, w, mix = plain_logits(hc, x, (free, free, hc.mixer == "hc"))
    if hc.gates != "free":
        a, w = a.sigmoid(), w.exp() if hc.gates == "exp" else 2 * w.sigmoid()
    K = n_logits(hc.mixer, hc.n_streams)
    M = mixing_matrix(hc.mixer, mix[..., :K], hc.n_streams, **hc.options)
    scales = mix[..., K:].exp()  # none, one for all rows, or one a row
    if scales.shape[-1]:
        M = scales[..., None] * M
    return a, w, M


def plain_hyper_connection(hc, x, branch):
    """u = sum_j a_j x_j, x'_i = sum_j M_ij x_j + w_i F(u), one formula after the other."""
    a, w, M = plain_coefficients(hc, x)
    v = branch(torch.einsum("btj,btjc->btc", a, x))
    return torch.einsum("btij,btjc->btic", M, x) + w[..., None] * v[:, :, None]


def plain_read_ahead(hc, x, u, branch):
    """x'_i = sum_j M_ij x_j + w_i F(u), u' = sum_i a_i x'_i, with coefficients that see u."""
    a, w, M = plain_coefficients(hc, u[:, :, None])
    new = torch.einsum("btij,btjc->btic", M, x) + w[..., None] * branch(u)[:, :, None]
    return new, torch.einsum("bti,btic->btc", a, new)


def noisy(module, seed=0):
    """The module in float64, its parameters away from their start."""
    torch.manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
    return module


def assert_same_with_gradients(mine, plain, leaves):
    """Two tensors and their gradients for the leaves, in float64."""
    weight = torch.randn_like(plain)
    torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-10)
    gradients = [torch.autograd.grad((t * weight).sum(), leaves) for t in (mine, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


CASES = [
    *[(name, {}) for name in MIXING],
    ("tbp", {"gates": "free"}),
    ("tbp", {"gates": "exp"}),
    ("hc", {"gates": "exp"}),
    ("hc", {"gates": "bounded"}),
    ("identity", {"gates": "free"}),
    ("tbp", {"mix_scale": "sublayer"}),
    ("tbp", {"mix_scale": "stream"}),
    ("hc", {"mix_scale": "stream"}),
    ("identity", {"mix_scale": "stream"}),
]


@pytest.mark.quick
@pytest.mark.parametrize("name, knobs", CASES)
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("n", [2, 4, 6])
def test_hyper_connection_and_its_gradients_are_the_plain_formulas(name, knobs, dynamic, n):
    hc = noisy(HyperConnection(name, n, 6, dynamic=dynamic, mix_start=0.3, **knobs))
    branch = noisy(torch.nn.Linear(6, 6))
    x = torch.randn(2, 3, n, 6, dtype=torch.float64, requires_grad=True)
    new = hc(Streams(x, mean_square(x)), branch)
    if dynamic:
        torch.testing.assert_close(new.mean_square, (new.x**2).mean((-2, -1)))
    plain = plain_hyper_connection(hc, x, branch)
    assert_same_with_gradients(new.x, plain, [x, *hc.parameters(), *branch.parameters()])


@pytest.mark.quick
@pytest.mark.parametrize("name, knobs", CASES)
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("n", [2, 4, 6])
def test_reading_ahead_and_its_gradients_are_the_plain_formulas(name, knobs, dynamic, n):
    hc = noisy(HyperConnection(name, n, 6, dynamic=dynamic, mix_start=0.3, sees="input", **knobs))
    branch = noisy(torch.nn.Linear(6, 6))
    x = torch.randn(2, 3, n, 6, dtype=torch.float64, requires_grad=True)
    u = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    new = hc(Streams(x, mean_square(u), u), branch)
    torch.testing.assert_close(hc(Streams(x, None, u), branch).x, new.x)
    plain_x, plain_u = plain_read_ahead(hc, x, u, branch)
    if dynamic:
        torch.testing.assert_close(new.mean_square, plain_u.square().mean(-1))
    mine, plain = (
        torch.cat([x_, u_[:, :, None]], 2) for x_, u_ in ((new.x, new.input), (plain_x, plain_u))
    )
    assert_same_with_gradients(mine, plain, [x, u, *hc.parameters(), *branch.parameters()])


@pytest.mark.quick
@pytest.mark.parametrize("last", [True, False])
def test_reading_ahead_starts_at_the_next_sublayer_s_read(last):
    """Sublayer l hands on a read of stream (l + 1) % n, the last sublayer the mean."""
    streams = start_streams(torch.randn(1, 1, 6), 3, sees="input")
    hc = HyperConnection("tbp", 3, 6, sublayer=4, read_start=0.6, sees="input", last=last)
    expected = torch.full((3,), 1 / 3) if last else torch.tensor([0.2, 0.2, 0.6])
    torch.testing.assert_close(hc.observe(streams)[0][0, 0], expected)


@pytest.mark.quick
@pytest.mark.parametrize("dynamic", [True, False])
def test_read_out_and_its_gradients_are_the_plain_formulas(dynamic):
    read_out = noisy(ReadOut(3, 6, dynamic=dynamic))
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    (r,) = plain_logits(read_out, x)
    plain = torch.einsum("btj,btjc->btc", r.sigmoid(), x)
    out = read_out(Streams(x, mean_square(x)))
    assert_same_with_gradients(out, plain, [x, *read_out.parameters()])


@pytest.mark.quick
def test_read_out_starts_as_the_mean():
    x = torch.randn(2, 5, 4, 6)
    out = ReadOut(4, 6)(Streams(x, mean_square(x)))
    torch.testing.assert_close(out, x.mean(2))


@pytest.mark.quick
@pytest.mark.parametrize("name, knobs", CASES)
@pytest.mark.parametrize("dynamic", [True, False])
def test_starts_as_x_plus_branch_on_equal_streams(name, knobs, dynamic):
    hc, branch = HyperConnection(name, 4, 6, dynamic=dynamic, **knobs), torch.nn.Linear(6, 6)
    x = torch.randn(2, 3, 6)
    new = hc(start_streams(x, 4), branch).x
    expected = (x + branch(x))[:, :, None].expand(2, 3, 4, 6)
    torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_every_layer_reads_another_stream_most():
    """Layer l reads stream l % n with weight read_start, and the others share the rest."""
    streams = start_streams(torch.randn(1, 1, 6), 3)
    for layer in range(7):
        hc = HyperConnection("tbp", 3, 6, sublayer=layer, read_start=0.6)
        read, write, _ = hc.observe(streams)
        expected = torch.full((3,), 0.2)
        expected[layer % 3] = 0.6
        torch.testing.assert_close(read[0, 0], expected)
        torch.testing.assert_close(write[0, 0], torch.ones(3))


@pytest.mark.quick
def test_residual_adds_the_branch():
    x, branch = torch.randn(2, 3, 6), torch.nn.Linear(6, 6)
    streams = start_streams(x, 1)
    torch.testing.assert_close(Residual()(streams, branch).x[:, :, 0], x + branch(x))


@pytest.mark.quick
@pytest.mark.parametrize("dynamic", [True, False])
def test_scaled_residual_and_its_gradients_are_the_plain_formulas(dynamic):
    module = noisy(ScaledResidual(6, dynamic=dynamic))
    branch = noisy(torch.nn.Linear(6, 6))
    x = torch.randn(2, 3, 1, 6, dtype=torch.float64, requires_grad=True)
    scale = plain_logits(module, x)[0].exp()  # (B, T, 1)
    plain = scale * x[:, :, 0] + branch(x[:, :, 0])
    mine = module(Streams(x, None), branch).x[:, :, 0]
    assert_same_with_gradients(mine, plain, [x, *module.parameters(), *branch.parameters()])
    observed = module.observe(Streams(x.detach(), None))
    torch.testing.assert_close(observed[2][..., 0].double(), scale.detach())


@pytest.mark.quick
@pytest.mark.quick
@pytest.mark.parametrize("n, kind", [(4, list), (5, torch.Tensor)])
def test_up_to_four_streams_have_planes_and_more_have_tensors(n, kind):
    hc = HyperConnection("tbp", n, 8)
    parts = hc.coefficients(start_streams(torch.randn(2, 3, 8), n))
    assert len(parts) == 3 and all(isinstance(part, kind) for part in parts)


@pytest.mark.parametrize("first", ["static", "residual"])
def test_a_dynamic_sublayer_may_follow_any_other(first):
    """It takes the mean square of its own streams, never an older one."""
    x, branch = torch.randn(2, 3, 6), torch.nn.Linear(6, 6)
    before = Residual() if first == "residual" else HyperConnection("tbp", 4, 6, dynamic=False)
    streams = start_streams(x, 4)
    if first == "residual":
        streams = Streams(*Residual()(start_streams(x, 1), branch)[:2])
        streams = streams._replace(x=streams.x.repeat(1, 1, 4, 1))
    else:
        streams = before(streams, branch)
    dynamic = noisy(HyperConnection("tbp", 4, 6)).float()
    expected = dynamic(streams._replace(mean_square=mean_square(streams.x)), branch).x
    torch.testing.assert_close(dynamic(streams, branch).x, expected)


@pytest.mark.quick
def test_learned_offsets_are_added_to_the_copies():
    x, offsets = torch.randn(2, 3, 6), torch.randn(4, 6)
    streams = start_streams(x, 4, offsets)
    for j in range(4):
        torch.testing.assert_close(streams.x[:, :, j], x + offsets[j])


@pytest.mark.quick
@pytest.mark.parametrize("sees", SEES)
def test_the_first_input_is_the_mean_of_the_streams(sees):
    x, offsets = torch.randn(2, 3, 6), torch.randn(4, 6)
    streams = start_streams(x, 4, offsets, sees)
    if sees == "streams":
        assert streams.input is None
    else:
        torch.testing.assert_close(streams.input, x + offsets.mean(0))


@pytest.mark.quick
def test_scaled_rows():
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    logits = [torch.tensor(0.0), torch.tensor(math.log(3.0))]
    M = [[one, two], [two, one]]
    assert torch.allclose(torch.tensor(scale_rows(M, logits, 2)), torch.tensor([[1.0, 2], [6, 3]]))
    assert torch.allclose(
        torch.tensor(scale_rows(M, logits[1:], 2)), torch.tensor([[3.0, 6], [6, 3]])
    )
    assert torch.allclose(torch.tensor(scale_rows([], logits, 2)), torch.tensor([[1.0, 0], [0, 3]]))
    assert scale_rows(M, [], 2) is M


@pytest.mark.parametrize("dynamic", [True, False])
def test_gradients_are_those_of_the_parameters_that_the_forward_had(dynamic):
    """The backward computes the coefficients again. By then torch.func.functional_call has put the
    module's own parameters back."""
    torch.manual_seed(0)
    hc = HyperConnection("tbp", 3, 6, dynamic=dynamic).double()
    branch = torch.nn.Linear(6, 6).double()
    x = torch.randn(2, 3, 3, 6, dtype=torch.float64)
    streams, other = Streams(x, mean_square(x)), {}
    for name, p in hc.named_parameters():
        other[name] = (p + 0.3 * torch.randn_like(p)).detach().requires_grad_()
    new = torch.func.functional_call(hc, other, (streams, branch)).x
    gradients = torch.autograd.grad(new.square().sum(), other.values())
    with torch.no_grad():
        for name, p in hc.named_parameters():
            p.copy_(other[name])
    expected = torch.autograd.grad(hc(streams, branch).x.square().sum(), hc.parameters())
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("name, n", [*((name, 4) for name in MIXING), ("tbp", 8), ("rtbp", 8)])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_coefficients_are_float32_in_a_bfloat16_model(name, n, dynamic, autocast):
    hc = HyperConnection(name, n, 8, dynamic=dynamic).bfloat16()
    torch.manual_seed(0)
    hc.bias.data.normal_()
    x = torch.randn(1, 3, n, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        coefficients = hc.observe(Streams(x, mean_square(x)))
    assert {t.dtype for t in coefficients} == {torch.float32}
    assert not MIXERS[name].exact or ds_error(coefficients[2]).max() < 1e-6


@pytest.mark.quick
@pytest.mark.parametrize("knobs", [{}, {"mix_scale": "stream"}, {"sees": "input"}])
@pytest.mark.parametrize("mixer", ["residual", "identity", "tbp"])
@pytest.mark.parametrize("n", [4, 6])
def test_streams_in_bfloat16_stay_so(mixer, knobs, n):
    """And what is seen of them. Only the mean square is float32."""
    if mixer == "residual":
        n, connection = 1, ScaledResidual(8) if "mix_scale" in knobs else Residual()
        knobs = {}
    else:
        connection = HyperConnection(mixer, n, 8, **knobs)
    streams = start_streams(torch.randn(2, 3, 8).bfloat16(), n, sees=knobs.get("sees", "streams"))
    with torch.autocast("cpu", torch.bfloat16):
        new = connection(streams, torch.nn.Linear(8, 8))
    for field in ("x", "input") if "sees" in knobs else ("x",):
        assert getattr(streams, field).dtype == getattr(new, field).dtype == torch.bfloat16, field
    assert new.mean_square is None or new.mean_square.dtype == torch.float32


@pytest.mark.quick
def test_the_mean_of_streams_in_bfloat16_is_summed_in_float32():
    """Of 1/4, 64 and -64: a sum in bfloat16 forgets the quarter."""
    offsets = torch.tensor([[1.0], [256.0], [-256.0], [1.0]]).expand(4, 6)
    streams = start_streams(torch.zeros(1, 1, 6).bfloat16(), 4, offsets, "input")
    assert (streams.input == 0.5).all()


@pytest.mark.quick
@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: HyperConnection("tbp", 4, 8, read_start=1.0), "read_start must lie between"),
        (lambda: HyperConnection("tbp", 4, 8, mix_start=0.0), "between 0 and 1, not 0.0"),
        (lambda: HyperConnection("tbp", 4, 8, sinkhorn_rounds=3), "no option 'sinkhorn_rounds'"),
        (lambda: HyperConnection("tbp", 4, 8, gates="open"), "not 'open'"),
        (lambda: HyperConnection("residual", 1, 8), "use streams.Residual"),
        (lambda: HyperConnection("tbp", 4, 8, mix_scale="token"), "not 'token'"),
        (lambda: HyperConnection("tbp", 4, 8, sees="mean"), "of streams, input, not 'mean'"),
        (lambda: HyperConnection("tbp", 4, 8, alpha_start=0.0), "alpha_start must be above 0"),
        (
            lambda: HyperConnection("tbp", 2, 8, sees="input")(
                start_streams(torch.ones(1, 1, 8), 2), torch.nn.Identity()
            ),
            "begin with start_streams(..., sees='input')",
        ),
        (lambda: start_streams(torch.ones(3, 8), 2), "must have the shape (B, T, C), not (3, 8)"),
        (
            lambda: HyperConnection("tbp", 2, 8)(torch.ones(1, 1, 8), torch.nn.Identity()),
            "Streams are needed, not a Tensor: start_streams(x, n_streams=2)",
        ),
        (
            lambda: HyperConnection("tbp", 3, 8)(start_streams(torch.ones(1, 1, 8), 2), None),
            "of the shape (B, T, 3, 8), not (1, 1, 2, 8)",
        ),
        *(
            (
                lambda module=module, n=n: module(
                    start_streams(torch.ones(1, 2, 8), n, sees="input"), lambda u: (u, None)
                ),
                "a branch must return a tensor of its input's shape, not a tuple",
            )
            for module, n in (
                (Residual(), 1),
                (ScaledResidual(8), 1),
                (HyperConnection("tbp", 2, 8), 2),
                (HyperConnection("tbp", 2, 8, sees="input"), 2),
                (HyperConnection("tbp", 5, 8), 5),
            )
        ),
        (
            lambda: Residual()(start_streams(torch.ones(1, 2, 8), 1), lambda u: u.mean(1)),
            "not (1, 8)",
        ),
    ],
)
def test_refusals_name_the_value(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)


def test_a_new_mixer_is_a_function_and_an_entry(monkeypatch):
    def shrink(planes, n):
        s = planes[0].sigmoid()
        return [[s * (i == j) + (1 - s) / n for j in range(n)] for i in range(n)]

    entry = Mixer(
        n_logits=lambda n: 1, map=shrink, start=lambda n, eps: torch.tensor([1 - eps]).logit()
    )
    monkeypatch.setitem(MIXERS, "shrink", entry)
    hc = HyperConnection("shrink", 3, 8, dynamic=False, mix_start=0.05)
    M = hc.observe(start_streams(torch.zeros(1, 1, 8), 3))[2]
    assert torch.allclose(M, 0.95 * torch.eye(3) + 0.05 / 3)


@pytest.mark.quick
def test_a_scale_times_an_exact_matrix_is_that_matrix_with_other_writes():
    """x' = s M x + w v divided by the product S of all s so far is x' = M x + (w / S) v, whose
    composite gain is 1. Coefficients and branches see no factor of the streams, so both chains
    compute the same, and what s can do, an exact mixer with free writes can do."""
    torch.manual_seed(0)
    chain = [HyperConnection("tbp", 3, 6, sublayer=i, mix_scale="sublayer") for i in range(4)]
    chain = [noisy(hc, seed=i) for i, hc in enumerate(chain)]
    weight = torch.randn(6, 6, dtype=torch.float64)

    def branch(u):
        return F.layer_norm(u, (6,), eps=0) @ weight

    x = 100 * torch.randn(2, 5, 3, 6, dtype=torch.float64)  # the 1e-6 in RMSNorm is nothing here
    scaled, exact, S = Streams(x, None), x, 1.0
    for hc in chain:
        a, w, M = plain_coefficients(hc, exact)
        s = M.sum(-1)[..., :1]  # (B, T, 1), since the rows of the exact matrix sum to 1
        S = S * s
        v = branch(torch.einsum("btj,btjc->btc", a, exact))
        exact = torch.einsum("btij,btjc->btic", M / s[..., None], exact)
        exact = exact + (w / S)[..., None] * v[:, :, None]
        scaled = hc(scaled, branch)
    assert S.min() < 0.7 and S.max() > 1.5
    torch.testing.assert_close(scaled.x, S[..., None] * exact, rtol=1e-8, atol=1e-8)


@pytest.mark.quick
def test_streams_that_change_places_are_identity_with_other_labels():
    """Where every M is a permutation, the streams only change places. With M = I the model computes
    the same, if its weights count the streams by the places that they had at the start."""
    torch.manual_seed(0)
    n, C = 4, 6
    weight = torch.randn(C, C, dtype=torch.float64)

    def branch(u):
        return u.tanh() @ weight

    x = torch.randn(2, 5, n, C, dtype=torch.float64)
    moving = staying = Streams(x, None)
    first = torch.arange(n)  # the first place of the stream that is at place i
    for sublayer in range(5):
        order = torch.randperm(n)  # M brings stream order[i] to place i
        mover = noisy(HyperConnection("hc", n, C, gates="bounded"), seed=sublayer)
        stayer = HyperConnection("identity", n, C).double()
        after = first[order]
        with torch.no_grad():
            mover.phi[2 * n :] = 0
            mover.bias[2 * n :] = torch.eye(n)[order].flatten()
            stayer.alpha.copy_(mover.alpha)
            read, write = mover.phi[: 2 * n].view(2, n, n, C)
            phi = stayer.phi.view(2, n, n, C)
            phi[0, first[:, None], first], phi[1, after[:, None], first] = read, write
            stayer.bias[first], stayer.bias[n + after] = mover.bias[:n], mover.bias[n : 2 * n]
        moving, staying, first = mover(moving, branch), stayer(staying, branch), after
        torch.testing.assert_close(moving.x, staying.x[:, :, first])
    assert not torch.equal(first, torch.arange(n))
