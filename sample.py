"""
Text from a checkpoint; the tokenizer is the one that the checkpoint was trained with.

    python sample.py --out_dir=out/laptop-tbp
    python sample.py --out_dir=out/laptop-tbp --start="def main():" --num_samples=3 --temperature=0.7
    python sample.py --checkpoint=out/tbp/best.pt --start=FILE:prompt.txt --top_k=0 --top_p=0.95
"""
import os
import sys

import torch

import checkpoint as checkpoints
from configurator import configure
from data import get_tokenizer
from model import GPT, GPTConfig, pick_device

out_dir = "out"             # of the run
checkpoint = "latest"       # latest, best, or a path
start = ""                  # the prompt, or FILE:path; empty: the beginning of a document
num_samples = 3
max_new_tokens = 500        # of each sample
temperature = 0.8           # below 1 likelier, above 1 more varied; 0: always the likeliest token
top_k = 200                 # only the k likeliest tokens; 0: all
top_p = 1.0                 # only the likeliest tokens that together hold this probability
seed = 1337
device = "auto"             # auto, cpu, cuda, cuda:1, mps
configure(globals())


def main():
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or num_samples < 1 or max_new_tokens < 1:
        raise ValueError(f"temperature {temperature} and top_k {top_k} must be at least 0, top_p {top_p} in (0, 1], "
                         f"num_samples {num_samples} and max_new_tokens {max_new_tokens} at least 1")
    if checkpoint == "latest":
        path = checkpoints.latest(out_dir)
        if path is None:
            raise checkpoints.RunError(f"{out_dir} has no checkpoint; train one, for example "
                                       "python train.py config/tbp.py config/laptop.py, or name its --out_dir")
    else:
        path = os.path.join(out_dir, "best.pt") if checkpoint == "best" else checkpoint
    state = checkpoints.load(path)
    tokenizer = get_tokenizer(state["tokenizer"])
    where = pick_device(device)
    try:
        model = GPT(GPTConfig(**state["model_config"]))
    except TypeError as error:                      # a field that this GPTConfig does not have
        raise checkpoints.RunError(f"{path}: its model is not that of this model.py ({error}). Check out the commit that "
                                   "wrote it") from error
    checkpoints.restore(path, state, model)
    model.to(where).eval()
    print(f"{path}: step {state['step']}, {state['model_config']['mixer']}, {state['tokenizer']} tokens", file=sys.stderr)

    prompt = start
    if start.startswith("FILE:"):
        try:
            with open(start.removeprefix("FILE:"), encoding="utf-8") as file:
                prompt = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"start={start!r} could not be read: {error}") from error
    tokens = [tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]      # every document began so
    idx = torch.tensor(tokens, device=where).repeat(num_samples, 1)
    generator = torch.Generator(where).manual_seed(seed)
    out = model.generate(idx, max_new_tokens, temperature=temperature, top_k=top_k or None, top_p=top_p if top_p < 1 else None,
                         n_vocab=state["n_vocab"], generator=generator)
    for i, sample in enumerate(out[:, len(tokens):].tolist(), 1):
        if tokenizer.eot_token in sample:
            sample = sample[:sample.index(tokenizer.eot_token)]             # what follows is another document
        print(f"--- sample {i} ---\n{prompt}{tokenizer.decode(sample)}\n", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (checkpoints.RunError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
