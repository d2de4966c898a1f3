"""
The weights that a new run begins with: a checkpoint of ours, or GPT-2's kind (pretrained.py).

    python train.py config/finetune.py --init_from=out/tbp --dataset=mytexts
    python train.py --init_from=out/tbp/ckpt_0002000.pt --block_size=512 --dropout=0.1
    python train.py config/finetune.py --init_from=auto:gpt2 --dataset=mytexts  # or goes on

A run's folder means its newest whole checkpoint; the best one has a path, out/tbp/best.pt. The new
run begins at step 0 with a new optimizer, and has its own data, schedule, dropout and weight decay.
Knobs of the model that the user does not name are the checkpoint's. A value that differs from the
checkpoint's is refused, except for block_size, dropout and stream_dtype.

With auto: before the weights, the same command begins the run and, once the run has a checkpoint,
continues it. The model's knobs are then the run's, and the weights are not read again.

block_size may differ. A shorter one drops the last positions. In a longer one the positions that
the checkpoint does not have begin at their initialisation, as in a model from scratch.
"""

from dataclasses import asdict
from pathlib import Path

import torch

import checkpoint
import pretrained
from model import GPTConfig
from runtime import RunError
from tokenizer import same_tokens, tokenizer_name

NO_WEIGHTS = ("scratch", "resume", "auto")  # values of the knob init_from that name no weights
AUTO = "auto:"  # before weights: resume if there is a run
# Fields of GPTConfig in which the new model may differ. vocab_size comes from the data set, and
# `check_tokens` compares the tokens themselves.
FREE = ("block_size", "vocab_size", "dropout", "stream_dtype")


def weights_of(init_from, out_dir):
    """The weights that a run begins with; "" where it begins without any, or is continued."""
    if init_from in NO_WEIGHTS or goes_on(init_from, out_dir):
        return ""
    return init_from.removeprefix(AUTO)


def goes_on(init_from, out_dir):
    """Whether init_from is auto:WEIGHTS, and the run in out_dir has a checkpoint."""
    return init_from.startswith(AUTO) and bool(checkpoint.checkpoints(out_dir))


def check_source(init_from, out_dir):
    """Raises ValueError where the knob init_from has no meaning."""
    if init_from.startswith(AUTO) and init_from.removeprefix(AUTO) in ("", *NO_WEIGHTS):
        raise ValueError(f"init_from = {init_from!r}: after {AUTO} weights are named, or say auto")
    if not init_from:
        raise ValueError("init_from is empty; a run without weights to begin with says scratch")
    source = weights_of(init_from, out_dir)
    if source and not pretrained.is_gpt2(source) and not Path(source).expanduser().exists():
        raise ValueError(
            f"init_from must be scratch, resume, auto, {', '.join(pretrained.HUB)}, or the path of "
            f"a checkpoint, of a run or of GPT-2's weights, and there is no file {source!r}"
        )


def knobs(init_from, out_dir):
    """["--n_layer=12", ...]: the knobs of train.py that a model for these weights needs.

    The user's own knobs come after them and win. [] where init_from names no weights, and for
    weights that cannot be read: `start_from` says what is wrong with them. Where auto: continues
    the run in out_dir, the knobs are that run's.
    """
    source = out_dir if goes_on(init_from, out_dir) else weights_of(init_from, out_dir)
    if not source:
        return []
    if pretrained.is_gpt2(source):
        return pretrained.knobs(source)
    try:
        path = checkpoint.find(source)
        model = asdict(checkpoint.model_config(path, checkpoint.load(path), GPTConfig))
    except (RunError, ValueError):
        return []
    values = {name: value for name, value in model.items() if name not in ("vocab_size", "dropout")}
    values |= values.pop("options")
    return [f"--{name}={value!r}" for name, value in values.items()]


def start_from(source, model, meta):
    """Put the weights into `model`, which is to train on the data set of `meta`.

    -> lines for the user. Raises ValueError or RunError for weights that do not fit the model, or
    a data set with other tokens than theirs.
    """
    if pretrained.is_gpt2(source):
        return pretrained.start_from(source, model, meta)
    path = checkpoint.find(source)
    state = checkpoint.load(path)
    check_tokens(path, state, meta)
    check_model(path, checkpoint.model_config(path, state, GPTConfig), model.config)
    weights = with_rows_of(model, state["model"])
    checkpoint.restore(path, {**state, "model": weights}, model)
    lines = [f"weights: {path}, after its step {state['step']:,}; a new run begins at step 0"]
    old, new = len(state["model"]["embed.wpe.weight"]), model.config.block_size
    if new < old:
        lines.append(f"block_size {new}: the first {new} of the checkpoint's {old} positions")
    if new > old:
        lines.append(
            f"block_size {new}: positions {old} to {new - 1} are new and start from the "
            "initialisation, so the loss there is at first that of a model that knows no positions"
        )
    return lines


def check_tokens(path, state, meta):
    """Raises ValueError unless the weights and the data set have the same tokens."""
    then, now = state["tokenizer"], meta["tokenizer"]
    if not same_tokens(then, now):
        raise ValueError(
            f"{path} was trained on tokens of {tokenizer_name(then)}, and the data set's are of "
            f"{tokenizer_name(now)}, so that every id would mean something else. Prepare the texts "
            "with the checkpoint's tokenizer (python prepare_data.py --tokenizer …)"
        )


def check_model(path, then, now):
    """Raises ValueError unless the weights of the GPTConfig `then` fit the GPTConfig `now`."""
    then, now = asdict(then), asdict(now)
    wrong = [name for name in then if then[name] != now[name] and name not in FREE]
    if not wrong:
        return
    listed = ", ".join(f"{name} is {then[name]!r} there and {now[name]!r} here" for name in wrong)
    remedy = "Leave these knobs out, and they are the checkpoint's"
    if "mixer" in wrong or "n_streams" in wrong:
        plain = not then["x0_scalars"] and then["mix_scale"] == "none"
        fits = then["n_streams"] == now["n_streams"] or then["n_streams"] == 1 and plain
        if now["n_streams"] > 1 and fits:
            other = f"--mixer={now['mixer']} --n_streams={now['n_streams']}"
            remedy = f"Convert it first: python convert.py mixer {path} out/converted {other}"
        else:
            remedy += ": no conversion takes the one model to the other"
    raise ValueError(f"{path} is of another model: {listed}. {remedy}")


def with_rows_of(model, weights):
    """-> weights with as many positions and tokens as the model has: rows are dropped at the end,
    or added from the model's initialisation."""
    fitting, own = dict(weights), model.state_dict()
    for name in ("embed.wpe.weight", "embed.wte.weight"):
        start = own[name].cpu()
        rows = min(len(start), len(weights[name]))
        fitting[name] = torch.cat([weights[name][:rows], start[rows:]])
    return fitting
