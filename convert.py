"""
Checkpoints from elsewhere, to elsewhere, and from one mixer to another.

    python convert.py import gpt2 out/gpt2                      # OpenAI's weights, from the Hub
    python convert.py import ~/nanoGPT/out/ckpt.pt out/nano     # nanoGPT's
    python convert.py export out/residual exported/residual     # transformers loads the folder
    python convert.py export out/tbp exported/tbp               # n streams: safetensors, config
    python convert.py import exported/tbp out/back              # and back
    python convert.py mixer out/gpt2 out/gpt2-tbp --mixer=tbp --n_streams=4
    python convert.py mixer out/tbp out/rtbp --mixer=rtbp --data=data/openwebtext

A checkpoint of ours is named by its path, or by the folder of its run, which means its newest whole
one. `import` and `mixer` write a checkpoint that sample.py takes, and from which train.py can begin
a run. It has no optimizer state, so no run can be resumed from it.

remix.py says what becomes of the parameters of one mixer in another.
"""

import argparse
import math
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import checkpoint
import pretrained
from data import read_meta, write_atomic, write_json
from mixers import OPTIONS, find_mixer
from model import GPT, GPTConfig
from progress import Progress
from remix import drop_misleading_rows, report_differences, sequences, with_mixer
from runtime import RunError, provenance, run_script
from tokenizer import describe, sizes
from trained import load_model

OURS = "mixed_residual_streams"  # the key in config.json of what only this project knows
GPT2_PARTS = {  # the modules with parameters, those of a block without its number
    *("embed.wte", "embed.wpe", "head.ln_f"),
    *("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
}
OF_CHARACTERS = (
    "the folder of a data set: for nanoGPT's characters, the one that prepare_data.py --adopt made"
)


def main():
    arguments = parse()
    if arguments.command != "export":
        check_new(arguments.out_dir)
    if arguments.command == "import":
        import_weights(arguments.source, arguments.out_dir, arguments.tokenizer)
    elif arguments.command == "export":
        export(arguments.source, Path(arguments.folder).expanduser())
    else:
        convert_mixer(arguments)


def parse():
    about, epilog = __doc__.split("\n\n", 1)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=epilog, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("import", help="weights of others -> a checkpoint of ours")
    command.add_argument("source", help=f"{', '.join(pretrained.HUB)}, a folder or a file")
    command.add_argument("out_dir", type=os.path.expanduser, help="folder for the checkpoint")
    command.add_argument("--tokenizer", help="if nothing tells it: gpt2, bytes, …, or a folder")

    command = commands.add_parser("export", help="a checkpoint of ours -> safetensors and config")
    command.add_argument("source", help="a run's folder or a checkpoint")
    command.add_argument("folder", help="a new folder")

    command = commands.add_parser("mixer", help="a checkpoint of ours -> one with another mixer")
    command.add_argument("source", help="a run's folder or a checkpoint")
    command.add_argument("out_dir", type=os.path.expanduser, help="folder for the new checkpoint")
    command.add_argument("--mixer", required=True, help="the other mixer")
    command.add_argument("--n_streams", type=int, help="how many, if the source has one stream")
    command.add_argument("--data", help="folder of a data set to compare the models on")
    command.add_argument("--tokens", type=int, default=4096, help="how many to compare them on")
    command.add_argument(
        "--most_off",
        type=float,
        default=1e-3,
        help="refuse if the new M, before a token adds to it, is off by more (default 0.001)",
    )
    for name, option in OPTIONS.items():
        command.add_argument(f"--{name}", type=type(option.default), help=option.comment)
    return parser.parse_args()


# ---- checkpoints ---------------------------------------------------------------------------------


def check_new(out_dir):
    """Raises RunError for a folder that has a run already."""
    if there := checkpoint.checkpoints(out_dir):
        raise RunError(f"{out_dir} holds a run already ({there[-1].name}); name a new folder")


def save(out_dir, model, about):
    """Write the model as a checkpoint and say so. about: other keys of the checkpoint.

    Raises RunError for a folder that has a run already.
    """
    _lock = checkpoint.lock(out_dir)
    check_new(out_dir)  # another process may have been faster
    state = {"config": {}, "shards": None} | vars(Progress())
    state |= about | {
        "model": model.state_dict(),
        "optimizer": {},  # by which `checkpoint` knows that there is no run to resume
        "model_config": asdict(model.config),
        "command": sys.argv,
        "provenance": provenance(),
    }
    path = checkpoint.save(out_dir, state, keep=1, best=False)
    print(f"wrote {path}; sample with: python sample.py --out_dir={out_dir}")


# ---- import --------------------------------------------------------------------------------------


def import_weights(source, out_dir, tokenizer):
    """Weights of others, or a folder that `export` wrote -> a checkpoint.

    Raises ValueError or RunError."""
    config_file = Path(source).expanduser() / "config.json"
    about = pretrained.read_json(config_file).get(OURS) if config_file.exists() else None
    if about and tokenizer:
        raise ValueError(f"{config_file} tells the tokenizer; leave --tokenizer out")
    if about and "model_config" in about:
        save(out_dir, read_exported(config_file, about.pop("model_config")), about)
        return
    weights = pretrained.read_weights(source)
    vocab_size = weights.sizes["vocab_size"]
    if not about:
        description, n_vocab = tokens_of(source, vocab_size, tokenizer)
        about = {"tokenizer": description, "n_vocab": n_vocab}
    model = pretrained.build(weights, vocab_size=max(vocab_size, about["n_vocab"]))
    for note in weights.notes:
        print(note)
    if about["n_vocab"] > vocab_size:
        print(f"the weights have no end of text: token {vocab_size} is new, its embedding random")
    save(out_dir, model, about)


def read_exported(config_file, model_config):
    """-> the model in a folder that `export` wrote. Raises ValueError."""
    tensors = pretrained.read_tensors(config_file.with_name("model.safetensors"))
    try:
        model = GPT(GPTConfig(**model_config))
        model.load_state_dict(tensors)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{config_file.parent}: not a model of this model.py ({' '.join(str(error).split())})"
        ) from error
    return model


def tokens_of(source, vocab_size, tokenizer):
    """-> (description, number of tokens) of the tokenizer of imported weights. Raises ValueError.

    tokenizer: a name or a tokenizer.json, as prepare_data.py takes them; or the folder of a data
    set with this tokenizer; or None.
    """
    if tokenizer is None and vocab_size in pretrained.GPT2_VOCABULARY:
        tokenizer = "gpt2"
    if tokenizer is None:
        raise ValueError(
            f"{source}: nothing tells the tokenizer of its {vocab_size:,} tokens. Pass "
            f"--tokenizer=gpt2, bytes, another name or a tokenizer.json, or {OF_CHARACTERS}"
        )
    if tokenizer == "chars":
        raise ValueError(f"--tokenizer=chars does not tell which characters: name {OF_CHARACTERS}")
    is_data_set = Path(tokenizer).is_dir()
    description = read_meta(tokenizer)["tokenizer"] if is_data_set else describe(tokenizer)
    n_vocab, _ = sizes(description)
    if n_vocab > vocab_size + 1:  # nanoGPT's characters have no end of text, and ours do
        raise ValueError(
            f"--tokenizer={tokenizer} has {n_vocab:,} tokens, and {source} knows {vocab_size:,}"
        )
    return description, n_vocab


# ---- export --------------------------------------------------------------------------------------


def export(source, folder):
    """A checkpoint -> a folder with model.safetensors and config.json. Raises ValueError, RunError.

    The plain residual model becomes a GPT2LMHeadModel of transformers with the same logits. Any
    other model keeps our names, and only this project loads it.
    """
    if not pretrained.safetensors():
        raise RunError("to export, pip install safetensors")
    if (folder / "config.json").exists() or (folder / "model.safetensors").exists():
        raise RunError(f"{folder} holds a model already; name a new folder")
    path = checkpoint.find(source)
    state, model = load_model(path)
    ours = {name: state[name] for name in ("tokenizer", "n_vocab", "step", "provenance")}
    if is_plain(model.config) and has_gpt2_parts(model):
        _, eot_token = sizes(ours["tokenizer"])
        tensors, config = as_gpt2(model, eot_token)
        loads = "GPT2LMHeadModel.from_pretrained of transformers loads it"
    else:
        ours["model_config"] = asdict(model.config)
        tensors, config = model.state_dict(), {}
        loads = "python convert.py import loads it (no other program has these streams)"
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = pretrained.safetensors().save(tensors, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "model.safetensors", content)
    write_json(folder / "config.json", config | {OURS: ours})
    print(f"wrote {folder} from {path}: {loads}")


def is_plain(config):
    """Whether the model is GPT-2's: it has one stream, and every knob is at its default, except for
    sizes and for knobs that have no effect on one stream."""
    own = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_mlp", "dropout", "bias")
    no_effect = ("mixer", "n_streams", "dynamic", "stream_dtype")
    no_effect += ("mix_start", "alpha_start", "read_start")
    usual = asdict(GPTConfig())
    others = [name for name in usual if name not in own + no_effect]
    return find_mixer(config.mixer).one_stream and all(
        getattr(config, name) == usual[name] for name in others
    )


def has_gpt2_parts(model):
    """Whether the modules with parameters are those of GPT-2, as they may not be in a fork."""
    names = {re.sub(r"blocks\.\d+\.", "", name) for name in model.state_dict()}
    return {name.rpartition(".")[0] for name in names} == GPT2_PARTS


def as_gpt2(model, eot_token):
    """A residual model -> the tensors and the config.json of transformers' GPT2LMHeadModel.

    eot_token: the id of the end of text, with which every document begins. GPT-2 has biases
    everywhere: where the model has none, they are zeros.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        theirs = "transformer." + pretrained.gpt2_name(name)
        linear = tensor.ndim == 2 and name.startswith("blocks.")
        tensors[theirs] = tensor.t() if linear else tensor  # theirs are (in, out)
        if theirs.endswith(".weight") and not name.startswith("embed."):
            tensors.setdefault(theirs.replace(".weight", ".bias"), torch.zeros(len(tensor)))
    config = model.config
    return tensors, {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_mlp or None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "bos_token_id": eot_token,
        "eos_token_id": eot_token,
        "tie_word_embeddings": True,
    }


# ---- one mixer to another ------------------------------------------------------------------------


def convert_mixer(arguments):
    """The command `mixer`: writes the new checkpoint, and prints how far the models differ. Raises
    RunError or ValueError."""
    path = checkpoint.find(arguments.source)
    state, old = load_model(path)
    options = {name: getattr(arguments, name) for name in OPTIONS}
    options = {name: value for name, value in options.items() if value is not None}
    new, off = with_mixer(old, arguments.mixer, arguments.n_streams, options)
    print(f"{path}: {old.config.mixer} -> {new.config.mixer}, {new.config.n_streams} streams")
    if off:
        worst = max(off, key=off.get)
        print(f"M at the biases: off by at most {off[worst]:.2g} ({worst})")
        if off[worst] > arguments.most_off:
            raise RunError(
                f"{new.config.mixer} does not reach M of {worst}: its nearest is off by "
                f"{off[worst]:.3g} in an entry. Nothing is written; to take the nearest all the "
                f"same, pass --most_off={math.ceil(off[worst] * 1000) / 1000:g}"
            )
    tokens = (state["tokenizer"], state["n_vocab"], arguments.data, arguments.tokens)
    idx, targets = sequences(old.config.block_size, *tokens)
    if off and new.config.dynamic:
        left_out = drop_misleading_rows(old, new, idx)
        print("phi of the mix: mapped by the Jacobian at the biases, right to first order")
        if left_out:
            print(f"  but 0 in {len(left_out)} of {len(off)} sublayers, where that brings M nearer")
    for line in report_differences(old, new, idx, targets):
        print(line)
    knobs = {"mixer": new.config.mixer, "n_streams": new.config.n_streams} | new.config.options
    about = {name: state[name] for name in ("tokenizer", "n_vocab", "shards", "step")}
    save(arguments.out_dir, new, about | {"config": state["config"] | knobs})


if __name__ == "__main__":
    run_script(main)
