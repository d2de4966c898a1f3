"""How the streams and their coefficients lie in memory where there are many of them."""

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_fw_bw_and_get_code

import charts
from compile_options import compiler_options
from mixers import MIXERS, mixing_matrix
from stacked import planes_first, tokens_first
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
    torch.library.opcheck(charts.tbp_by_rows, (logits, n, compiled))
    torch.library.opcheck(charts.rtbp_stacked, (logits, n))

    M, columns = charts.tbp_by_rows(logits, n, compiled)
    assert M.requires_grad and not columns.requires_grad
    logits, grad = logits.detach(), torch.randn(n, n, tokens)
    arguments = logits, columns, grad, compiled
    torch.library.opcheck(charts.tbp_by_rows_backward, arguments, test_utils="test_faketensor")


def graphs_compiled():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.quick
def test_a_row_has_a_kernel_for_each_shape():
    """With one for all later shapes, a resumed run could use another kernel than the first run."""
    torch.compiler.reset()
    step, before = charts.row_step(charts.row_forward, 5, True), graphs_compiled()
    for tokens in (3, 4, 5, 3):
        step(torch.randn(4, tokens), torch.ones(5, tokens))
    assert graphs_compiled() - before == 3


@torch._inductor.config.patch(force_disable_caches=True)  # they do not notice changes in charts.py
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, graphs", [("tbp", (3, 4, 5)), ("rtbp", (1,))])
def test_a_compiled_chart_and_its_gradient(name, graphs, kind):
    """For tbp three graphs are compiled: the caller's, a row's, and that of a row's gradient. The
    latter two may be compiled twice: PyTorch has other dispatch keys in the first step."""
    torch.manual_seed(0)
    torch.compiler.reset()
    charts.row_step.cache_clear()
    n, before = 7, graphs_compiled()
    logits = torch.randn(2, 3, (n - 1) ** 2, dtype=kind, requires_grad=True)
    weight = torch.randn(2, 3, n, n, dtype=kind)
    compiled = torch.compile(mixing_matrix, fullgraph=True)
    for _ in range(3):
        M = compiled(name, logits, n)
        (grad,) = torch.autograd.grad((M * weight).sum(), logits)
    assert graphs_compiled() - before in graphs
    assert charts.row_step.cache_info().currsize == (2 if name == "tbp" else 0)

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
