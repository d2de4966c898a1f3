"""convert.py: in, out, and from mixer to mixer."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import run, write_data_set
from test_pretrained import C, gpt2_logits, gpt2_weights, nanogpt_checkpoint, without_prefix
from test_pretrained import write as write_folder

import checkpoint
import convert
import remix
from branches import MLP
from mixers import MIXERS, ds_error, mixing_matrix, n_logits
from model import GPT, GPTConfig
from passes import mean_square
from streams import HyperConnection, Streams
from trained import load_model

SIZES = dict(block_size=16, vocab_size=320, n_layer=2, n_head=2, n_embd=C)
MIXING = [name for name in MIXERS if not MIXERS[name].one_stream]
# Those that reach all of the polytope's interior, which has (n - 1)^2 dimensions.
REACH_ALL = [m for m in MIXING if MIXERS[m].doubly_stochastic and n_logits(m, 4) >= 9]


@pytest.fixture
def command(monkeypatch, capsys):
    """convert.py with these arguments, in this process -> what it printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        convert.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def tokens():
    return torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(7))


def model_of(mixer, n_streams=4, spread=0.5, **changes):
    """A model with every parameter moved from its start; spread: of the biases of the mix."""
    torch.manual_seed(0)
    n_streams = 1 if MIXERS[mixer].one_stream else n_streams
    model = GPT(
        GPTConfig(**SIZES | dict(mixer=mixer, n_streams=n_streams, mix_start=0.5) | changes)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = spread if name.endswith("bias") and ".hc_" in name else 0.1
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def write(out_dir, model, **about):
    """The model as the checkpoint of a run at step 3."""
    state = {"config": {"seed": 1}, "shards": "a", "step": 3, "tokenizer": "bytes", "n_vocab": 257}
    convert.save(out_dir, model, state | about)
    return out_dir


def read(out_dir):
    return load_model(checkpoint.find(out_dir))[1]


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens)[0]


# ---- in and out ----------------------------------------------------------------------------------


def test_nanogpts_checkpoint_becomes_one_of_ours(command, tmp_path, tokens):
    theirs = nanogpt_checkpoint()
    torch.save(theirs, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="nothing tells the tokenizer of its 61 tokens"):
        command("import", tmp_path / "ckpt.pt", tmp_path / "out")
    characters = "".join(chr(65 + i) for i in range(60))
    write_data_set(tmp_path / "chars", train=(300,), val=(300,))
    meta = json.loads((tmp_path / "chars" / "meta.json").read_text())
    meta |= {"tokenizer": {"kind": "characters", "characters": characters}, "vocab_size": 61}
    (tmp_path / "chars" / "meta.json").write_text(json.dumps(meta))

    said = command(
        "import", tmp_path / "ckpt.pt", tmp_path / "out", f"--tokenizer={tmp_path / 'chars'}"
    )
    assert "GELU" in said and f"sample.py --out_dir={tmp_path / 'out'}" in said
    state = checkpoint.load(checkpoint.latest(tmp_path / "out"))
    assert state["tokenizer"] == meta["tokenizer"] and state["n_vocab"] == 61
    expected = gpt2_logits(without_prefix(gpt2_weights()), tokens % 61)
    assert (logits(read(tmp_path / "out"), tokens % 61) - expected).abs().max() < 1e-4
    sampled = run(
        "sample.py",
        f"--out_dir={tmp_path / 'out'}",
        "--max_new_tokens=5",
        "--start=ABC",
        "--compile=False",
    )
    assert "--- sample 1 ---\nABC" in sampled


def test_characters_without_an_end_of_text_get_one(command, tmp_path, tokens):
    torch.save(nanogpt_checkpoint(), tmp_path / "ckpt.pt")
    write_data_set(tmp_path / "chars", train=(300,), val=(300,))
    meta = json.loads((tmp_path / "chars" / "meta.json").read_text())
    characters = "".join(chr(65 + i) for i in range(61))
    meta |= {"tokenizer": {"kind": "characters", "characters": characters}, "vocab_size": 62}
    (tmp_path / "chars" / "meta.json").write_text(json.dumps(meta))
    said = command(
        "import", tmp_path / "ckpt.pt", tmp_path / "out", f"--tokenizer={tmp_path / 'chars'}"
    )
    assert "no end of text: token 61 is new" in said
    model = read(tmp_path / "out")
    expected = gpt2_logits(without_prefix(gpt2_weights()), tokens % 61)
    assert model.config.vocab_size == 62
    assert (logits(model, tokens % 61)[..., :61] - expected).abs().max() < 1e-4
    with pytest.raises(ValueError, match="--tokenizer=gpt2 has 50,257 tokens"):
        command("import", tmp_path / "ckpt.pt", tmp_path / "other", "--tokenizer=gpt2")
    with pytest.raises(ValueError, match="does not tell which characters: name the folder"):
        command("import", tmp_path / "ckpt.pt", tmp_path / "other", "--tokenizer=chars")


def test_weights_of_gpt2s_vocabulary_have_gpt2s_tokenizer(command, tmp_path):
    source = write_folder(tmp_path, gpt2_weights(vocabulary=50257), dict(vocab_size=50257))
    command("import", source, tmp_path / "out")
    state = checkpoint.load(checkpoint.latest(tmp_path / "out"))
    assert state["tokenizer"] == "gpt2" and state["n_vocab"] == 50257


def test_a_converted_checkpoint_is_not_resumed(tiny, tmp_path):
    write(tmp_path / "out", model_of("tbp"))
    bare = ["train.py", f"--out_dir={tmp_path}/out", "--init_from=resume"]
    for command in (bare, tiny + ["--init_from=resume"]):
        output = run(*command, ok=False)
        assert f"no run to resume; begin one with --init_from={tmp_path}/out --out_dir=" in output
    (tmp_path / "out" / "metrics.jsonl").write_text("")  # as if it were a run's
    output = run(*tiny, "--init_from=resume", ok=False)
    assert "was converted" in output and "--out_dir=" in output


@pytest.mark.quick
def test_knobs_without_effect_leave_a_model_plain():
    """On one stream nothing reads, and nothing is mixed."""
    assert convert.is_plain(
        model_of("residual", mix_start=0.5, read_start=0.5, alpha_start=0.5).config
    )
    assert not convert.is_plain(model_of("residual", mix_scale="sublayer").config)


@pytest.mark.quick
def test_a_fork_s_model_is_not_called_gpt2(command, tmp_path, monkeypatch):
    own = MLP.__init__

    def with_a_gate(mlp, config):
        own(mlp, config)
        mlp.c_gate = torch.nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)

    monkeypatch.setattr(MLP, "__init__", with_a_gate)
    write(tmp_path / "out", model_of("residual"))
    command("export", tmp_path / "out", tmp_path / "exported")
    assert "architectures" not in json.loads((tmp_path / "exported" / "config.json").read_text())
    command("import", tmp_path / "exported", tmp_path / "back")
    one, two = (
        checkpoint.load(checkpoint.latest(tmp_path / name))["model"] for name in ("out", "back")
    )
    assert "blocks.0.mlp.c_gate.weight" in one and one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_loads_an_exported_residual_model(bias, command, tmp_path, tokens):
    transformers = pytest.importorskip("transformers")
    model = model_of("residual", bias=bias, n_mlp=40, dropout=0.1)
    write(tmp_path / "out", model)
    assert "GPT2LMHeadModel" in command("export", tmp_path / "out", tmp_path / "theirs")
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (theirs.eval()(tokens).logits - logits(model, tokens)).abs().max() < 1e-4
    assert theirs.config.eos_token_id == 256 and theirs.config.resid_pdrop == 0.1

    command("import", tmp_path / "theirs", tmp_path / "back")
    assert (logits(read(tmp_path / "back"), tokens) - logits(model, tokens)).abs().max() < 1e-5
    state = checkpoint.load(checkpoint.latest(tmp_path / "back"))
    assert (state["step"], state["tokenizer"], state["n_vocab"]) == (3, "bytes", 257)


def test_an_exported_model_ends_a_text_with_its_tokenizer_s_token(command, tmp_path):
    """The end of text of p50k_base is not its last id."""
    pytest.importorskip("safetensors")
    write(tmp_path / "out", model_of("residual"), tokenizer="p50k_base", n_vocab=50281)
    command("export", tmp_path / "out", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == 50256


@pytest.mark.parametrize(
    "mixer, changes",
    [
        ("sinkhorn", dict(options={"sinkhorn_rounds": 3}, readout="learned")),
        ("tbp", dict(dynamic=False, bias=False, stream_start="learned")),
        ("residual", dict(x0_scalars=True)),
        ("residual", dict(mix_scale="sublayer")),
        ("residual", dict(embed_scale=2.0)),
    ],
)
def test_any_other_model_is_the_same_out_and_back(mixer, changes, command, tmp_path, tokens):
    model = model_of(mixer, **changes)
    write(tmp_path / "out", model)
    assert "convert.py import" in command("export", tmp_path / "out", tmp_path / "exported")
    command("import", tmp_path / "exported", tmp_path / "back")
    before, after = (checkpoint.load(checkpoint.latest(tmp_path / x)) for x in ("out", "back"))
    assert torch.equal(logits(read(tmp_path / "back"), tokens), logits(model, tokens))
    for name in ("model_config", "tokenizer", "n_vocab", "step"):
        assert before[name] == after[name], name
    tensors = pytest.importorskip("safetensors.torch").load_file(
        tmp_path / "exported" / "model.safetensors"
    )
    assert tensors.keys() == before["model"].keys()


@pytest.mark.quick
def test_r50k_base_is_another_name_of_gpt2s_tokens(tmp_path):
    write_data_set(tmp_path / "data", train=(300,), val=(300,))
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta | {"tokenizer": "r50k_base"}))
    idx, _ = remix.sequences(16, "gpt2", 50257, tmp_path / "data", 32)
    assert idx.shape == (2, 16)
    with pytest.raises(ValueError, match="has tokens of r50k_base, and the checkpoint is of bytes"):
        remix.sequences(16, "bytes", 257, tmp_path / "data", 32)


def test_nothing_is_written_over(command, tmp_path):
    write(tmp_path / "out", model_of("residual"))
    command("export", tmp_path / "out", tmp_path / "exported")
    with pytest.raises(RuntimeError, match="holds a model already"):
        command("export", tmp_path / "out", tmp_path / "exported")
    for source in (tmp_path / "exported", "gpt2", tmp_path / "none"):  # said before it is read
        with pytest.raises(RuntimeError, match="holds a run already"):
            command("import", source, tmp_path / "out")
    with pytest.raises(RuntimeError, match="holds a run already"):
        command("mixer", tmp_path / "none", tmp_path / "out", "--mixer=tbp")


# ---- from mixer to mixer -------------------------------------------------------------------------


def matrices(model):
    """{sublayer: its M at the biases}, in float64, from the parameters alone."""
    found = {}
    for name, hc in model.named_modules():
        if isinstance(hc, HyperConnection):
            n = hc.n_streams
            mix = hc.bias.detach().double()[2 * n : 2 * n + hc.n_mixer_logits]
            found[name] = mixing_matrix(hc.mixer, mix, n, **hc.options)
    return found


@pytest.mark.parametrize("old", REACH_ALL)
@pytest.mark.parametrize("new", REACH_ALL)
def test_static_models_compute_the_same_with_another_mixer(old, new, tokens):
    n_streams = 3 if new == "permutation" else 4
    model = model_of(old, n_streams, dynamic=False, readout="learned")
    other, off = remix.with_mixer(model, new, None, {})
    assert other.config.mixer == new and len(off) == 4
    before = matrices(model)
    assert all(ds_error(M) < 1e-4 for M in before.values())
    for name, M in matrices(other).items():
        assert (M - before[name]).abs().max() < 1e-6
        assert off[name] == pytest.approx((M - before[name]).abs().max().item(), abs=1e-9)
    assert (logits(other, tokens) - logits(model, tokens)).abs().max() < 1e-4
    eye = torch.eye(n_streams)
    assert min((M - eye).abs().max() for M in before.values()) > 0.1, "nothing to convert"


def added_by_tokens(hc, x, scale):
    """What the tokens of x (B, T, n, C) add to M with `scale` times the alpha of the mix."""
    alpha, found = hc.alpha.data.clone(), []
    for factor in (scale, 0):
        hc.alpha.data[2] = factor * alpha[2]
        found.append(hc.observe(Streams(x, mean_square(x)))[2])
    hc.alpha.data.copy_(alpha)
    return found[0] - found[1]


@pytest.mark.parametrize(
    "old, new", [("tbp", "rtbp"), ("sinkhorn", "tbp"), ("rtbp", "sinkhorn"), ("tbp", "permutation")]
)
def test_tokens_move_the_new_matrix_as_the_old_one_to_first_order(old, new, tokens):
    """The difference shrinks with the square of what a token adds to the logits."""
    model = model_of(old, spread=0.3)
    other, _ = remix.with_mixer(model, new, None, {})
    model, other = model.double(), other.double()
    for seen in model.observe(tokens):
        hcs = [each.get_submodule(seen.name) for each in (model, other)]
        off = []
        for scale in (1e-3, 4e-3):
            theirs, ours = (added_by_tokens(hc, seen.x, scale) for hc in hcs)
            off.append((ours - theirs).norm() / theirs.norm())
        assert off[0] < 1e-3 and 3.5 < off[1] / off[0] < 4.5, seen.name


@pytest.mark.parametrize("mixer", MIXING)
def test_one_stream_becomes_n_that_compute_the_same(mixer, command, tmp_path, tokens):
    model = model_of("residual", n_layer=1)
    write(tmp_path / "out", model)
    said = command(
        "mixer",
        tmp_path / "out",
        tmp_path / "n",
        f"--mixer={mixer}",
        "--n_streams=3",
        "--tokens=32",
    )
    assert "logits are off by" in said
    assert (logits(read(tmp_path / "n"), tokens) - logits(model, tokens)).abs().max() < 1e-5
    state = checkpoint.load(checkpoint.latest(tmp_path / "n"))
    assert (state["step"], state["tokenizer"], state["n_vocab"]) == (3, "bytes", 257)
    assert state["model_config"]["mixer"] == state["config"]["mixer"] == mixer


def test_what_kronecker_does_not_reach_is_refused_with_how_far_off_it_is(command, tmp_path):
    model = model_of("tbp", dynamic=False)
    write(tmp_path / "out", model)
    arguments = ["mixer", tmp_path / "out", tmp_path / "k", "--mixer=kronecker", "--tokens=32"]
    with pytest.raises(RuntimeError, match=r"does not reach M of blocks.* --most_off=") as error:
        command(*arguments)
    assert not (tmp_path / "k").exists()
    accept = str(error.value).split()[-1]
    said = command(*arguments, accept)
    worst = max(
        (M - matrices(model)[name]).abs().max().item()
        for name, M in matrices(read(tmp_path / "k")).items()
    )
    assert 0.01 < worst < float(accept.split("=")[1])
    assert f"off by at most {worst:.2g}" in said


def test_a_kronecker_product_near_enough_is_the_nearest():
    """Of a product with something added, the search finds one at most as far off as the product."""
    logits = torch.tensor([0.3, -0.5, 1.1, 0.2], dtype=torch.float64)
    product = mixing_matrix("kronecker", logits, 4)
    swap = torch.tensor([[1.0, -1, 0, 0], [0, 0, 0, 0], [-1, 1, 0, 0], [0, 0, 0, 0]])
    M = product + 0.01 * swap.double()
    nearest = mixing_matrix("kronecker", remix.reach("kronecker", M, 0.01), 4)
    assert 1e-3 < (nearest - M).norm() <= (product - M).norm() + 1e-9
    assert torch.allclose(
        mixing_matrix("kronecker", remix.reach("kronecker", product, 0.01), 4), product
    )


@pytest.mark.parametrize(
    "old, new",
    [
        ("hc", "tbp"),
        ("identity", "rtbp"),
        ("tbp", "hc"),
        ("tbp", "rows"),
        ("tbp", "identity"),
        ("tbp", "orthogonal"),
    ],
)
def test_every_other_pair_says_how_far_off_it_is(old, new, tokens):
    model = model_of(old, spread=0.3, n_layer=1)
    other, off = remix.with_mixer(model, new, None, {})
    before, after = matrices(model), matrices(other)
    for name in before:
        assert off[name] == pytest.approx((after[name] - before[name]).abs().max().item(), abs=1e-9)
    reached = old == "identity" or new in ("hc", "rows")
    assert (max(off.values()) < 1e-3) == reached
    assert logits(other, tokens).isfinite().all()


@pytest.mark.quick
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_jacobian_is_the_slope_of_m_with_its_options(rounds):
    """Against differences of M, logit by logit."""
    logits, small = torch.randn(9, dtype=torch.float64), 1e-6
    M = lambda at: mixing_matrix("sinkhorn", at, 3, sinkhorn_rounds=rounds).flatten()
    steps = small * torch.eye(9, dtype=torch.float64)
    slopes = torch.stack([(M(logits + s) - M(logits - s)) / (2 * small) for s in steps], -1)
    found = remix.jacobian("sinkhorn", logits, 3, {"sinkhorn_rounds": rounds})
    torch.testing.assert_close(found, slopes, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "knobs",
    [
        {"sees": "input", "readout": "learned"},
        {"wraps": "block"},
        {"gates": "exp", "mix_scale": "sublayer"},
    ],
)
def test_the_knobs_of_the_streams_stay(knobs, tokens):
    model = model_of("tbp", spread=0.3, **knobs)
    other, off = remix.with_mixer(model, "rtbp", None, {})
    assert max(off.values()) < 1e-6 and other.config.gates == model.config.gates.replace(
        "auto", "bounded"
    )
    for each in (model, other):
        for hc in (m for m in each.modules() if isinstance(m, HyperConnection)):
            hc.alpha.data[2] *= 1e-3  # where first order is enough
    assert (logits(other, tokens) - logits(model, tokens)).abs().max() < 1e-4
    idx, targets = remix.sequences(16, "bytes", 257, None, 32)
    lines = remix.report_differences(model, other, idx, targets)
    assert lines[0] == "measured on 32 random tokens:" and "an entry of M is off by" in lines[1]


def test_phi_is_left_out_where_it_misleads_and_kept_where_it_helps(tokens):
    """An M with negative entries has its nearest one on the border, where logits say nothing."""
    for old, new, misled in (("tbp", "rtbp", False), ("hc", "tbp", True)):
        model = model_of(old, spread=0.3, mix_scale="stream")
        for module in model.modules():
            if isinstance(module, HyperConnection):
                module.alpha.data[2] = 0.02
        other, off = remix.with_mixer(model, new, None, {})
        mapped = remix.mean_differences(model, other, tokens)
        left_out = remix.drop_misleading_rows(model, other, tokens)
        after = remix.mean_differences(model, other, tokens)
        assert bool(left_out) == misled
        for name in off:
            rows = remix.rows_of_mix(other.get_submodule(name))
            assert (rows == 0).all() == (name in left_out)
            assert (after[name] < mapped[name]) == (name in left_out)


def test_reads_and_writes_are_copied_with_their_gates(tokens):
    """hc's gates are free, tbp's bounded, and neither follows the mixer."""
    for old, new in (("hc", "tbp"), ("tbp", "hc")):
        model = model_of(old, spread=0.1, mix_scale="stream", n_layer=1)
        other, _ = remix.with_mixer(model, new, None, {})
        for seen in model.observe(tokens):
            streams = Streams(seen.x, mean_square(seen.x))
            read, write, _ = other.get_submodule(seen.name).observe(streams)
            torch.testing.assert_close(read, seen.read)
            torch.testing.assert_close(write, seen.write)


def test_the_figures_are_those_of_the_tokens(command, tmp_path):
    write_data_set(tmp_path / "data", train=(300,), val=(200,))
    model = model_of("tbp", spread=0.3)
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.alpha.data[2] = 2.0  # far beyond first order
    write(tmp_path / "out", model)
    to_rtbp = ["--mixer=rtbp", f"--data={tmp_path / 'data'}"]
    said = command("mixer", tmp_path / "out", tmp_path / "new", *to_rtbp, "--tokens=32")
    other = read(tmp_path / "new")
    header = 1024  # bytes
    ids = np.fromfile(tmp_path / "data" / "val_000000.bin", "<u2", offset=header)[:33]
    ids = torch.from_numpy(ids.astype("int64"))
    losses = []
    for each in (model, other):
        with torch.no_grad():
            pairs = [(ids[i : i + 16], ids[i + 1 : i + 17]) for i in (0, 16)]
            losses.append(sum(each(a[None], b[None])[1].item() for a, b in pairs) / 2)
    before, after = losses
    assert abs(after - before) > 3e-4, "nothing to measure"
    told = [float(x) for x in re.search(r"loss (.+) -> (.+) \((.+)\)", said).groups()]
    assert told == pytest.approx([before, after, after - before], abs=1.1e-4)
    worst = mean = 0.0
    seen = model.observe(ids[:32].view(2, 16))
    for one in seen:
        streams = Streams(one.x, mean_square(one.x))
        off = (other.get_submodule(one.name).observe(streams)[2] - one.mix).abs()
        worst, mean = max(worst, off.max().item()), mean + off.mean().item() / len(seen)
    told = re.search(r"off by (\S+) on average, by (\S+) at most", said).groups()
    assert [float(x) for x in told] == pytest.approx([mean, worst], rel=0.06)

    with pytest.raises(ValueError, match="name another --data"):
        write(tmp_path / "gpt2", model, tokenizer="gpt2")
        command("mixer", tmp_path / "gpt2", tmp_path / "x", *to_rtbp)


@pytest.mark.quick
@pytest.mark.parametrize(
    "old, arguments, says",
    [
        ("tbp", ["--mixer=residual"], "residual has one stream"),
        ("tbp", ["--mixer=rtbp", "--n_streams=3"], "n_streams stays 4"),
        ("residual", ["--mixer=tbp"], "pass --n_streams=4"),
        ("tbp", ["--mixer=tpb"], "unknown mixer 'tpb'"),
        ("tbp", ["--mixer=rtbp", "--sinkhorn_rounds=3"], "rtbp takes no option 'sinkhorn_rounds'"),
        ("tbp", ["--mixer=sinkhorn", "--sinkhorn_rounds=0"], "a whole number of at least 1"),
        ("x0", ["--mixer=tbp", "--n_streams=4"], "x0_scalars"),
        ("scaled", ["--mixer=tbp", "--n_streams=4"], "mix_scale='sublayer' has no counterpart"),
    ],
)
def test_mixers_that_cannot_be_had_are_refused(old, arguments, says, command, tmp_path):
    special = {"x0": {"x0_scalars": True}, "scaled": {"mix_scale": "sublayer"}}
    mixer = "residual" if old in special else old
    write(tmp_path / "out", model_of(mixer, **special.get(old, {})))
    with pytest.raises(ValueError, match=says):
        command("mixer", tmp_path / "out", tmp_path / "new", *arguments)
    assert not (tmp_path / "new").exists()


def test_the_command_line_answers_in_one_line(tmp_path):
    said = run("convert.py", "export", tmp_path, tmp_path / "new", ok=False)
    assert said.startswith(f"RunError: {tmp_path} has no whole checkpoint; name a run that has")
    assert said.count("\n") == 1
    assert "convert.py mixer out/tbp" in run("convert.py", "--help")
