"""The mixing as the streams meet it in a bfloat16 run, read off from what goes into every sublayer
and what comes out."""

import pytest
import torch

from mixers import MIXERS, composite_gain
from model import GPT, GPTConfig
from passes import mean_square
from streams import HyperConnection, Streams

LAYERS, STREAMS, CHANNELS, TOKENS = 24, 4, 512, 16  # 48 sublayers


@torch.no_grad()
def mixing_only(mixer):
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
            n_streams=STREAMS,
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            parameter.zero_()
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.bias.normal_()
            module.phi.normal_(0, (STREAMS * CHANNELS) ** -0.5)
            module.alpha.fill_(1)
    return model


def applied(before, after):
    """The matrices (T, n, n) that lead from streams (T, n, C) to streams.

    Each value that is stored in bfloat16 is off by up to 2^-9 of itself. Least squares average that
    away over the channels, but not an error of the matrix."""
    return torch.linalg.lstsq(before.double().mT, after.double().mT).solution.mT


def off(M, dim):
    return (M.sum(dim) - 1).abs()


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer", [m for m in MIXERS if MIXERS[m].doubly_stochastic and not MIXERS[m].one_stream]
)
def test_sums_hold_in_bfloat16_and_do_not_drift_over_48_sublayers(mixer, report):
    model, matrices = mixing_only(mixer), []

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
    composite = torch.eye(STREAMS).double()
    for M in matrices:
        composite = M @ composite
    rows, columns = (off(composite, dim).mean().item() for dim in (-1, -2))
    report(
        f"{mixer} in bfloat16: the worst sum of a matrix as applied is off by {worst:.1e}, those "
        f"of the product of 48 by {rows:.1e} (rows), {columns:.1e} (columns); in float32 its gain "
        f"is off by {gain - 1:.1e}"
    )
    assert worst < 1e-3 and rows < 1e-3
    assert not exact or columns < 1e-3 and gain - 1 < 1e-5
