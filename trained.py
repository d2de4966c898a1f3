"""
A trained model, to be used: its weights, and the tokenizer and dtype that belong to them.

    trained = open_trained("out/tbp", "best", "", device)
    trained.model(idx), trained.tokenizer.decode(ids)
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import checkpoint as checkpoints
import pretrained
import runtime
from model import GPT, GPTConfig
from tokenizer import get_tokenizer, tokenizer_name

DEFAULTS = ("out", "latest")  # of the knobs out_dir and checkpoint, in the scripts


class Trained(NamedTuple):
    model: GPT  # in eval mode, on the device
    tokenizer: Any
    description: Any  # of the tokenizer, see tokenizer.py
    n_vocab: int  # ids that the tokenizer has; what lies beyond is padding
    title: str  # where the model comes from, in a line
    about: dict  # the same, for a file of results


def open_trained(out_dir, checkpoint, init_from, device):
    """-> Trained: a checkpoint of the run in out_dir (latest, best, or a path), or, where init_from
    names them, weights of GPT-2's kind (pretrained.py).

    Raises RunError or ValueError for what cannot be opened.
    """
    if init_from and (out_dir, checkpoint) != DEFAULTS:
        raise ValueError("--init_from names other weights than --out_dir or --checkpoint; give one")
    if init_from:
        return open_gpt2(init_from, device)
    path = find_checkpoint(out_dir, checkpoint)
    state, model = load_model(path)
    about = {
        "checkpoint": str(path),
        "step": state["step"],
        "mixer": model.config.mixer,
        "n_streams": model.config.n_streams,
        "tokenizer": tokenizer_name(state["tokenizer"]),
        "made_by": state["provenance"],
    }
    title = f"{path}: step {state['step']}, {about['mixer']}, {about['tokenizer']} tokens"
    tokenizer = get_tokenizer(state["tokenizer"])
    return Trained(model.to(device), tokenizer, state["tokenizer"], state["n_vocab"], title, about)


def open_gpt2(source, device):
    """-> Trained, from weights that were not trained here."""
    if not pretrained.is_gpt2(source):
        raise ValueError(
            f"init_from = {source!r} names no weights of GPT-2's kind: it takes "
            f"{', '.join(pretrained.HUB)}, a folder or a file of such weights. A run is named by "
            "--out_dir, and one of its checkpoints by --checkpoint"
        )
    tokenizer = get_tokenizer("gpt2")  # before the download of the weights
    model = pretrained.gpt2_model(source)
    about = {"checkpoint": source, "step": None, "mixer": "residual", "n_streams": 1}
    about |= {"tokenizer": "gpt2", "made_by": None}
    title = f"{source}: weights of GPT-2's kind, residual, gpt2 tokens"
    return Trained(model.to(device), tokenizer, "gpt2", tokenizer.n_vocab, title, about)


def find_checkpoint(out_dir, checkpoint):
    """checkpoint: latest, best, or a path -> the path. Raises RunError where there is none."""
    if checkpoint == "best":
        best = Path(out_dir).expanduser() / "best.pt"
        if not best.exists():
            raise runtime.RunError(f"{out_dir} has no best.pt yet; take --checkpoint=latest")
        return best
    if checkpoint != "latest" and not Path(checkpoint).expanduser().exists():
        raise runtime.RunError(
            f"checkpoint must be latest, best or a path, and there is no file {checkpoint!r}"
        )
    return checkpoints.find(out_dir if checkpoint == "latest" else checkpoint)


def load_model(path, **changed):
    """-> the state in a checkpoint of ours, and its model, on the CPU, in eval mode.

    changed: fields of GPTConfig that shall differ from the checkpoint's. Raises RunError for a file
    that is no checkpoint, or not of this model.py.
    """
    state = checkpoints.load(path)
    model_config = checkpoints.model_config(path, state, GPTConfig)
    model = GPT(replace(model_config, **changed))
    checkpoints.restore(path, state, model)
    return state, model.eval()


def activation_dtype(name, model, device):
    """The dtype that the knob `dtype` means for this model. Raises ValueError."""
    if name == "float16":
        raise ValueError("dtype must be auto, float32 or bfloat16 here, not 'float16'")
    streams = model.config.stream_dtype
    if streams == "bfloat16" and name == "auto":
        return torch.bfloat16
    return runtime.pick_dtype(name, device, streams)
