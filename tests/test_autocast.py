"""Streams in bfloat16: the mixing as they meet it, read off from what goes into every sublayer and
what comes out; and a sublayer's results and gradients against those in float64."""

import pytest
import torch

from mixers import MIXERS, composite_gain
from model import GPT, GPTConfig
from passes import mean_square
from stacked_passes import ReadStacked
from streams import HyperConnection, Streams

LAYERS, CHANNELS, TOKENS = 24, 512, 16  # 48 sublayers


@torch.no_grad()
def mixing_only(mixer, n):
    """A GPT whose branches write nothing, so that a sublayer is its mixing alone. The logits differ
    by token and layer."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=TOKENS,
            vocab_size=64,
            n_layer=LAYERS,
            n_head=2,
            n_embd=CHANNELS,
            bias=False,
            mixer=mixer,
            n_streams=n,
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            parameter.zero_()
    for module in model.modules():
        if isinstance(module, HyperConnection):
            move_from_start(module)
    return model


@torch.no_grad()
def move_from_start(connection):
    """Parameters with which every token has other coefficients."""
    connection.bias.normal_()
    if connection.dynamic:
        connection.phi.normal_(0, connection.phi.shape[1] ** -0.5)
        connection.alpha.fill_(1)


def applied(before, after):
    """The matrices (T, n, n) that lead from streams (T, n, C) to streams.

    Each value that is stored in bfloat16 is off by up to 2^-9 of itself. Least squares average that
    away over the channels, but not an error of the matrix."""
    return torch.linalg.lstsq(before.double().mT, after.double().mT).solution.mT


def off(M, dim):
    return (M.sum(dim) - 1).abs()


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer, n",
    [
        *((m, 4) for m in MIXERS if MIXERS[m].doubly_stochastic and not MIXERS[m].one_stream),
        ("tbp", 8),
    ],
)
def test_sums_hold_in_bfloat16_and_do_not_drift_over_48_sublayers(mixer, n, report):
    model, matrices = mixing_only(mixer, n), []

    def unequal(module, inputs):  # mixed streams grow alike, and would tell nothing
        streams, branch = inputs
        fresh = torch.randn(streams.x.shape).to(streams.x.dtype)
        return Streams(fresh, mean_square(fresh)), branch

    def read_off(module, inputs, output):
        before, after = inputs[0].x, output.x
        assert before.dtype == after.dtype == torch.bfloat16
        matrices.append(applied(before[0], after[0]))  # (T, n, n)

    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.register_forward_pre_hook(unequal)
            module.register_forward_hook(read_off)
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        gain = composite_gain(model.mixing_matrices(tokens))
        matrices.clear()
        model(tokens)
    assert len(matrices) == 2 * LAYERS
    exact = MIXERS[mixer].exact
    worst = max(off(M, dim).max().item() for M in matrices for dim in (-1, -2)[: 1 + exact])
    composite = torch.eye(n).double()
    for M in matrices:
        composite = M @ composite
    rows, columns = (off(composite, dim).mean().item() for dim in (-1, -2))
    report(
        f"{mixer}, {n} streams in bfloat16: the worst sum of a matrix as applied is off by "
        f"{worst:.1e}, those of the product of 48 by {rows:.1e} (rows), {columns:.1e} (columns); "
        f"in float32 its gain is off by {gain - 1:.1e}"
    )
    assert worst < 1e-3 and rows < 1e-3
    assert not exact or columns < 1e-3 and gain - 1 < 1e-5


def results(mixer, n, dynamic, sees, dtype):
    """What a sublayer writes, then the gradients of what it reads, of phi and of bias; from the
    same values of bfloat16, computed in float64 or in bfloat16 under autocast."""
    torch.manual_seed(0)
    connection = HyperConnection(mixer, n, 96, dynamic=dynamic, sees=sees)
    move_from_start(connection)
    if dtype == torch.float64:
        connection = connection.double()

    def values(*shape):
        return torch.randn(2, 32, *shape, 96).bfloat16().to(dtype)

    given = [values(n), values()] if sees == "input" else [values(n)]  # x, and what is read
    gradients = [values(n), values()]
    for tensor in given:
        tensor.requires_grad_()
    streams = Streams(given[0], mean_square(given[-1]), *given[1:])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        new = connection(streams, lambda u: u.roll(1, -1))  # a branch that rounds nothing
    written = [new.x, new.input][: len(given)]
    leaves = [*given, connection.bias, *([connection.phi] if dynamic else [])]
    return *written, *torch.autograd.grad(written, leaves, gradients[: len(written)])


def relative_errors(mixer, n, dynamic, sees):
    exact, rounded = (
        results(mixer, n, dynamic, sees, dtype) for dtype in (torch.float64, torch.bfloat16)
    )
    return torch.stack([(a - b).norm() / b.norm() for a, b in zip(rounded, exact)])


@pytest.mark.quick
@pytest.mark.parametrize(
    "mixer, dynamic, sees",
    [
        *((m, True, sees) for m in ("identity", "hc") for sees in ("streams", "input")),
        *((m, False, sees) for m in ("identity", "tbp") for sees in ("streams", "input")),
    ],
)
def test_eight_streams_are_as_near_to_float64_as_four(mixer, dynamic, sees):
    """In bfloat16. An error is the norm of the difference, of the exact result's norm. The mixers
    are smooth: where a token's tbp has a kink, a rounded logit can lie on the other side."""
    four, eight = (relative_errors(mixer, n, dynamic, sees) for n in (4, 8))
    assert (eight < 1.3 * four + 1e-3).all(), (four, eight)


@pytest.mark.quick
def test_eight_streams_are_read_with_float32_weights():
    """Two streams that are opposite, with weights that bfloat16 cannot tell apart."""
    x = torch.zeros(1, 1, 8, 4, dtype=torch.bfloat16)
    x[..., 0, :], x[..., 1, :] = 1, -1
    a = torch.full((1, 1, 8), 0.5)
    a[..., 0] += 2**-12
    assert torch.equal(ReadStacked.apply(x, a), torch.full_like(x[..., 0, :], 2**-12))
