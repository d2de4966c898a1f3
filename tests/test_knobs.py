"""GPTConfig: what it refuses, its defaults, and whether a knob reaches the connections."""

import inspect
from dataclasses import fields

import pytest
import torch
from conftest import ROOT

from coefficients import Coefficients
from configurator import resolve
from mixers import MIXERS
from model import GPT, GPTConfig
from streams import HyperConnection, ReadOut, ScaledResidual, start_streams

SIZES = dict(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=24)


@pytest.mark.quick
@pytest.mark.parametrize(
    "mixer, knobs",
    [
        ("tbp", {"dynamic": False}),
        ("tbp", {"alpha_start": 0.5}),
        ("tbp", {"mix_start": 0.3}),
        ("tbp", {"read_start": 0.5}),
        ("tbp", {"gates": "exp"}),
        ("hc", {"gates": "bounded"}),
        ("tbp", {"mix_scale": "stream"}),
        ("tbp", {"sees": "input"}),
        ("sinkhorn", {"sinkhorn_rounds": 2}),
    ],
)
def test_a_knob_of_the_connections_reaches_them(mixer, knobs):
    """Each is the module with that knob, at the start and away from it."""
    options = {key: knobs[key] for key in MIXERS[mixer].options}
    changes = {key: value for key, value in knobs.items() if key not in options}
    readout = "learned" if "sees" in knobs else "mean"
    model = GPT(GPTConfig(**SIZES, **changes, mixer=mixer, options=options, readout=readout))
    streams = start_streams(torch.randn(2, 3, 24), 4, sees=knobs.get("sees", "streams"))
    for sublayer in (0, 1, 2):
        connection = model.blocks[sublayer // 2].connections()[sublayer % 2][1]
        wanted = HyperConnection(mixer, 4, 24, sublayer=sublayer, **knobs)
        parameters = dict(connection.named_parameters())
        for name, parameter in wanted.named_parameters():
            torch.testing.assert_close(parameters[name], parameter, rtol=0, atol=0)
        with torch.no_grad():
            connection.bias.add_(torch.randn_like(connection.bias))
        wanted.load_state_dict(connection.state_dict())
        torch.testing.assert_close(connection.observe(streams), wanted.observe(streams))


@pytest.mark.quick
def test_static_coefficients_have_biases_alone():
    for knobs in ({"readout": "learned"}, {"mixer": "residual", "n_streams": 1}):
        model = GPT(GPTConfig(**SIZES, **knobs, mix_scale="sublayer", dynamic=False))
        own = [module for module in model.modules() if isinstance(module, Coefficients)]
        assert len(own) == 4 + ("readout" in knobs)
        assert all([name for name, _ in module.named_parameters()] == ["bias"] for module in own)


@pytest.mark.quick
def test_a_module_s_defaults_are_the_config_s():
    """And those of train.py, but for the biases, which GPT-2 has and nanoGPT's recipe has not."""
    defaults = {field.name: field.default for field in fields(GPTConfig)}
    script = resolve(ROOT / "train.py", [])
    assert {name for name in defaults if script.get(name, defaults[name]) != defaults[name]} == {
        "bias"
    }
    for module in (HyperConnection, ScaledResidual, ReadOut):
        for name, parameter in inspect.signature(module).parameters.items():
            if name in defaults and parameter.default is not parameter.empty:
                assert parameter.default == defaults[name], (module, name)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(n_head=5), "n_embd 24 is not divisible by n_head 5"),
        (dict(mixer="tpb"), "unknown mixer 'tpb'"),
        (dict(n_streams=1), "at least 2, not 1"),
        (dict(n_layer=0), "n_layer must be at least 1, not 0"),
        (dict(dropout=1.0), "dropout must be in"),
        (dict(mixer="permutation", n_streams=9), "9! logits"),
        (dict(mix_start=0.0), "mix_start must lie between 0 and 1, not 0.0"),
        (dict(read_start=1.5), "read_start must lie between 0 and 1, not 1.5"),
        (dict(gates="ajar"), "gates must be one of auto, bounded, exp, free, not 'ajar'"),
        (dict(alpha_start=0.0), "alpha_start must be above 0, not 0.0"),
        (dict(embed_scale=0.0), "embed_scale must be above 0, not 0.0"),
        (dict(sees="input"), "readout must be 'learned', not 'mean'"),
        (dict(sees="mean"), "sees must be one of streams, input, not 'mean'"),
        (dict(wraps="model"), "wraps must be one of sublayer, block, not 'model'"),
        *(
            (
                {"mixer": "residual", "n_streams": 1, knob: value},
                f"residual has one stream, so {knob} must be .*, not '{value}'",
            )
            for knob, value in (
                ("gates", "free"),
                ("wraps", "block"),
                ("stream_start", "learned"),
                ("readout", "learned"),
            )
        ),
        (
            dict(mixer="residual", n_streams=1, sees="input", readout="learned"),
            "residual has one stream, so sees must be 'streams', not 'input'",
        ),
        (
            dict(mixer="residual", n_streams=1, mix_scale="stream"),
            "mix_scale must be 'none' or 'sublayer', not 'stream'",
        ),
        (dict(mix_scale="token"), "mix_scale must be one of none, sublayer, stream, not 'token'"),
        (
            dict(mixer="residual", n_streams=1, sees="input", readout="learned"),
            "sees must be 'streams', not 'input', and readout must be 'mean', not 'learned'",
        ),
        (dict(mixer="residual", n_streams=1, sees="input"), "so sees must be 'streams'"),
        (dict(x0_scalars=True), "x0_scalars are for the residual mixer, not for tbp"),
    ],
)
def test_bad_configs_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        GPTConfig(**{**SIZES, **changes})
