"""
A trained model to use: the weights, the tokenizer and the dtype that belong together, wherever they
come from.

    trained = open_trained("out/tbp", "best", device)
    trained.model(idx), trained.tokenizer.decode(ids)
"""

import os
from typing import Any, NamedTuple

import torch

import checkpoint as checkpoints
import runtime
from model import GPT, GPTConfig
from runtime import RunError
from tokenizer import get_tokenizer, tokenizer_name


class Trained(NamedTuple):
    model: GPT  # in eval mode, on the device
    tokenizer: Any
    n_vocab: int  # ids that the tokenizer has; what lies beyond is padding
    about: dict  # where it comes from, for a file of results


def open_trained(out_dir, checkpoint, device):
    """-> Trained, a checkpoint of the run in out_dir. checkpoint: latest, best, or a path.

    Raises RunError or ValueError for what cannot be had.
    """
    path = find_checkpoint(out_dir, checkpoint)
    state = checkpoints.load(path)
    model = GPT(checkpoints.model_config(path, state, GPTConfig))
    checkpoints.restore(path, state, model)
    about = {
        "checkpoint": str(path),
        "step": state["step"],
        "mixer": model.config.mixer,
        "n_streams": model.config.n_streams,
        "tokenizer": tokenizer_name(state["tokenizer"]),
        "made_by": state["provenance"],
    }
    tokenizer = get_tokenizer(state["tokenizer"])
    return Trained(model.to(device).eval(), tokenizer, state["n_vocab"], about)


def find_checkpoint(out_dir, checkpoint):
    """The path that is meant. Raises RunError where the run has no checkpoint."""
    if checkpoint == "best":
        return os.path.join(out_dir, "best.pt")
    if checkpoint != "latest":
        return os.path.expanduser(checkpoint)
    path = checkpoints.latest(out_dir)
    if path is None:
        raise RunError(
            f"{out_dir} has no checkpoint; train one, for example "
            "python train.py config/tbp.py config/laptop.py, or name its --out_dir"
        )
    return path


def activation_dtype(name, model, device):
    """The dtype that the knob `dtype` means for this model. Raises ValueError."""
    streams = model.config.stream_dtype
    if streams == "bfloat16" and name == "auto":
        return torch.bfloat16
    dtype = runtime.pick_dtype(name, device)
    if streams == "bfloat16" and dtype != torch.bfloat16:
        raise ValueError(
            f"the model's streams are in bfloat16, and dtype is {name}: leave it at auto, or say "
            "--dtype=bfloat16"
        )
    return dtype
