"""
Text from a checkpoint; the tokenizer is the one that the checkpoint was trained with.

    python sample.py --out_dir=out/laptop-tbp
    python sample.py --out_dir=out/laptop-tbp --start="def main():" --num_samples=3
    python sample.py --checkpoint=out/tbp/best.pt --start=FILE:prompt.txt --top_k=0 --top_p=0.95
"""

import os
import sys

import torch

import checkpoint as checkpoints
from configurator import configure
from model import GPT, GPTConfig
from runtime import RunError, pick_device
from tokenizer import get_tokenizer, tokenizer_name

out_dir = "out"  # of the run
checkpoint = "latest"  # latest, best, or a path
start = ""  # the prompt, or FILE:path; empty: the beginning of a document
num_samples = 3
max_new_tokens = 500  # of each sample
temperature = 0.8  # below 1 likelier, above 1 more varied; 0: always the likeliest token
top_k = 200  # only the k likeliest tokens; 0: all
top_p = 1.0  # only the likeliest tokens that together hold this probability
seed = 1337
device = "auto"  # auto, cpu, cuda, cuda:1, mps
config = configure(globals())


def main():
    check_knobs()
    device = pick_device(config["device"])
    path = find_checkpoint()
    state = checkpoints.load(path)
    tokenizer = get_tokenizer(state["tokenizer"])
    model = GPT(checkpoints.model_config(path, state, GPTConfig))
    checkpoints.restore(path, state, model)
    model.to(device).eval()
    print(
        f"{path}: step {state['step']}, {model.config.mixer}, "
        f"{tokenizer_name(state['tokenizer'])} tokens",
        file=sys.stderr,
    )

    prompt = read_prompt()
    tokens = [tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]  # every document began so
    idx = torch.tensor(tokens, device=device).repeat(num_samples, 1)  # (num_samples, T)
    out = model.generate(
        idx,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p if top_p < 1 else None,
        n_vocab=state["n_vocab"],
        generator=torch.Generator(device).manual_seed(seed),
    )
    for number, sample in enumerate(out[:, len(tokens) :].tolist(), 1):
        if tokenizer.eot_token in sample:
            sample = sample[: sample.index(tokenizer.eot_token)]  # what follows is another document
        print(f"--- sample {number} ---\n{prompt}{tokenizer.decode(sample)}\n", flush=True)


def check_knobs():
    """Raises ValueError for what no sampling can have."""
    for name in ("num_samples", "max_new_tokens"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, not {config[name]}")
    for name in ("temperature", "top_k"):
        if config[name] < 0:
            raise ValueError(f"{name} must not be negative, as {config[name]} is")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")


def find_checkpoint():
    """The path that the knobs mean. Raises RunError where the run has no checkpoint."""
    if checkpoint == "best":
        return os.path.join(out_dir, "best.pt")
    if checkpoint != "latest":
        return checkpoint
    path = checkpoints.latest(out_dir)
    if path is None:
        raise RunError(
            f"{out_dir} has no checkpoint; train one, for example "
            "python train.py config/tbp.py config/laptop.py, or name its --out_dir"
        )
    return path


def read_prompt():
    """The prompt, from its file where `start` names one. Raises ValueError."""
    if not start.startswith("FILE:"):
        return start
    try:
        with open(start.removeprefix("FILE:"), encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"start={start!r} could not be read: {error}") from error


if __name__ == "__main__":
    try:
        main()
    except (RunError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
