"""
Weights of GPT-2's kind, into a model of ours with any mixer.

    >>> model = gpt2_model("gpt2")                                # OpenAI's, one stream
    >>> model = gpt2_model("gpt2", mixer="tbp", n_streams=4)      # the same function, four streams

A source of weights is
    gpt2, gpt2-medium, gpt2-large, gpt2-xl   OpenAI's, from the Hugging Face Hub
    FOLDER      as transformers writes it: config.json beside model.safetensors or pytorch_model.bin
    FILE        one of those, whatever its name, or the ckpt.pt of nanoGPT
    gpt2:FILE   the same, in the spelling of older commands

A weight that is missing is an error, and so is one that nothing uses: the model would compute
something else without a word. Files are read with weights_only=True, so they run no code.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import load_tensors
from data import probe
from model import GPT, GPTConfig
from tokenizer import same_tokens, tokenizer_name

# n_layer, n_head and n_embd by the names that OpenAI's weights have on the Hub.
HUB = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
GPT2_VOCABULARY = (50257, 50304)  # how many tokens GPT-2 has; the same, padded as in nanoGPT

# What config.json may say besides the sizes: the values of the model that model.py computes.
ARCHITECTURE = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
# The sizes by their names in config.json, and in GPTConfig.
SIZES = dict(n_layer="n_layer", n_embd="n_embd", n_positions="block_size", vocab_size="vocab_size")

ENDS = ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class Weights(NamedTuple):
    """Weights of GPT-2's kind under GPT-2's names; linear layers are (out, in), as in torch.

    sizes   of the model, by the names of GPTConfig's fields: n_layer, n_embd, n_mlp, bias,
            block_size, vocab_size, and n_head where a file says it
    notes   lines for the user on how our model differs from the one that the weights are from
    """

    source: str
    state: dict
    sizes: dict
    notes: list


# ---- for the scripts -----------------------------------------------------------------------------


def is_gpt2(source):
    """Whether `source` seems to name weights of GPT-2's kind; `read_weights` may still refuse them.

    False for a checkpoint of ours, the folder of a run, and what does not exist. Uses no network.
    """
    if source in ("scratch", "resume", "auto"):
        return False
    if source in HUB or source.startswith("gpt2:"):
        return True
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return is_described(path / "config.json")
        if not path.is_file() or not zipfile.is_zipfile(path):
            return path.is_file()  # a checkpoint of ours is a zip file
        state = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        return "model_config" not in state
    except Exception:  # whatever a damaged file raises: read_weights says what is wrong with it
        return True


def gpt2_model(source, **changes):
    """-> a GPT in eval mode, in float32 on the CPU, that computes what the weights' own model does.

    changes: fields of GPTConfig, such as mixer="tbp", n_streams=4 or a shorter block_size. Without
    them the model has one stream. Its tokens are those of the tokenizer gpt2; weights of another
    vocabulary are refused. Raises ValueError or RunError.
    """
    weights = read_weights(source)
    if weights.sizes["vocab_size"] not in GPT2_VOCABULARY:
        raise ValueError(
            f"{source}: its vocabulary has {weights.sizes['vocab_size']:,} tokens and not GPT-2's "
            f"50,257, so its text needs another tokenizer. Name it: python convert.py import "
            f"{source} out/converted --tokenizer=…, then python sample.py --out_dir=out/converted"
        )
    return build(weights, **changes).eval()


def knobs(source):
    """["--n_layer=12", ...]: the knobs of train.py that a model for these weights needs.

    The user's own knobs come after them and win. `start_from` refuses those that do not fit, and
    says what is wrong with a source that cannot be read; here that gives [].
    """
    if source in HUB:
        n_layer, n_head, n_embd = HUB[source]
        sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=True, block_size=1024)
    else:
        try:
            sizes = with_heads(read_weights(source).sizes)
        except (RuntimeError, ValueError):
            return []
    return [f"--{name}={value}" for name, value in sizes.items() if name != "vocab_size"]


def start_from(source, model, meta):
    """Copy the weights of `source` into `model`, which is to train on a data set -> notes, lines.

    meta: of the data set, with tokenizer and vocab_size. Raises ValueError or RunError for weights
    that do not fit the model, and for a data set with other tokens than theirs.
    """
    weights = read_weights(source)
    vocab_size = weights.sizes["vocab_size"]
    known = vocab_size in GPT2_VOCABULARY
    if known and not same_tokens(meta["tokenizer"], "gpt2"):
        raise ValueError(
            f"the weights of {source} know GPT-2's tokens, and the data set's are of another "
            f"tokenizer, {tokenizer_name(meta['tokenizer'])}. Prepare the text again: "
            "python prepare_data.py --tokenizer gpt2 …"
        )
    # An adopted data set of nanoGPT's characters has one token more, the end of text.
    if not known and vocab_size not in (meta["vocab_size"], meta["vocab_size"] - 1):
        raise ValueError(
            f"the weights of {source} know {vocab_size:,} tokens, and the data "
            f"set's tokenizer, {tokenizer_name(meta['tokenizer'])}, has {meta['vocab_size']:,}. "
            "Prepare the text with the tokenizer of the weights"
        )
    notes = load_weights(model, weights)
    if not known:
        notes.append(f"nothing tells the tokenizer of {source}: it is taken for the data set's")
    return [f"weights: {source}", *notes]


# ---- from files to weights -----------------------------------------------------------------------


def read_weights(source):
    """-> Weights. Raises ValueError or RunError for weights that are missing or not GPT-2's."""
    files, config_file = find_files(source)
    config = read_json(config_file) if config_file else None
    state = {}
    for file in files:
        state |= read_tensors(file)
    sizes, notes = {}, []
    if {"model", "model_args"} <= state.keys():  # nanoGPT's
        sizes["n_head"], state = state["model_args"]["n_head"], state["model"]
        notes.append(
            "nanoGPT's GELU is the exact one and ours its approximation by tanh, as in GPT-2: "
            "they differ by less than 0.0005"
        )
    state = torch_layout(source, plain_names(source, state))
    sizes |= sizes_of(source, state)
    check_names(source, state, sizes)
    if config:
        sizes["n_head"] = check_config(config_file, config, sizes)
    return Weights(source, state, sizes, notes)


def find_files(source):
    """-> the files of the weights, and the config.json that describes them, or None."""
    if source in HUB:
        name = "model.safetensors" if safetensors() else "pytorch_model.bin"
        return [download(source, name)], download(source, "config.json")
    path = Path(source.removeprefix("gpt2:")).expanduser()
    if path.is_file():
        config = path.with_name("config.json")
        return [path], config if is_described(config) else None
    if not path.is_dir():
        raise ValueError(
            f"{path}: no such file or folder; GPT-2's weights are one of {', '.join(HUB)}, a "
            "folder with config.json and model.safetensors, or a file"
        )
    if not (path / "config.json").exists():
        raise ValueError(f"{path}: it has no config.json, as a folder of transformers' has")
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.exists():  # a large model is cut in several files
            parts = sorted(set(read_json(index)["weight_map"].values()))
            return [path / part for part in parts], path / "config.json"
        if (path / name).exists():
            return [path / name], path / "config.json"
    raise ValueError(f"{path}: it has neither model.safetensors nor pytorch_model.bin")


def is_described(config_file):
    """Whether there is a config.json of transformers; those of our runs have no model_type."""
    return config_file.exists() and "model_type" in read_json(config_file)


def download(name, file):
    """-> the path of a file of OpenAI's, from the Hub's cache or else from the Hub. Raises
    ValueError."""
    remedy = "name a folder instead that has config.json and the weights"
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError as error:
        raise ValueError(
            f"{name} comes from the Hub: pip install huggingface_hub, or {remedy}"
        ) from error
    repository = f"openai-community/{name}"
    try:
        return hf_hub_download(repository, file, local_files_only=True)
    except OSError:  # not in the cache
        probe(constants.ENDPOINT, f"{name} is not in the Hub's cache either; {remedy}")
    try:
        return hf_hub_download(repository, file)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{repository}/{file} could not be fetched ({reason}); {remedy}"
        ) from error


def safetensors():
    """The library's module for torch, or None where it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        return None
    return safetensors.torch


def read_tensors(path):
    """-> the dict in a .safetensors or a torch file. Raises ValueError or RunError."""
    if Path(path).suffix != ".safetensors":
        return load_tensors(path)
    if not safetensors():
        raise ValueError(f"{path}: to read it, pip install safetensors")
    try:
        return safetensors().load_file(path)
    except Exception as error:  # the library's own, or the file system's
        raise ValueError(f"{path}: could not be read ({str(error)[:200]})") from error


def read_json(path):
    """-> the dict in a JSON file. Raises ValueError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: could not be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is wanted, not a {type(content).__name__}")
    return content


def plain_names(source, state):
    """The weights under GPT-2's plain names ("h.0.attn.c_attn.weight"), without what is no weight:
    causal masks, and a head that is the token embedding again. Raises ValueError."""
    if "model_config" in state:
        raise ValueError(
            f"{source}: a checkpoint of this project, and not weights of GPT-2's kind; "
            "python sample.py --checkpoint=… samples it"
        )
    plain = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{source}: {name!r} is no tensor; weights alone are wanted")
        short = re.sub(r"^(_orig_mod\.|module\.|transformer\.)*", "", name)
        if short in plain:
            raise ValueError(f"{source}: it has {short} twice, once as {name}")
        if not re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", short):
            plain[short] = tensor
    head = plain.pop("lm_head.weight", None)
    if head is not None and not ("wte.weight" in plain and torch.equal(head, plain["wte.weight"])):
        raise ValueError(
            f"{source}: lm_head.weight differs from wte.weight, and this model's head is its "
            "token embedding (tied weights)"
        )
    return plain


def torch_layout(source, state):
    """Linear layers as (out, in). transformers stores GPT-2's as (in, out), nanoGPT as torch does;
    c_attn, which has three times as many outputs as inputs, tells which."""
    first = state.get("h.0.attn.c_attn.weight")
    if first is None or first.ndim != 2 or 3 * first.shape[0] != first.shape[1]:
        return state
    linear = re.compile(rf"h\.\d+\.({'|'.join(map(re.escape, LINEAR))})\.weight")
    return {name: t.t() if linear.fullmatch(name) else t for name, t in state.items()}


def sizes_of(source, state):
    """The sizes, from the shapes. Raises ValueError where the largest weights are missing."""
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
        if name not in state or state[name].ndim != 2:
            raise ValueError(
                f"{source}: it has no matrix {name}, so these are no weights of GPT-2's kind; "
                f"there are {', '.join(list(state)[:4]) or 'none at all'}"
            )
    vocab_size, n_embd = state["wte.weight"].shape
    inside = state["h.0.mlp.c_fc.weight"].shape[0]
    layers = [int(name.split(".")[1]) for name in state if re.match(r"h\.\d+\.", name)]
    return {
        "n_layer": max(layers) + 1,
        "n_embd": n_embd,
        "n_mlp": 0 if inside == 4 * n_embd else inside,
        "bias": any(name.endswith(".bias") for name in state),
        "block_size": len(state["wpe.weight"]),
        "vocab_size": vocab_size,
    }


def check_names(source, state, sizes):
    """Raises ValueError unless `state` has exactly the weights of a GPT-2 with these sizes."""
    expected = set(ENDS)
    for layer in range(sizes["n_layer"]):
        for part in ("ln_1", "ln_2", *LINEAR):
            expected |= {f"h.{layer}.{part}.weight", f"h.{layer}.{part}.bias"}
    if not sizes["bias"]:
        expected = {name for name in expected if not name.endswith(".bias")}
    if missing := sorted(expected - set(state)):
        raise ValueError(
            f"{source}: {len(missing)} weights are missing, the first is {missing[0]}; a model of "
            f"{sizes['n_layer']} layers {'with' if sizes['bias'] else 'without'} biases has them"
        )
    if unused := sorted(set(state) - expected):
        raise ValueError(
            f"{source}: nothing here uses {len(unused)} of its weights, the first is {unused[0]}: "
            "it is another model than GPT-2"
        )


def check_config(path, config, sizes):
    """-> n_head. config: the content of the config.json at `path`. Raises ValueError where it does
    not describe these weights, or not the model that model.py computes."""
    for name, allowed in ARCHITECTURE.items():
        if name in config and config[name] not in allowed:
            raise ValueError(
                f"{path}: {name} is {config[name]!r}, and model.py computes only {allowed[0]!r}"
            )
    for name, ours in SIZES.items():
        if name in config and config[name] != sizes[ours]:
            raise ValueError(f"{path}: {name} is {config[name]}, in the weights {sizes[ours]}")
    if not isinstance(config.get("n_head"), int):
        raise ValueError(f"{path}: it does not tell n_head")
    return config["n_head"]


# ---- from weights to a model ---------------------------------------------------------------------


def with_heads(sizes):
    """The sizes with n_head. Where no file says it, a head has 64 channels, as OpenAI's have."""
    if "n_head" in sizes or sizes["n_embd"] % 64:
        return sizes
    return {"n_head": sizes["n_embd"] // 64, **sizes}


def build(weights, **changes):
    """-> a GPT with these weights. changes: fields of GPTConfig, as in `gpt2_model`."""
    fields = {"mixer": "residual", "n_streams": 1} | with_heads(weights.sizes) | changes
    if "n_head" not in fields:
        raise ValueError(f"nothing tells how many heads {weights.source} has; pass n_head")
    model = GPT(GPTConfig(**fields))
    load_weights(model, weights)
    return model


@torch.no_grad()
def load_weights(model, weights):
    """Copy Weights into the branches and embeddings of a model with any mixer -> notes, lines.

    If the connections are at their start, the model then computes what the weights' own model
    computes. Positions beyond block_size are left out, and a note says so. The model's rows for
    tokens that the weights do not have stay as they are. Raises ValueError where sizes or shapes
    differ.
    """
    check_sizes(model.config, weights)
    names = {name: gpt2_name(name) for name, _ in model.named_parameters() if gpt2_has(name)}
    parameters = dict(model.named_parameters())
    for name, theirs in names.items():
        parameter, tensor = parameters[name], weights.state[theirs]
        rows = len(parameter)
        if name.startswith("embed."):  # `check_sizes` allows other numbers of rows
            rows = min(rows, len(tensor))
            tensor = tensor[:rows]
        if tensor.shape != parameter[:rows].shape:
            raise ValueError(
                f"{weights.source}: {theirs} has the shape {tuple(tensor.shape)}, and "
                f"{tuple(parameter.shape)} is wanted, (out, in) in a linear layer"
            )
        parameter[:rows] = tensor

    notes, config = list(weights.notes), model.config
    if config.block_size < weights.sizes["block_size"]:
        notes.append(
            f"positions {config.block_size} to {weights.sizes['block_size'] - 1} of the weights "
            f"are left out: block_size is {config.block_size}"
        )
    if "n_head" not in weights.sizes:
        notes.append(f"nothing tells how many heads the weights have: {config.n_head} are taken")
    return notes


def check_sizes(config, weights):
    """Raises ValueError, with the knobs to pass, unless the weights fit a model of this config."""
    sizes, wrong = weights.sizes, {}
    for name in ("n_layer", "n_head", "n_embd", "n_mlp", "bias"):
        if name in sizes and getattr(config, name) != sizes[name]:
            wrong[name] = sizes[name]
    if config.n_mlp == 4 * config.n_embd and sizes["n_mlp"] == 0:
        wrong.pop("n_mlp", None)
    if config.block_size > sizes["block_size"]:
        wrong["block_size"] = sizes["block_size"]
    if config.embed_scale != 1:
        wrong["embed_scale"] = 1.0

    if wrong:
        said = [f"{name} {value}, not {getattr(config, name)}" for name, value in wrong.items()]
        passed = [f"--{name}={value}" for name, value in wrong.items()]
        raise ValueError(
            f"the weights of {weights.source} have {'; '.join(said)}. Pass {' '.join(passed)}, "
            "after any config file"
        )
    if config.vocab_size < sizes["vocab_size"]:
        raise ValueError(
            f"the weights of {weights.source} know {sizes['vocab_size']:,} tokens, and the model "
            f"has room for {config.vocab_size:,}"
        )


def gpt2_has(name):
    """Whether GPT-2 has this parameter. It has none of those that handle streams."""
    return not any(part in name for part in (".hc_", "read_out", "offsets", "x0_scalars"))


def gpt2_name(name):
    """A parameter's name in GPT-2: "blocks.3.ln_1.weight" -> "h.3.ln_1.weight"."""
    return name.replace("embed.", "").replace("blocks.", "h.").replace("head.", "")
