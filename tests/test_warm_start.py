"""warm_start.py: a new run from a checkpoint of ours."""

import json
import shutil

import pytest
import torch
from conftest import assert_same_run, load, records, run, write_checkpoint

import warm_start
from model import GPT, GPTConfig
from runtime import RunError

SIZES = dict(block_size=16, vocab_size=320, n_layer=2, n_head=2, n_embd=16, bias=False, n_streams=3)
BYTES = {"tokenizer": "bytes", "vocab_size": 257}


def model_with(seed, **changes):
    """A model with random weights of all kinds: those of its start say little of a mixer."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SIZES, "mixer": "tbp", **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@pytest.fixture
def source(tmp_path):
    """A model, and the folder of its run."""
    model = model_with(1)
    write_checkpoint(tmp_path / "source", model, step=7)
    return model, str(tmp_path / "source")


# ---- what is taken -------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("block_size", [8, 16, 24])
def test_a_shorter_or_longer_block_computes_the_same_at_the_positions_that_both_have(
    block_size, source
):
    trained, folder = source
    model = model_with(2, block_size=block_size, dropout=0.1)
    start = model.embed.wpe.weight.clone()
    said = "\n".join(warm_start.start_from(folder, model, BYTES))
    idx = torch.randint(257, (2, min(block_size, 16)))
    assert torch.equal(model(idx)[0], trained(idx)[0])
    assert "ckpt_0000007.pt, after its step 7; a new run begins at step 0" in said
    if block_size == 8:
        assert "the first 8 of the checkpoint's 16 positions" in said
    if block_size == 24:
        assert torch.equal(model.embed.wpe.weight[16:], start[16:])
        assert "positions 16 to 23 are new and start from the initialisation" in said
    assert ("block_size" in said) == (block_size != 16)


@pytest.mark.quick
def test_a_vocabulary_that_is_padded_otherwise(source):
    trained, folder = source
    model = model_with(2, vocab_size=384)
    warm_start.start_from(folder, model, BYTES)
    idx = torch.randint(257, (2, 16))
    assert torch.allclose(model(idx)[0][..., :320], trained(idx)[0], atol=1e-5)


@pytest.mark.quick
def test_the_knobs_are_those_of_the_checkpoint_but_for_dropout(tmp_path):
    options = {"sinkhorn_rounds": 7}
    model = model_with(1, mixer="sinkhorn", n_mlp=40, dropout=0.2, options=options)
    write_checkpoint(tmp_path / "source", model)
    found = dict(word[2:].split("=") for word in warm_start.knobs(str(tmp_path / "source"), "out"))
    wanted = dict(mixer="'sinkhorn'", n_streams="3", n_layer="2", n_mlp="40", bias="False")
    assert wanted.items() <= found.items() and found["sinkhorn_rounds"] == "7"
    assert not {"dropout", "vocab_size", "options"} & found.keys()
    for nothing in ("scratch", "resume", "auto", str(tmp_path / "none"), str(tmp_path)):
        assert warm_start.knobs(nothing, "out") == []


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(mixer="rtbp"), "mixer is 'tbp' there and 'rtbp' here"),
        (dict(mixer="rtbp"), "python convert.py mixer .*ckpt_0000007.pt .* --mixer=rtbp"),
        (dict(n_streams=2), "n_streams is 3 there and 2 here. Leave these knobs out.* no conver"),
        (dict(mixer="residual", n_streams=1), "no conversion takes the one model to the other"),
        (dict(n_layer=3), "n_layer is 2 there and 3 here. Leave these knobs out"),
        (dict(n_embd=32, bias=True), "n_embd is 16 .* 32 here, bias is False there and True"),
        (dict(mix_start=0.5), "mix_start is 0.01 there and 0.5 here"),
    ],
)
def test_another_model_is_refused_and_left_as_it_was(changes, says, source):
    model = model_with(2, **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        warm_start.start_from(source[1], model, BYTES)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


@pytest.mark.quick
@pytest.mark.parametrize("own", [{}, {"x0_scalars": True}, {"mix_scale": "sublayer"}])
def test_only_the_plain_stream_is_said_to_become_several(own):
    """convert.py refuses the others."""
    then = GPTConfig(**{**SIZES, "mixer": "residual", "n_streams": 1, **own})
    remedy = "no conversion takes the one model to the other" if own else "Convert it first: "
    with pytest.raises(ValueError, match=remedy):
        warm_start.check_model("best.pt", then, GPTConfig(**SIZES, mixer="tbp"))


@pytest.mark.quick
def test_other_tokens_are_refused(source):
    other = {"tokenizer": {"kind": "characters", "characters": "abc"}, "vocab_size": 4}
    says = "trained on tokens of bytes, and the data set's are of 3-character"
    with pytest.raises(ValueError, match=says):
        warm_start.start_from(source[1], model_with(2), other)


@pytest.mark.quick
def test_r50k_base_is_another_name_of_gpt2s_tokens():
    warm_start.check_tokens("best.pt", {"tokenizer": "gpt2"}, {"tokenizer": "r50k_base"})


@pytest.mark.quick
def test_what_is_not_there_is_refused(tmp_path):
    for named in ("out/nothing", "auto:out/nothing"):
        with pytest.raises(ValueError, match="there is no file 'out/nothing'"):
            warm_start.check_source(named, str(tmp_path))
    for named in ("auto:", "auto:scratch", "auto:resume"):
        with pytest.raises(ValueError, match="after auto: weights are named, or say auto"):
            warm_start.check_source(named, str(tmp_path))
    with pytest.raises(RunError, match="has no whole checkpoint; name a run that has"):
        warm_start.start_from(str(tmp_path), model_with(2), BYTES)


# ---- whole runs ----------------------------------------------------------------------------------


def test_a_new_run_begins_with_the_loss_at_which_the_other_ended(tiny, tmp_path):
    run(*tiny, "--mixer=rtbp", "--n_streams=3", "--max_iters=8", "--lr_decay_iters=8")
    last_of_old = load(tmp_path / "out/ckpt_0000008.pt")
    no_shape = [word for word in tiny if not word.startswith(("--n_", "--block_size", "--out_dir"))]
    (tmp_path / "tenth.py").write_text("learning_rate = learning_rate / 10\n")
    new = [*no_shape, f"--out_dir={tmp_path}/new", f"--init_from={tmp_path}/out"]
    output = run(*new, tmp_path / "tenth.py", "--dropout=0.1", "--weight_decay=0.0", "--seed=5")
    assert f"weights: {tmp_path}/out/ckpt_0000008.pt, after its step 8" in output
    first, *_, last = records(tmp_path / "new")
    assert first["step"] == 0 and first["val"] == last_of_old["best_val"] and last["step"] == 6

    state = load(tmp_path / "new/ckpt_0000006.pt")
    assert state["model_config"] == last_of_old["model_config"] | {"dropout": 0.1}
    assert {group["weight_decay"] for group in state["optimizer"]["param_groups"]} == {0.0}
    assert {moments["step"].item() for moments in state["optimizer"]["state"].values()} == {6.0}
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["learning_rate"] == 1e-3, "the config file ran once"

    # Killed, it goes on as itself.
    wanted = load(tmp_path / "new/ckpt_0000006.pt")["model"]
    (tmp_path / "new/ckpt_0000006.pt").unlink()
    output = run("train.py", f"--out_dir={tmp_path}/new", "--init_from=resume")
    assert "at step 4" in output and "weights:" not in output and "changed since" not in output
    resumed = load(tmp_path / "new/ckpt_0000006.pt")["model"]
    assert all(torch.equal(wanted[name], resumed[name]) for name in wanted)
    assert "holds a run already" in run(*new, ok=False)


def test_auto_begins_from_weights_and_goes_on_with_the_same_command(tiny, tmp_path):
    """As on a cluster that kills a job and starts it again: before its first checkpoint, and after;
    by then the weights may be gone."""
    run(*tiny, "--mixer=rtbp", "--n_streams=3", "--max_iters=2")
    no_shape = [word for word in tiny if not word.startswith(("--n_", "--block_size", "--out_dir"))]
    new = [*no_shape, f"--out_dir={tmp_path}/new", f"--init_from=auto:{tmp_path}/out"]
    wanted = run(*no_shape, f"--out_dir={tmp_path}/whole", f"--init_from={tmp_path}/out")
    assert "after its step 2" in wanted

    killed = "import checkpoint, os\ncheckpoint.save = lambda *_, **__: os._exit(1)"
    run(*new, ok=False, patch=killed)
    assert not list((tmp_path / "new").glob("*.pt"))
    killed = "import checkpoint, os\nsave = checkpoint.save\n"
    killed += (
        "def save_once(*a, **k):\n    save(*a, **k)\n    os._exit(1)\ncheckpoint.save = save_once"
    )
    assert "after its step 2" in run(*new, ok=False, patch=killed)
    shutil.rmtree(tmp_path / "out")
    output = run(*new)
    assert "resumed from" in output and "at step 2" in output and "weights:" not in output
    assert_same_run(tmp_path / "whole/ckpt_0000006.pt", tmp_path / "new/ckpt_0000006.pt")
    assert records(tmp_path / "whole") == records(tmp_path / "new")


def test_the_remedy_for_another_mixer_is_one(tiny, tmp_path):
    """What the refusal says to run converts, and the run begins with nearly the same loss."""
    run(*tiny, "--mixer=tbp", "--n_streams=3", "--max_iters=4")
    new = [*tiny, f"--out_dir={tmp_path}/new", "--mixer=rtbp", "--n_streams=3", "--max_iters=0"]
    refusal = run(*new, f"--init_from={tmp_path}/out", ok=False)
    command = refusal.split("Convert it first: python ")[1].split()
    command[3] = tmp_path / "converted"
    run(*command)
    run(*new, f"--init_from={tmp_path}/converted")
    ended = load(tmp_path / "out/best.pt")["best_val"]
    assert records(tmp_path / "new")[0]["val"] == pytest.approx(ended, abs=1e-3)
