"""Where weights come from: the Hub, and the command line of train.py."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import run
from test_pretrained import (
    HEADS,
    LAYERS,
    C,
    build,
    gpt2_logits,
    gpt2_weights,
    tokens,
    without_prefix,
    write,
)

import pretrained
from pretrained import gpt2_model, start_from

__all__ = ["tokens"]  # a fixture

# ---- the Hub -------------------------------------------------------------------------------------


def stand_in_for_the_hub(monkeypatch, tmp_path, cached):
    """huggingface_hub's download, from a folder; -> the calls that were made."""
    folder = write(tmp_path, gpt2_weights(vocabulary=50257), dict(vocab_size=50257))
    calls = []

    def hf_hub_download(repository, file, local_files_only=False):
        calls.append((repository, file, local_files_only))
        if local_files_only and not cached:
            raise FileNotFoundError("not in the cache")
        return f"{folder}/{file}"

    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(pretrained, "safetensors", lambda: None)
    monkeypatch.setitem(pretrained.HUB, "gpt2", (LAYERS, HEADS, C))
    monkeypatch.setattr(pretrained, "probe", lambda url, remedy: calls.append("probe"))
    return calls


@pytest.mark.parametrize("cached", [True, False])
def test_a_name_means_openais_weights_on_the_hub(cached, monkeypatch, tmp_path, tokens):
    calls = stand_in_for_the_hub(monkeypatch, tmp_path, cached)
    model = gpt2_model("gpt2", mixer="rtbp", n_streams=2, block_size=16)
    expected = gpt2_logits(without_prefix(gpt2_weights(vocabulary=50257)), tokens)
    assert (model(tokens)[0] - expected).abs().max() < 1e-4 and not model.training
    assert ("probe" in calls) != cached, "the network is asked only for what is not there"
    files = {call[1] for call in calls if call != "probe"}
    assert files == {"config.json", "pytorch_model.bin"}
    assert all(call[0] == "openai-community/gpt2" for call in calls if call != "probe")


@pytest.mark.quick
def test_without_a_network_a_name_is_refused_at_once(monkeypatch, tmp_path):
    from data import DataError

    def no_answer(url, remedy):
        raise DataError(f"{url} could not be reached; {remedy}")

    stand_in_for_the_hub(monkeypatch, tmp_path, cached=False)
    monkeypatch.setattr(pretrained, "probe", no_answer)
    with pytest.raises(ValueError, match="not in the Hub's cache either; name a folder") as error:
        gpt2_model("gpt2")
    assert "\n" not in str(error.value)


def test_the_names_know_the_sizes_of_openais_models():
    """The published numbers of parameters."""
    for name, millions in (("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774)):
        n_layer, n_head, n_embd = pretrained.HUB[name]
        assert n_embd // n_head == 64
        total = 12 * n_layer * n_embd**2 + (50257 + 1024) * n_embd
        assert round(total / 1e6) in range(millions - 3, millions + 1), name


@pytest.mark.quick
def test_heads_that_no_file_tells_are_said_to_be_guessed(tmp_path):
    torch.save(gpt2_weights(vocabulary=257), tmp_path / "alone.bin")
    meta = {"tokenizer": "bytes", "vocab_size": 257}
    lines = start_from(str(tmp_path / "alone.bin"), build(vocab_size=257), meta)
    assert f"nothing tells how many heads the weights have: {HEADS} are taken" in lines


# ---- train.py ------------------------------------------------------------------------------------


def knobs_of(out_dir):
    return SimpleNamespace(**json.loads((out_dir / "config.json").read_text()))


def test_knobs_that_nobody_named_follow_the_weights(tiny, tmp_path):
    weights = gpt2_weights(vocabulary=257)
    source = write(tmp_path, weights, dict(vocab_size=257))
    sizes = ("--n_layer", "--n_head", "--n_embd")
    bare = [item for item in tiny if not item.startswith(sizes)]
    bare += [f"--init_from={source}", "--max_iters=1", "--learning_rate=0.0", "--min_lr=0.0"]
    output = run(*bare)
    assert f"weights: {source}" in output and "positions 16 to 31" in output
    knobs = knobs_of(tmp_path / "out")
    assert (knobs.n_layer, knobs.n_head, knobs.n_embd, knobs.bias) == (LAYERS, HEADS, C, True)
    assert knobs.block_size == 16, "the command line's"
    state = torch.load(tmp_path / "out" / "ckpt_0000001.pt", weights_only=True)["model"]
    fc = state["blocks.1.mlp.c_fc.weight"]
    assert torch.equal(fc, weights["transformer.h.1.mlp.c_fc.weight"].t())

    other = [*bare, f"--out_dir={tmp_path}/other", "--n_layer=1", "--bias=False"]
    assert "Pass --n_layer=2 --bias=True" in run(*other, ok=False)
    assert not list((tmp_path / "other").glob("*.pt"))


def test_a_config_file_may_name_the_weights(tiny, tmp_path):
    source = write(tmp_path, gpt2_weights(vocabulary=257), dict(vocab_size=257))
    (tmp_path / "finetune.py").write_text(f"init_from = {source!r}\nn_head = 2\n")
    bare = [item for item in tiny if not item.startswith(("--n_layer", "--n_head", "--n_embd"))]
    run(*bare, f"{tmp_path}/finetune.py", "--max_iters=1")
    assert knobs_of(tmp_path / "out").n_embd == C


def test_gpt2s_weights_are_refused_for_other_tokens(tiny, tmp_path):
    source = write(tmp_path, gpt2_weights(vocabulary=50257), dict(vocab_size=50257))
    bare = [item for item in tiny if not item.startswith(("--n_layer", "--n_head", "--n_embd"))]
    output = run(*bare, f"--init_from={source}", ok=False)
    assert "--tokenizer gpt2" in output
