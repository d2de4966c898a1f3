"""How the streams and their coefficients lie in memory where there are many of them."""

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_fw_bw_and_get_code

import stacked_charts
from compile_options import compiler_options
from mixers import MIXERS, mixing_matrix
from stacked_charts import kernel_of, row_forward, rtbp_by_sizes, step, tbp_by_rows
from stacked_passes import planes_first, tokens_first
from streams import HyperConnection, ReadOut, start_streams

CHANNELS = 24


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(7, 2, 3), (1, 2, 3), (7, 1, 1), (7, 0, 3)])
def test_planes_become_tokens_and_back(shape):
    planes = torch.arange(float(torch.Size(shape).numel())).view(shape).requires_grad_()
    values = tokens_first(planes)
    assert values.shape == (*shape[1:], shape[0]) and values.is_contiguous()
    assert torch.equal(values, planes.permute(1, 2, 0))
    assert torch.equal(planes_first(values), planes) and planes_first(values).is_contiguous()
    torch.library.opcheck(tokens_first, (planes,))
    torch.library.opcheck(planes_first, (planes.detach(),))
    values.backward(weight := torch.randn(values.shape))
    assert torch.equal(planes.grad, weight.permute(2, 0, 1))


@pytest.mark.quick
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("n, tokens", [(5, 3), (6, 1)])
def test_charts_are_operations_as_torch_wants_them(n, tokens, compiled):
    """Of logits in another order in memory, too: the compiler is told how the results lie."""
    torch.compiler.reset()
    logits = torch.randn(tokens, (n - 1) ** 2).t().requires_grad_()
    torch.library.opcheck(tbp_by_rows, (logits, n, compiled))
    torch.library.opcheck(rtbp_by_sizes, (logits, n, compiled))

    M, columns = tbp_by_rows(logits, n, compiled)
    assert M.requires_grad and not columns.requires_grad
    # opcheck cannot follow torch.func.vjp, so the gradients are compared with their fakes here.
    logits, grad = logits.detach(), torch.randn(n, n, tokens)
    for backward, *arguments in (
        (stacked_charts.tbp_by_rows_backward, logits, columns, grad, compiled),
        (stacked_charts.rtbp_by_sizes_backward, logits, grad, compiled),
    ):
        found, told = backward(*arguments), stacked_charts.like_logits(*arguments)
        assert found.shape == told.shape and found.stride() == told.stride()


def graphs_compiled():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.quick
def test_a_row_has_a_kernel_for_each_shape():
    """With one for all later shapes, a resumed run could use another kernel than the first run.
    More than 8 are fine, although Dynamo compiles the same code no more often."""
    torch.compiler.reset()
    kernel_of.cache_clear()
    before = graphs_compiled()
    for tokens in (*range(3, 13), 3):
        logits, c = torch.randn(4, tokens), torch.rand(5, tokens)
        for got, wanted in zip(step(row_forward, True, logits, c), row_forward(logits, c)):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert graphs_compiled() - before == 10


@torch._inductor.config.patch(force_disable_caches=True)  # they do not notice changed code
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, steps", [("tbp", 1), ("rtbp", 4)])
def test_a_compiled_chart_and_its_gradient(name, steps, kind):
    """A graph is compiled for the caller, and one for each step of a chart and for its gradient:
    for a row of tbp, and for blocks of 7, 6, 3 and 2 of rtbp. The latter may be compiled twice:
    PyTorch has other dispatch keys in the first step."""
    torch.manual_seed(0)
    torch.compiler.reset()
    kernel_of.cache_clear()
    n, before = 7, graphs_compiled()
    logits = torch.randn(2, 3, (n - 1) ** 2, dtype=kind, requires_grad=True)
    weight = torch.randn(2, 3, n, n, dtype=kind)
    compiled = torch.compile(mixing_matrix, fullgraph=True)
    for _ in range(3):
        M = compiled(name, logits, n)
        (grad,) = torch.autograd.grad((M * weight).sum(), logits)
    assert 1 + 2 * steps <= graphs_compiled() - before <= 1 + 4 * steps
    assert kernel_of.cache_info().currsize == 2 * steps

    exact = logits.detach().double().requires_grad_()
    planes = MIXERS[name].map(exact.unbind(-1), n)
    wanted = torch.stack([torch.stack(row, -1) for row in planes], -2)
    (wanted_grad,) = torch.autograd.grad((wanted * weight).sum(), exact)
    tolerance = {"rtol": 0, "atol": 1e-6 if kind == torch.float32 else 1e-14}
    torch.testing.assert_close(M.double(), wanted, **tolerance)
    torch.testing.assert_close(grad.double(), wanted_grad, **tolerance)


class Chain(nn.Module):
    """Two connections with a norm and a linear branch, and a read-out."""

    def __init__(self, mixer, n, sees):
        super().__init__()
        knobs = {"n_streams": n, "n_embd": CHANNELS, "sees": sees}
        self.connections = nn.ModuleList(
            HyperConnection(mixer, sublayer=i, **knobs) for i in range(2)
        )
        self.branch = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS))
        self.read_out = ReadOut(n, CHANNELS)
        self.n, self.sees = n, sees

    def forward(self, x):
        streams = start_streams(x, self.n, sees=self.sees)
        for connection in self.connections:
            streams = connection(streams, self.branch)
        # The read-out sees the streams, and mean_square is that of what the connections see.
        return self.read_out(streams._replace(mean_square=None)).sum()


@pytest.mark.long
@pytest.mark.parametrize("sees", ["streams", "input"])
@pytest.mark.parametrize("mixer", ["tbp", "hc", "identity"])
def test_a_token_s_streams_lie_side_by_side_in_compiled_code(mixer, sees):
    """If they did not, a pass over the streams would go through all tokens n times. The strides of
    each buffer that holds all streams are read in the code that the compiler generates."""
    torch.manual_seed(0)
    n, B, T = 6, 2, 5
    chain = Chain(mixer, n, sees)
    chain.compile(fullgraph=True, dynamic=False, options=compiler_options(n))
    _, codes = run_fw_bw_and_get_code(lambda: chain(torch.randn(B, T, CHANNELS)))
    numbers = r"\(([\d, ]+)\)"
    found = re.findall(rf"empty_strided_cpu\({numbers}, {numbers}", "\n".join(codes))
    strides = [stride for size, stride in found if as_ints(size) == [B, T, n, CHANNELS]]
    expected = [T * n * CHANNELS, n * CHANNELS, CHANNELS, 1]
    assert strides and all(as_ints(stride) == expected for stride in strides)


def as_ints(text):
    return [int(number) for number in text.split(",") if number.strip()]
