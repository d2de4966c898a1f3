"""Weights of GPT-2's kind: against a GPT-2 written by hand, against transformers, and refusals."""

import json
import math
import re

import pytest
import torch
from torch.nn import functional as F

import pretrained
from mixers import MIXERS
from model import GPT, GPTConfig
from pretrained import gpt2_model, is_gpt2, load_weights, read_weights, start_from

C, HEADS, LAYERS, POSITIONS, VOCABULARY = 24, 2, 2, 32, 61
SIZES = dict(block_size=16, vocab_size=64, n_layer=LAYERS, n_head=HEADS, n_embd=C, bias=True)
GPT2_TOKENS = {"tokenizer": "gpt2", "vocab_size": 50257}


def gpt2_weights(seed=1, layers=LAYERS, vocabulary=VOCABULARY, prefix="transformer."):
    """GPT-2's weights under transformers' names, linear layers (in, out), nothing zero."""
    shapes = {"wte.weight": (vocabulary, C), "wpe.weight": (POSITIONS, C)}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    linear = {
        "attn.c_attn": (C, 3 * C),
        "attn.c_proj": (C, C),
        "mlp.c_fc": (C, 4 * C),
        "mlp.c_proj": (4 * C, C),
    }
    for layer in range(layers):
        for norm in ("ln_1", "ln_2"):
            shapes[f"h.{layer}.{norm}.weight"] = shapes[f"h.{layer}.{norm}.bias"] = (C,)
        for name, shape in linear.items():
            shapes[f"h.{layer}.{name}.weight"] = shape
            shapes[f"h.{layer}.{name}.bias"] = shape[1:]
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix + name: torch.randn(shape, generator=generator) / 5 for name, shape in shapes.items()
    }


def gelu_tanh(h):
    return 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))


def gpt2_logits(w, tokens, gelu=gelu_tanh):
    """GPT-2 by hand: weights without prefix, tokens (B, T) -> logits (B, T, V)."""
    B, T = tokens.shape

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w.get(name + ".bias", 0)

    def linear(x, name):
        return x @ w[name + ".weight"] + w.get(name + ".bias", 0)

    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for layer in range(LAYERS):
        h = f"h.{layer}"
        q, k, v = linear(norm(x, h + ".ln_1"), h + ".attn.c_attn").split(C, -1)
        q, k, v = (t.view(B, T, HEADS, C // HEADS).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / (C // HEADS) ** 0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
        x = x + linear((scores @ v).transpose(1, 2).reshape(B, T, C), h + ".attn.c_proj")
        x = x + linear(gelu(linear(norm(x, h + ".ln_2"), h + ".mlp.c_fc")), h + ".mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].t()


def without_prefix(weights):
    return {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}


def build(mixer="tbp", **changes):
    torch.manual_seed(0)
    n_streams = 1 if MIXERS[mixer].one_stream else 4
    return GPT(GPTConfig(**SIZES | {"mixer": mixer, "n_streams": n_streams} | changes))


def write(tmp_path, weights, config=None, name="pytorch_model.bin"):
    """A folder as transformers writes it; config: changes of config.json, False for none."""
    folder = tmp_path / "weights"
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / name)
    if config is not False:
        content = dict(model_type="gpt2", n_layer=LAYERS, n_head=HEADS, n_embd=C)
        content |= dict(n_positions=POSITIONS, vocab_size=VOCABULARY) | (config or {})
        (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(7))


# ---- what the loaded model computes --------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_model_computes_what_gpt2_computes(mixer, tmp_path, tokens):
    weights = gpt2_weights()
    model = build(mixer)
    load_weights(model, read_weights(write(tmp_path, weights)))
    expected = gpt2_logits(without_prefix(weights), tokens)
    assert (model(tokens)[0][..., :VOCABULARY] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["safetensors", "sharded", "file", "old", "no prefix", "half"])
def test_the_same_from_every_form(form, tmp_path, tokens, monkeypatch):
    weights = gpt2_weights(prefix="" if form == "no prefix" else "transformer.")
    if form == "half":
        weights = {name: tensor.half() for name, tensor in weights.items()}
    folder = tmp_path / "a folder [1] *"
    folder.mkdir()
    source = write(folder, weights)
    if form == "safetensors":
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file(weights, f"{source}/model.safetensors")
        (folder / "weights" / "pytorch_model.bin").unlink()
    if form == "sharded":
        names, parts = list(weights), {}
        for number, chosen in enumerate((names[:9], names[9:])):
            torch.save({name: weights[name] for name in chosen}, f"{source}/part{number}.bin")
            parts |= dict.fromkeys(chosen, f"part{number}.bin")
        index = folder / "weights" / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": parts}))
        (folder / "weights" / "pytorch_model.bin").unlink()
    if form == "file":
        source += "/pytorch_model.bin"
    if form == "old":
        monkeypatch.setenv("HOME", str(folder))
        source = "gpt2:~/weights/pytorch_model.bin"
    assert is_gpt2(source)
    weights = {name: tensor.float() for name, tensor in without_prefix(weights).items()}
    model = pretrained.build(read_weights(source))
    assert (model(tokens)[0] - gpt2_logits(weights, tokens)).abs().max() < 1e-4


def transformers_model(tmp_path):
    """A folder and the model in it: a random GPT-2 of 3 layers, no bias 0, from transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=83, n_positions=24, n_embd=48, n_layer=3, n_head=4, n_inner=80
    )
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    return str(tmp_path / "theirs"), model


@pytest.mark.parametrize("mixer", ["residual", "sinkhorn"])
def test_the_logits_of_transformers(mixer, tmp_path):
    source, theirs = transformers_model(tmp_path)
    n_streams = 1 if mixer == "residual" else 3
    model = pretrained.build(read_weights(source), mixer=mixer, n_streams=n_streams).eval()
    idx = torch.randint(83, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        off = (model(idx)[0] - theirs(idx).logits).abs().max()
    assert off < 1e-4 and theirs(idx).logits.std() > 0.1


def nanogpt_checkpoint(bias=True):
    """What nanoGPT's train.py saves of a compiled model: linear layers (out, in)."""
    weights = {}
    for name, tensor in gpt2_weights().items():
        if bias or not name.endswith(".bias"):
            linear = tensor.ndim == 2 and ".h." in name
            weights["_orig_mod." + name] = tensor.t().contiguous() if linear else tensor
    weights["_orig_mod.lm_head.weight"] = weights["_orig_mod.transformer.wte.weight"]
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
    sizes = dict(n_layer=LAYERS, n_head=HEADS, n_embd=C, block_size=POSITIONS)
    sizes |= dict(bias=bias, vocab_size=VOCABULARY, dropout=0.0)
    return {"model": weights, "model_args": sizes, "iter_num": 7, "config": {}, "optimizer": {}}


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint_computes_what_nanogpt_computes(bias, tmp_path, tokens):
    torch.save(nanogpt_checkpoint(bias), tmp_path / "ckpt.pt")
    assert is_gpt2(str(tmp_path / "ckpt.pt"))
    weights = read_weights(str(tmp_path / "ckpt.pt"))
    logits = pretrained.build(weights)(tokens)[0]
    w = without_prefix(gpt2_weights())
    w = {name: tensor for name, tensor in w.items() if bias or not name.endswith(".bias")}
    assert (logits - gpt2_logits(w, tokens)).abs().max() < 1e-4
    exact = (logits - gpt2_logits(w, tokens, F.gelu)).abs().max()
    assert 1e-5 < exact < 1e-2, "nanoGPT's own GELU is another, as a note says"
    assert any("GELU" in note for note in weights.notes)


def test_the_note_on_nanogpts_gelu_is_true():
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    assert 4e-4 < (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() < 5e-4


# ---- refusals ------------------------------------------------------------------------------------


def with_extra(weights):
    weights["transformer.h.0.attn.rotary.weight"] = torch.ones(3)


def with_another_head(weights):
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 0.1


def with_a_hole(weights):
    del weights["transformer.h.1.ln_2.bias"]


def with_a_layer_missing(weights):
    for name in list(weights):
        if ".h.0." in name:
            weights[name.replace(".h.0.", ".h.2.")] = weights.pop(name)


def with_a_wrong_shape(weights):
    weights["transformer.h.1.attn.c_proj.weight"] = torch.ones(C, C + 1)


def with_twice_the_same(weights):
    weights["wte.weight"] = weights["transformer.wte.weight"] + 1


def with_a_number(weights):
    weights["epoch"] = 3


@pytest.mark.quick
@pytest.mark.parametrize(
    "spoil, says",
    [
        (with_extra, r"nothing here uses 1 of its weights, the first is h.0.attn.rotary.weight"),
        (with_another_head, r"lm_head.weight differs from wte.weight"),
        (with_a_hole, r"1 weights are missing, the first is h.1.ln_2.bias"),
        (with_a_layer_missing, r"no matrix h.0.mlp.c_fc.weight"),
        (with_a_wrong_shape, r"h.1.attn.c_proj.weight has the shape .*\(24, 24\) is wanted"),
        (with_twice_the_same, r"wte.weight twice"),
        (with_a_number, r"'epoch' is no tensor"),
    ],
)
def test_weights_that_are_not_gpt2s_are_refused(spoil, says, tmp_path):
    weights = gpt2_weights()
    spoil(weights)
    with pytest.raises(ValueError, match=says) as error:
        load_weights(build(), read_weights(write(tmp_path, weights)))
    assert len(str(error.value)) < 1000


def test_masks_and_a_tied_head_are_no_weights(tmp_path, tokens):
    weights = gpt2_weights()
    extra = {"lm_head.weight": weights["transformer.wte.weight"].clone()}
    for layer in range(LAYERS):
        extra[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
        extra[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    model = pretrained.build(read_weights(write(tmp_path, weights | extra)))
    expected = gpt2_logits(without_prefix(weights), tokens)
    assert (model(tokens)[0] - expected).abs().max() < 1e-4


@pytest.mark.quick
@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(n_layer=1), "n_layer 2, not 1. Pass --n_layer=2"),
        (dict(n_layer=3), "n_layer 2, not 3. Pass --n_layer=2"),
        (dict(bias=False), "bias True, not False. Pass --bias=True"),
        (dict(n_head=3), "n_head 2, not 3. Pass --n_head=2"),
        (dict(n_embd=48), "n_embd 24, not 48. Pass --n_embd=24"),
        (dict(n_mlp=8), "n_mlp 0, not 8. Pass --n_mlp=0"),
        (dict(block_size=33), "block_size 32, not 33. Pass --block_size=32"),
        (dict(embed_scale=2.0), "embed_scale 1.0, not 2.0. Pass --embed_scale=1.0"),
        (dict(vocab_size=60), "know 61 tokens, and the model has room for 60"),
        (dict(n_layer=1, bias=False, n_head=3), "Pass --n_layer=2 --n_head=2 --bias=True"),
    ],
)
def test_a_model_of_other_sizes_is_refused_with_what_to_pass(changes, says, tmp_path):
    weights = read_weights(write(tmp_path, gpt2_weights()))
    model = build(**changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(says)):
        load_weights(model, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_with_biases_refuses_weights_without(tmp_path):
    weights = {k: v for k, v in gpt2_weights().items() if not k.endswith(".bias")}
    with pytest.raises(ValueError, match="Pass --bias=False"):
        load_weights(build(), read_weights(write(tmp_path, weights)))
    load_weights(build(bias=False), read_weights(write(tmp_path, weights)))


@pytest.mark.quick
@pytest.mark.parametrize(
    "config, says",
    [
        (dict(model_type="llama"), "model_type is 'llama'"),
        (dict(activation_function="relu"), "activation_function is 'relu'"),
        (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings is False"),
        (dict(n_layer=5), "n_layer is 5, in the weights 2"),
        (dict(n_positions=64), "n_positions is 64, in the weights 32"),
        (dict(n_head=None), "does not tell n_head"),
    ],
)
def test_a_config_of_another_model_is_refused(config, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read_weights(write(tmp_path, gpt2_weights(), config))


@pytest.mark.parametrize(
    "meta, says",
    [
        (dict(tokenizer="bytes", vocab_size=257), "--tokenizer gpt2"),
        (GPT2_TOKENS, None),
        (dict(tokenizer="r50k_base", vocab_size=50257), None),
    ],
)
def test_gpt2s_weights_take_gpt2s_tokens_alone(meta, says, tmp_path):
    source = write(tmp_path, gpt2_weights(vocabulary=50257), dict(vocab_size=50257))
    model = build(vocab_size=50304)
    if says:
        with pytest.raises(ValueError, match=says):
            start_from(source, model, meta)
        assert not torch.equal(model.embed.wte.weight, read_weights(source).state["wte.weight"])
    else:
        assert start_from(source, model, meta)[0] == f"weights: {source}"


def test_a_vocabulary_of_their_own_must_be_the_data_sets(tmp_path):
    source = write(tmp_path, gpt2_weights())
    lines = start_from(source, build(), {"tokenizer": "mine", "vocab_size": VOCABULARY})
    assert any("taken for the data set's" in line for line in lines)
    for meta in (GPT2_TOKENS, {"tokenizer": "bytes", "vocab_size": 257}):
        with pytest.raises(ValueError, match="know 61 tokens"):
            start_from(source, build(vocab_size=50304), meta)
    with pytest.raises(ValueError, match="another tokenizer"):
        gpt2_model(source)


def test_positions_left_out_and_heads_guessed_are_said(tmp_path):
    source = write(tmp_path, gpt2_weights(), config=False) + "/pytorch_model.bin"
    notes = load_weights(build(), read_weights(source))
    assert any("positions 16 to 31 of the weights are left out" in note for note in notes)
    assert any("nothing tells how many heads" in note and "2 are taken" in note for note in notes)
    notes = load_weights(build(block_size=32), read_weights(write(tmp_path, gpt2_weights())))
    assert not notes


@pytest.mark.quick
@pytest.mark.parametrize(
    "source, says",
    [
        ("nowhere.bin", "nowhere.bin: no such file or folder"),
        ("gpt2-small", "gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
        ("empty", "no config.json"),
        ("no weights", "neither model.safetensors nor pytorch_model.bin"),
        ("text.bin", "text.bin: refused"),
        ("list.bin", "a dict of tensors is wanted"),
        ("text.safetensors", "text.safetensors: could not be read"),
        ("bad json", "config.json: could not be read"),
    ],
)
def test_what_cannot_be_read_is_named(source, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "no weights", "bad json"):
        (tmp_path / folder).mkdir()
    (tmp_path / "no weights" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "bad json" / "config.json").write_text("{")
    (tmp_path / "bad json" / "pytorch_model.bin").write_text("")
    (tmp_path / "text.bin").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises((ValueError, RuntimeError), match=re.escape(says)) as error:
        read_weights(source)
    assert len(str(error.value)) < 1000
    assert is_gpt2(source) == (source not in ("nowhere.bin", "gpt2-small", "empty"))


def test_code_in_a_file_does_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"wte.weight": Attack()}, tmp_path / "weights.bin")
    with pytest.raises(RuntimeError, match="refused"):
        read_weights(str(tmp_path / "weights.bin"))
    assert is_gpt2(str(tmp_path / "weights.bin")) and not (tmp_path / "ran").exists()
