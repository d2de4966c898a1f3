"""
Checkpoints from elsewhere, to elsewhere, and from one mixer to another.

    python convert.py import gpt2 out/gpt2                      # OpenAI's weights, from the Hub
    python convert.py import ~/nanoGPT/out/ckpt.pt out/nano     # nanoGPT's
    python convert.py export out/residual exported/residual     # transformers loads the folder
    python convert.py export out/tbp exported/tbp               # n streams: safetensors, config
    python convert.py import exported/tbp out/back              # and back
    python convert.py mixer out/gpt2 out/gpt2-tbp --mixer=tbp --n_streams=4
    python convert.py mixer out/tbp out/rtbp --mixer=rtbp --data=data/openwebtext

A checkpoint of ours is named by its path, or by the folder of its run, which means the newest one.
What `import` and `mixer` write is a checkpoint that sample.py takes and from which train.py can
begin a run. It has no optimizer state, so no run is resumed from it.

From one mixer to another, with n streams:
* The biases of the mix become those at which the other mixer gives the same M, by its inverse. So
  every M is the same before a token adds to it. Where the other mixer does not reach M, the nearest
  M that it reaches is taken and the distance reported; beyond --most_off nothing is written.
* What a token adds to M has no exact counterpart. The rows of phi are multiplied by the derivative
  of the new logits with respect to the old ones, taken at the biases: the new M is the old one to
  first order in what the token adds. How far off M is then is measured on --tokens tokens of the
  validation split of --data, with both losses, or of random tokens.
* Reads, writes, their gates, scales of M and everything else are copied.
From one stream, the streams start as equal copies: the new model computes the same function.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

import checkpoint
import pretrained
from data import TokenBlocks, read_meta, write_atomic
from mixers import OPTIONS, find_mixer, mixing_logits, mixing_matrix, start_logits
from model import GPT, GPTConfig
from runtime import RunError, provenance
from streams import HyperConnection, Streams, mean_square
from tokenizer import describe, sizes, tokenizer_name

OURS = "mixed_residual_streams"  # the key in config.json of what only this project knows


def main():
    arguments = parse()
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
    command.add_argument("out_dir", help="folder for the checkpoint")
    command.add_argument("--tokenizer", help="of the weights, where nothing tells: gpt2, bytes, …")

    command = commands.add_parser("export", help="a checkpoint of ours -> safetensors and config")
    command.add_argument("source", help="a run's folder or a checkpoint")
    command.add_argument("folder", help="a new folder")

    command = commands.add_parser("mixer", help="a checkpoint of ours -> one with another mixer")
    command.add_argument("source", help="a run's folder or a checkpoint")
    command.add_argument("out_dir", help="folder for the new checkpoint")
    command.add_argument("--mixer", required=True, help="the other mixer")
    command.add_argument("--n_streams", type=int, help="streams, if the source has one")
    command.add_argument("--data", help="a data set's folder, to measure on")
    command.add_argument("--tokens", type=int, default=4096, help="how many to measure on")
    command.add_argument(
        "--most_off",
        type=float,
        default=1e-3,
        help="refuse if an entry of an M, before a token adds to it, is off by more (0.001)",
    )
    for name, option in OPTIONS.items():
        command.add_argument(f"--{name}", type=type(option.default), help=option.comment)
    return parser.parse_args()


# ---- checkpoints ---------------------------------------------------------------------------------


def load(source):
    """-> the path, the state and the model of a run's folder or a checkpoint. Raises RunError."""
    path = Path(source).expanduser()
    if path.is_dir():
        newest = checkpoint.latest(path)
        if newest is None:
            raise RunError(f"{path}: it has no checkpoint of this project")
        path = newest
    state = checkpoint.load(path)
    model = GPT(checkpoint.model_config(path, state, GPTConfig))
    checkpoint.restore(path, state, model)
    return path, state, model.eval()


def save(out_dir, model, about):
    """Write the model as a checkpoint and say so. about: what is known of it, by checkpoint keys.

    Raises RunError for a folder that has a run already.
    """
    out_dir = Path(out_dir).expanduser()
    _lock = checkpoint.lock(out_dir)
    if there := checkpoint.steps(out_dir):
        raise RunError(f"{out_dir} holds a run already ({there[-1].name}); name a new folder")
    state = {
        "config": {},
        "shards": None,
        "step": 0,
        "best_val": math.inf,
        "evaluated": None,
        "logged_step": 0,
        "tally": [0.0] * 5,
        "scaler": {},
    }
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
    """Weights of others, or a folder that `export` wrote -> a checkpoint. ValueError, RunError."""
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
        print(f"token {vocab_size}, the end of text, is new: its embedding is at its start")
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

    tokenizer: what prepare_data.py takes, or the folder of a data set that has it, or None.
    """
    if tokenizer is None and vocab_size in pretrained.GPT2_VOCABULARY:
        tokenizer = "gpt2"
    if tokenizer is None:
        raise ValueError(
            f"{source}: nothing tells the tokenizer of its {vocab_size:,} tokens. Pass "
            "--tokenizer=gpt2, bytes or what else prepare_data.py takes, or the folder of a data "
            "set: for nanoGPT's characters, the one that prepare_data.py --adopt made"
        )
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
    path, state, model = load(source)
    ours = {name: state[name] for name in ("tokenizer", "n_vocab", "step", "provenance")}
    plain = find_mixer(model.config.mixer).one_stream and not model.config.x0_scalars
    if plain:
        tensors, config = as_gpt2(model, ours["n_vocab"])
        loads = "GPT2LMHeadModel.from_pretrained of transformers loads it"
    else:
        ours["model_config"] = asdict(model.config)
        tensors, config = model.state_dict(), {}
        loads = "python convert.py import loads it (no other program has these streams)"
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = pretrained.safetensors().save(tensors, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "model.safetensors", content)
    write_atomic(folder / "config.json", json.dumps(config | {OURS: ours}, indent=1).encode())
    print(f"wrote {folder} from {path}: {loads}")


def as_gpt2(model, n_vocab):
    """A residual model -> the tensors and the config.json of transformers' GPT2LMHeadModel.

    GPT-2 has biases everywhere, so those that the model goes without are zeros.
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
        "bos_token_id": n_vocab - 1,  # the end of text, with which every document begins
        "eos_token_id": n_vocab - 1,
        "tie_word_embeddings": True,
    }


# ---- one mixer to another ------------------------------------------------------------------------


def convert_mixer(arguments):
    path, state, old = load(arguments.source)
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
    if off and new.config.dynamic:
        print("phi of the mix: mapped by the Jacobian at the biases, right to first order")
    for line in measure(old, new, state, arguments.data, arguments.tokens):
        print(line)
    knobs = {"mixer": new.config.mixer, "n_streams": new.config.n_streams} | new.config.options
    about = {name: state[name] for name in ("tokenizer", "n_vocab", "shards", "step")}
    save(arguments.out_dir, new, about | {"config": state["config"] | knobs})


def with_mixer(old, mixer, n_streams, options):
    """The model `old` with another mixer -> the new model, and {sublayer: how far an entry of its M
    is off at the biases}, which is empty where `old` has one stream. Raises ValueError."""
    config = old.config
    from_one = find_mixer(config.mixer).one_stream
    if find_mixer(mixer).one_stream:
        raise ValueError(f"{mixer} has one stream, and no n streams go into one; name another")
    if config.x0_scalars:
        raise ValueError("a model with x0_scalars has no counterpart with n streams")
    if from_one and not n_streams:
        raise ValueError("the model has one stream: pass --n_streams=4, or another number")
    if not from_one and n_streams not in (None, config.n_streams):
        raise ValueError(f"n_streams stays {config.n_streams}: leave --n_streams={n_streams} out")

    gates = config.gates
    if not from_one:  # "auto" would follow the mixer, and so change the reads and writes
        gates = old.blocks[0].hc_attn.gates
    changes = dict(mixer=mixer, n_streams=n_streams or config.n_streams, gates=gates)
    new = GPT(replace(config, **changes, options=options)).eval()
    same = {name: tensor for name, tensor in old.state_dict().items() if ".hc_" not in name}
    new.load_state_dict(same, strict=False)  # all but the hyper-connections
    off = {}
    for name, module in new.named_modules():
        if isinstance(module, HyperConnection) and not from_one:
            off[name] = translate(old.get_submodule(name), module)
    return new, off


@torch.no_grad()
def translate(old, new):
    """Give the HyperConnection `new` the parameters of `old`, through the inverse of its mixer.

    -> how far an entry of M is off at the biases, in absolute value.
    """
    n, K_old, K_new = old.n_streams, old.n_mixer_logits, new.n_mixer_logits
    gates, logits, scales = old.bias.double().split([2 * n, K_old, len(old.bias) - 2 * n - K_old])
    M = mixing_matrix(old.mixer, logits, n, **old.options)
    nearest = reach(new.mixer, M, new.mix_start, **new.options)
    new.bias.copy_(torch.cat([gates, nearest, scales]))
    if old.dynamic:
        there = jacobian(new.mixer, nearest, n, new.options)  # (n^2, K_new)
        back = torch.linalg.pinv(there, rtol=1e-6)  # (K_new, n^2)
        change = back @ jacobian(old.mixer, logits, n, old.options)  # (K_new, K_old)
        gates, mix, scales = old.phi.double().split([2 * n, K_old, len(scales)])
        new.phi.copy_(torch.cat([gates, change @ mix, scales]))
        new.alpha.copy_(old.alpha)
    logits = new.bias[2 * n : 2 * n + K_new].double()  # as they are stored
    return (mixing_matrix(new.mixer, logits, n, **new.options) - M).abs().max().item()


def jacobian(mixer, logits, n, options):
    """dM / dlogits, (n^2, K)."""

    def entries(logits):
        return mixing_matrix(mixer, logits, n, **options).flatten()

    if not len(logits):
        return logits.new_zeros(n * n, 0)
    with torch.enable_grad():
        return torch.autograd.functional.jacobian(entries, logits)


def reach(mixer, M, mix_start, **options):
    """-> the logits (K,) at which the mixer gives M (n, n), or the nearest matrix that it has."""
    n = len(M)
    try:
        logits = mixing_logits(mixer, M, **options)
        if (mixing_matrix(mixer, logits, n, **options) - M).abs().max() < 1e-6:
            return logits
    except ValueError:  # no logits give this M, or no inverse is known
        pass
    return nearest_logits(mixer, M, mix_start, **options)


def nearest_logits(mixer, M, mix_start, **options):
    """The logits at which the sum of the squared differences from M is least, from the start on."""
    logits = start_logits(mixer, len(M), mix_start, **options).double()
    if not len(logits):
        return logits
    logits.requires_grad_()
    search = torch.optim.LBFGS(
        [logits],
        max_iter=1000,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def distance():
        search.zero_grad()
        squares = (mixing_matrix(mixer, logits, len(M), **options) - M).square().sum()
        squares.backward()
        return squares

    with torch.enable_grad():
        search.step(distance)
    return logits.detach()


@torch.no_grad()
def measure(old, new, state, data, tokens):
    """Lines on how far the new model is from the old one, over some tokens.

    M of a token is compared on the same streams, those of the old model.
    """
    block_size = old.config.block_size
    count = max(1, tokens // block_size)
    if data:
        blocks = TokenBlocks(data, "val", block_size)
        if blocks.meta["tokenizer"] != state["tokenizer"]:
            raise ValueError(
                f"{data} has tokens of {tokenizer_name(blocks.meta['tokenizer'])}, and the "
                f"checkpoint is of {tokenizer_name(state['tokenizer'])}; name another --data"
            )
        batches = [blocks.in_order(i, 1) for i in range(min(count, blocks.n_blocks))]
        source = f"tokens of {data}"
    else:
        generator = torch.Generator().manual_seed(0)
        size = (count, 1, block_size)
        idx = torch.randint(state["n_vocab"], size, generator=generator)
        batches, source = [(one, one) for one in idx], "random tokens"

    losses, logits_off, mix_off, moved = [], 0.0, {}, 0.0
    for idx, targets in batches:
        (theirs, old_loss), (ours, new_loss) = old(idx, targets), new(idx, targets)
        losses.append(torch.stack([old_loss, new_loss]))
        logits_off = max(logits_off, (ours - theirs).abs().max().item())
        for seen in old.observe(idx) if old.config.n_streams > 1 else []:
            streams = Streams(seen.x, mean_square(seen.x))
            mix = new.get_submodule(seen.name).observe(streams)[2]
            off = (mix - seen.mix).abs()
            sums = mix_off.setdefault(seen.name, [0.0, 0.0])
            mix_off[seen.name] = [sums[0] + off.mean().item(), max(sums[1], off.max().item())]
            moved += (seen.mix - seen.mix.mean((0, 1))).abs().mean().item()

    lines = [f"measured on {len(batches) * block_size:,} {source}:"]
    if mix_off:
        worst = max(mix_off, key=lambda name: mix_off[name][1])
        mean = sum(total for total, _ in mix_off.values()) / len(mix_off) / len(batches)
        lines += [
            f"  an entry of M is off by {mean:.2g} on average, by {mix_off[worst][1]:.2g} at most "
            f"({worst}); between tokens it varies by {moved / len(mix_off) / len(batches):.2g}",
        ]
    lines.append(f"  logits are off by {logits_off:.2g} at most")
    if data:
        before, after = torch.stack(losses).mean(0).tolist()
        lines.append(f"  loss {before:.4f} -> {after:.4f} ({after - before:+.4f})")
    return lines


if __name__ == "__main__":
    try:
        main()
    except (RunError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
