"""Whether this torch compiles the model right: `make test-torch TORCH=2.11.0` runs these tests.

Torch 2.11 loses the gradient of an autograd.Function's output, in compiled code and without a word,
if the output comes from an operation that changed nothing and returned its own input, such as
`.to()` of a tensor's own dtype. The first test finds such outputs with any torch. The others
compare the compiled model with the eager one, and take minutes.
"""

import re

import pytest
import torch
from conftest import ROOT
from torch.overrides import TorchFunctionMode

from compile_options import compiler_options
from compiler import TESTED_TORCH
from mixers import MIXERS
from model import GPT, GPTConfig
from passes import mean_square
from streams import Streams

SIZES = {"block_size": 8, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 16}
READ_AHEAD = {"sees": "input", "readout": "learned"}
CASES = [
    *((mixer, {}, dynamic) for mixer in MIXERS for dynamic in (True, False)),
    *((mixer, READ_AHEAD, dynamic) for mixer in ("identity", "tbp") for dynamic in (True, False)),
]
# Those of this project, in whichever of its files.
FUNCTIONS = [
    function
    for function in torch.autograd.Function.__subclasses__()
    if (ROOT / f"{function.__module__}.py").exists()
]


def build(mixer, n, dynamic, knobs):
    """A model whose parameters are away from their start, the same at each call."""
    torch.manual_seed(0)
    options = {}
    if "sinkhorn_rounds" in MIXERS[mixer].options:
        options["sinkhorn_rounds"] = 3  # fewer are compiled sooner
    config = GPTConfig(
        **SIZES,
        mixer=mixer,
        n_streams=1 if MIXERS[mixer].one_stream else n,
        dynamic=dynamic,
        options=options,
        **knobs,
    )
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def loss_and_gradients(model, bfloat16):
    tokens = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(compiled, eager, tolerance):
    """Losses, and each parameter's gradient, whose error is relative to the gradient's norm."""
    torch.testing.assert_close(compiled[0], eager[0], rtol=tolerance, atol=0)
    for name, expected in eager[1].items():
        error = relative_error(name, compiled[1], expected)
        assert error < tolerance, f"{name}: gradient off by {error:.2g} of its norm"


def assert_as_exact(compiled, eager, exact):
    """In bfloat16, compiled code is about as near to the `exact` results, of float32, as eager code
    is. The gradient of alpha, three sums over all tokens, may be off by a third in both."""
    torch.testing.assert_close(compiled[0], exact[0], rtol=0.02, atol=0)
    for name, expected in exact[1].items():
        error, by_eager = (relative_error(name, run[1], expected) for run in (compiled, eager))
        assert error < 0.15 + 2 * by_eager, f"{name}: gradient off by {error:.2g}, eager {by_eager}"


def relative_error(name, gradients, expected):
    assert gradients[name] is not None, f"{name} got no gradient"
    return (gradients[name] - expected).norm() / expected.norm().clamp(min=1e-6)


class ReturnsItsInput(TorchFunctionMode):
    """Notes each tensor that an operation returned as it had been given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and any(result is arg for arg in args):
            self.seen.append(result)
        return result


def refuse_unchanged_outputs(monkeypatch, function):
    """Make `function`.forward fail if an output is what an operation returned as it was given."""
    forward = function.forward

    def checked(*args):
        with ReturnsItsInput() as unchanged:
            outputs = forward(*args)
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            found = any(output is tensor for tensor in unchanged.seen)
            assert not found, f"{function.__name__} returns what an operation left unchanged"
        return outputs

    monkeypatch.setattr(function, "forward", staticmethod(checked))


@pytest.mark.quick
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize("mixer, knobs, dynamic", CASES, ids=str)
def test_no_function_returns_what_an_operation_left_unchanged(
    mixer, knobs, n, dynamic, bfloat16, monkeypatch
):
    """6 streams have Functions of their own."""
    for function in FUNCTIONS:
        refuse_unchanged_outputs(monkeypatch, function)
    n = 1 if MIXERS[mixer].one_stream else n
    loss_and_gradients(build(mixer, n, dynamic, knobs), bfloat16)


@pytest.mark.quick
def test_every_function_is_looked_at():
    text = "".join(path.read_text() for path in ROOT.glob("*.py"))
    named = re.findall(r"^class (\w+)\(torch\.autograd\.Function\):", text, re.MULTILINE)
    assert sorted(function.__name__ for function in FUNCTIONS) == sorted(named)


@pytest.mark.quick
def test_this_torch_knows_the_compiler_s_options():
    """One whose name it does not know is left out, without a word, and kernels are others."""
    known = {
        "unroll_reductions_threshold",
        "max_fusion_size",
        "cpp.max_horizontal_fusion_size",
        "max_pointwise_cat_inputs",
        "realize_acc_reads_threshold",
    }
    assert known <= compiler_options(n_streams=8).keys()
    assert "realize_acc_reads_threshold" not in compiler_options(n_streams=4)


@pytest.mark.quick
def test_an_unchanged_output_would_be_found(monkeypatch):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (2 * x).to(x.dtype)

    refuse_unchanged_outputs(monkeypatch, Double)
    with pytest.raises(AssertionError, match="Double returns what an operation left unchanged"):
        Double.apply(torch.ones(2))


class Sublayer(torch.nn.Module):
    """A connection around a small branch, without the rest of the model, which is fast to trace."""

    def __init__(self, model):
        super().__init__()
        self.connection, self.branch = model.blocks[1].hc_mlp, model.blocks[1].mlp
        self.sees = model.config.sees

    def forward(self, x):
        """x (B, T, n, C) -> [new streams], and what is read where reads are taken ahead."""
        streams = Streams(x, None, x.mean(2) if self.sees == "input" else None)
        streams = streams._replace(mean_square=mean_square(streams.seen(self.sees)))
        new = self.connection(streams, self.branch)
        return [new.x] if new.input is None else [new.x, new.input]


def squares_and_gradients(sublayer, n, bfloat16):
    """The sum of all squares that the sublayer writes, and its gradients, that of x among them."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    x = torch.randn(2, 8, n, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        written = sublayer(x)
    loss = sum(t.float().square().sum() for t in written)
    loss.backward()
    return loss.detach(), {"x": x.grad, **{name: p.grad for name, p in sublayer.named_parameters()}}


@pytest.mark.long
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n", [2, 4, 6])
@pytest.mark.parametrize("mixer, knobs, dynamic", CASES, ids=str)
def test_traced_is_eager(mixer, knobs, n, dynamic, bfloat16):
    """The graphs of Dynamo and AOTAutograd, run by eager kernels; 6 streams are stacked."""
    torch.compiler.reset()
    n = 1 if MIXERS[mixer].one_stream else n
    traced, eager = (Sublayer(build(mixer, n, dynamic, knobs)) for _ in range(2))
    traced.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same(*(squares_and_gradients(s, n, bfloat16) for s in (traced, eager)), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize("knobs", [{}, READ_AHEAD], ids=str)
def test_traced_without_gradients_is_eager(knobs, n):
    """As in an evaluation. There Dynamo drops the ctx of a forward that has as many parameters as
    the call has arguments."""
    torch.compiler.reset()
    traced, eager = (Sublayer(build("tbp", n, True, knobs)) for _ in range(2))
    traced.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    x = torch.randn(2, 8, n, 16)
    torch.testing.assert_close(traced(x), eager(x), rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mixer, knobs, dynamic", CASES, ids=str)
def test_compiled_model_is_eager(mixer, knobs, dynamic, bfloat16):
    """Inductor's kernels. In bfloat16 they round at other places than eager ones do."""
    torch.compiler.reset()
    n = 4 if dynamic and not bfloat16 else 2
    compiled, eager = (build(mixer, n, dynamic, knobs) for _ in range(2))
    compiled.compile_regions()
    results = [loss_and_gradients(model, bfloat16) for model in (compiled, eager)]
    if bfloat16:
        assert_as_exact(*results, loss_and_gradients(build(mixer, n, dynamic, knobs), False))
    else:
        assert_same(*results, 1e-4)


@pytest.mark.quick
def test_the_versions_that_are_said_to_be_tested_are():
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    requirements = (ROOT / "requirements.txt").read_text()
    others = re.search(r"^ +torch: (.+)$", workflow, re.MULTILINE)[1]
    pinned = re.search(r"^torch==(.+)$", requirements, re.MULTILINE)[1]
    versions = re.findall(r"[0-9.]+", others) + [pinned]
    assert sorted(version.rpartition(".")[0] for version in versions) == sorted(TESTED_TORCH)
