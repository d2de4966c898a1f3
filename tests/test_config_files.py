"""config/*.py: short, true to their comments, and a run that could begin."""

import math
import re
from dataclasses import fields

import pytest
import torch
from conftest import ROOT

from configurator import resolve
from mixers import OPTIONS, options_of
from model import GPT, GPTConfig

CONFIGS = sorted((ROOT / "config").glob("*.py"))
# Such as "19,560 steps * 524,288 tokens = 10,255,073,280": a factor is a number and a word.
EQUATION = re.compile(r"((?:[\d,]+ [\w-]+ \* )+[\d,]+ [\w-]+) = ([\d,]+)")


def knobs(*configs):
    files = [str(ROOT / "config" / f"{name}.py") for name in configs]
    return resolve(ROOT / "train.py", files, OPTIONS)


def model_of(config):
    """The model that train.py builds for GPT-2's tokens, without memory for its weights."""
    sizes = {field.name: config[field.name] for field in fields(GPTConfig) if field.name in config}
    with torch.device("meta"):
        return GPT(GPTConfig(options=options_of(config["mixer"], config), **sizes))


def number(text):
    return int(text.replace(",", ""))


@pytest.mark.quick
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_file_is_short_and_its_run_could_begin(path):
    assert len(path.read_text().splitlines()) < 15
    config = knobs(path.stem)
    tokens = config["batch_size"] * config["block_size"]
    assert config["total_batch_tokens"] % tokens == 0
    assert config["eval_tokens"] >= tokens
    assert config["warmup_iters"] < config["lr_decay_iters"] == config["max_iters"]
    assert config["min_lr"] < config["learning_rate"]
    model_of(config)


@pytest.mark.quick
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_arithmetic_in_a_config_file_is_right(path):
    text = path.read_text()
    for factors, product in EQUATION.findall(text):
        counts = [number(factor.split()[0]) for factor in factors.split(" * ")]
        assert math.prod(counts) == number(product), factors
    for product in re.findall(r"^total_batch_tokens = .* = ([\d,]+)$", text, re.MULTILINE):
        assert knobs(path.stem)["total_batch_tokens"] == number(product)


# Sizes, tokens a step, steps and peak rates as they are published, written down once more.
@pytest.mark.quick
@pytest.mark.parametrize(
    "name, layers, heads, channels, step, steps, rate",
    [
        ("residual", 12, 12, 768, 491_520, 600_000, 6e-4),
        ("fineweb", 12, 12, 768, 524_288, 19_560, 6e-4),
        ("mhc_lite_s", 6, 8, 512, 131_072, 10_000, 1e-3),
        ("mhc_lite_m", 12, 12, 768, 131_072, 10_000, 6e-4),
        ("mhc_lite_l", 24, 16, 1024, 131_072, 10_000, 3e-4),
    ],
)
def test_what_is_compared_is_what_was_published(name, layers, heads, channels, step, steps, rate):
    config = knobs("permutation", name)
    assert (config["n_layer"], config["n_head"], config["n_embd"]) == (layers, heads, channels)
    assert (config["total_batch_tokens"], config["max_iters"]) == (step, steps)
    last = 0 if name == "fineweb" else rate / 10
    assert config["learning_rate"] == rate and config["min_lr"] == pytest.approx(last)
    assert (config["weight_decay"], config["beta1"], config["beta2"]) == (0.1, 0.9, 0.95)
    assert config["grad_clip"] == 1.0 and config["block_size"] == 1024
    if name.startswith("mhc_lite"):
        assert config["mixer"] == "permutation" and config["n_streams"] == 4


@pytest.mark.quick
def test_fineweb_is_one_epoch_of_what_its_shards_hold():
    """10,255,324,043 training tokens in 103 shards, each of which leaves less than a sequence."""
    config = knobs("residual", "fineweb")
    seen = config["max_iters"] * config["total_batch_tokens"]
    assert 0 <= 10_255_324_043 - 103 * 1024 - seen < config["total_batch_tokens"]
    model = model_of(config)
    # GPT-2's 124,439,808 parameters, and 47 rows that pad the vocabulary to 50,304.
    assert model.parameter_counts()["total"] == 124_439_808 + 47 * 768


@pytest.mark.quick
@pytest.mark.parametrize(
    "files, out_dir",
    [
        (["laptop"], "out/laptop-tbp"),  # train.py's own mixer
        (["hc", "laptop"], "out/laptop-hc"),
        (["hc", "lean", "laptop"], "out/laptop-lean-hc"),
        (["hc", "lean", "fineweb"], "out/fineweb-lean-hc"),
        (["orthogonal", "mhc_lite_s"], "out/mhc-lite-s-orthogonal"),
    ],
)
def test_a_run_of_several_files_is_named_after_all_of_them(files, out_dir):
    assert knobs(*files)["out_dir"] == out_dir
