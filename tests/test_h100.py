"""dev/h100 against counts made by hand, and the figures that README.md quotes."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from dev.h100.report import missing_tool, model_config, parse_settings, refuse_unused

needs_tools = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))

# Captures the training step of two functions of bfloat16 tensors, and prints what it counted.
CAPTURE = """
import json, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from dev.h100.capture import capturing
from dev.h100.cubin import resource_usage

def captured(function, *shapes):
    with capturing() as graphs, FakeTensorMode():
        args = [torch.empty(s, device="cuda:0", dtype=torch.bfloat16) for s in shapes]
        out = torch.compile(function, fullgraph=True)(*(a.requires_grad_() for a in args))
        out.backward(torch.empty_like(out))
    return graphs

def counts(graphs):
    return [[g.triton_launches, g.extern_launches, g.bytes] for g in graphs]

pointwise = captured(lambda x: (2 * x + 1).exp(), (1024, 512))
product = captured(lambda a, b: a @ b, (256, 128), (128, 64))
usage = resource_usage(pointwise[1].kernels)
print(json.dumps([counts(pointwise), counts(product), usage]))
"""


def python(*command):
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_tools
def test_counts_are_those_made_by_hand():
    """[Triton kernels, library kernels, bytes] of the forward and of the backward."""
    pointwise, product, usage = json.loads(python("-c", CAPTURE).splitlines()[-1])
    x = 2 * 1024 * 512  # bytes of x, of the output and of their gradients
    assert pointwise == [[1, 0, 2 * x], [1, 0, 3 * x]]
    a, b, out = 2 * 256 * 128, 2 * 128 * 64, 2 * 256 * 64
    assert product == [[0, 1, a + b + out], [0, 2, 2 * (a + b + out)]]
    ((_, registers, local_bytes, _, warps),) = usage  # one kernel, a small one
    assert 8 <= registers <= 64 and local_bytes == 0 and warps in (4, 8)


def counted(tmp_path, *words):
    """{mixer: (launches, times residual's bytes)} and what made them."""
    python("-m", "dev.h100.report", *words, f"--json={tmp_path}/counts.json")
    document = json.loads((tmp_path / "counts.json").read_text())
    layers = {
        mixer: (layer["launches"], layer["bytes_ratio"])
        for mixer, layer in document["one_layer"].items()
    }
    return layers, document["made_by"]


# Compiles a row of tbp for 16 streams and the cut of rtbp's blocks of 8, with their gradients, and
# prints what each needs.
STEPS = """
import json, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from dev.h100.capture import capturing
from dev.h100.cubin import resource_usage
from stacked_charts import quarter, quarter_backward, row_backward, row_forward, step

def numbers(*shape):
    return torch.empty(*shape, device="cuda:0")

N = 16384
with capturing() as graphs, FakeTensorMode(), torch.no_grad():
    row = numbers(15, N), numbers(16, N)
    step(row_forward, True, *row)
    step(row_backward, True, *row, numbers(16, N), numbers(16, N))
    block = numbers(13, N), numbers(8, N), numbers(8, N)
    step(quarter, True, *block)
    step(quarter_backward, True, *block, numbers(4, 4 * N), numbers(4, 4 * N))
print(json.dumps([[g.triton_launches, g.bytes, resource_usage(g.kernels)] for g in graphs]))
"""


@needs_tools
@pytest.mark.long
def test_steps_of_the_charts_are_few_kernels_without_spills():
    """A row forward: 15 logits and 16 columns in, 16 entries and 16 columns out, all float32.
    Backward: the same in with two gradients of 16, and the gradients of the former out.
    A block of 8, whose four spreads lie side by side: 7 kernels, and 11 back."""
    forward, backward, *cuts = json.loads(python("-c", STEPS).splitlines()[-1])
    for (launches, moved, ((_, registers, local, *_),)), numbers, most in (
        (forward, 15 + 3 * 16, 100),
        (backward, 2 * 15 + 4 * 16, 240),
    ):
        assert launches == 1 and local == 0 and registers <= most
        assert moved == 4 * 16384 * numbers
    for (launches, _, usage), most in zip(cuts, (7, 11)):
        assert launches <= most and all(local == 0 for _, _, local, *_ in usage)


@needs_tools
@pytest.mark.long
def test_the_figures_of_the_readme(tmp_path):
    layers, made_by = counted(tmp_path, "--mixers=identity,tbp")
    assert {"commit", "clean", "torch", "triton", "command"} <= made_by.keys()
    assert {name: launches for name, (launches, _) in layers.items()} == {
        "residual": 41,
        "identity": 65,
        "tbp": 65,
    }
    assert layers["identity"][1] < 1.885 and layers["tbp"][1] < 1.91


@needs_tools
@pytest.mark.long
@pytest.mark.parametrize(
    "form, most", [([], 3.2), (["sees=input", "readout=learned"], 2.45)], ids=["faithful", "lean"]
)
def test_the_figures_of_eight_streams(tmp_path, form, most):
    layers, _ = counted(tmp_path, "--mixers=tbp", "n_streams=8", *form)
    assert layers["tbp"][0] <= 93 and layers["tbp"][1] < most


@pytest.mark.quick
def test_words_of_the_command_line_reach_the_mixers_that_take_them():
    settings = parse_settings(["dynamic=False", "n_streams=8", "sinkhorn_rounds=5"])
    assert settings == {"dynamic": False, "n_streams": 8, "sinkhorn_rounds": 5}
    sinkhorn = model_config("sinkhorn", settings)
    assert sinkhorn["options"] == {"sinkhorn_rounds": 5} and sinkhorn["n_streams"] == 8
    assert model_config("tbp", settings)["options"] == {}
    residual = model_config("residual", settings)
    assert residual["n_streams"] == 1 and residual["dynamic"] is False


@pytest.mark.quick
@pytest.mark.parametrize("word", ["n_stream=8", "n_streams", "mixer=tbp", "options={}"])
def test_unknown_words_are_refused(word):
    with pytest.raises(ValueError, match=f"'{word}' is not key=value"):
        parse_settings([word])


@pytest.mark.quick
def test_values_that_the_model_refuses_are_refused_before_anything_is_compiled():
    with pytest.raises(ValueError, match="n_streams must be at least 2, not 1"):
        model_config("tbp", {"n_streams": 1})
    with pytest.raises(ValueError, match="unknown mixer 'tpb'"):
        model_config("tpb", {})


@pytest.mark.quick
def test_an_option_of_a_mixer_that_is_not_counted_is_refused():
    settings = {"sinkhorn_rounds": 5, "n_streams": 8}
    names = ["residual", "tbp", "sinkhorn"]
    configs = {name: model_config(name, settings) for name in names}
    refuse_unused(settings, configs)
    del configs["sinkhorn"]
    with pytest.raises(
        ValueError, match="sinkhorn_rounds is a setting of none of .* residual, tbp"
    ):
        refuse_unused(settings, configs)
