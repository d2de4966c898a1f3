"""
Text from a checkpoint; the tokenizer is the one that the checkpoint was trained with.

    python sample.py --out_dir=out/laptop-tbp
    python sample.py --out_dir=out/laptop-tbp --start="def main():" --stream=True
    python sample.py --checkpoint=out/tbp/best.pt --start=FILE:prompt.txt --top_k=0 --top_p=0.95
    python sample.py --out_dir=out/tbp --prompts=prompts.jsonl --out=completions.jsonl
    python sample.py --init_from=gpt2 --start="The residual stream"

A sample depends on its prompt, the seed and its number, and not on the other samples of a batch,
except for rounding (generate.py): a prompt in a file gives the same samples as the same prompt
given by --start.

A file of prompts has a prompt on each line; an empty line is the beginning of a document. Where its
name ends in .jsonl, a line is an object with a "prompt". Its other fields come back in the lines of
--out, with "sample", "completion", "tokens" and "ended" (whether the document ended).
"""

import json
import os
import sys
import time

import torch

import compiler
from configurator import at_least, configure
from corpus import read_whole
from generate import Decoder, cast_weights, check_sampling, generate, step_logits
from runtime import pick_device, run_script
from tokenizer import END_OF_TEXT, clean
from trained import activation_dtype, open_trained

# The model
out_dir = "out"  # of the run
checkpoint = "latest"  # latest, best, or a path
init_from = ""  # GPT-2's weights instead of a run: gpt2, gpt2-medium, …, a folder or a file
# The prompts
start = ""  # the prompt, or FILE:path; empty: the beginning of a document
prompts = ""  # a file of many prompts instead
out = ""  # with prompts: the JSON lines go to this file; empty: to the console
special_tokens = False  # <|endoftext|> in a prompt is the token, and not these characters
# The samples
num_samples = 3  # of each prompt
max_new_tokens = 500  # of each sample
temperature = 0.8  # below 1 likelier, above 1 more varied; 0: always the likeliest token
top_k = 200  # only the k likeliest tokens; 0: all
top_p = 1.0  # only the likeliest tokens that together hold this probability
seed = 1337
stream = False  # one sample after the other, each shown token by token
# System
batch_size = 16  # samples at a time
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # of activations: auto (bfloat16 on cuda if it can, else float32), float32, bfloat16
compile = True  # the step of a token through torch.compile, once; pays off for long texts
config = configure(globals())


# ---- prompts -------------------------------------------------------------------------------------


def check_knobs():
    """Raises ValueError for what no sampling can have."""
    at_least(config, 1, "num_samples", "max_new_tokens", "batch_size")
    at_least(config, 0, "top_k")
    check_sampling(temperature, top_k or None, top_p)
    if prompts and start:
        raise ValueError("both --start and --prompts are named; give one of them")
    if prompts and stream:
        raise ValueError("--stream shows the samples of one prompt; it does not go with --prompts")
    if out and not prompts:
        raise ValueError("--out is for the samples of a file of prompts: name one with --prompts")
    if out and os.path.exists(os.path.expanduser(out)):
        raise ValueError(f"--out: {out} is there already; remove it, or name another")


def read_rows():
    """-> a list of {"prompt": text, ...}. Raises ValueError."""
    if not prompts:
        is_file = start.startswith("FILE:")
        text = read_whole(start.removeprefix("FILE:")) if is_file else start
        return [{"prompt": clean(text)}]
    lines = read_whole(prompts).removesuffix("\n").split("\n")
    if not prompts.endswith(".jsonl"):
        return [{"prompt": clean(line)} for line in lines]
    rows = [parse_row(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f'{prompts} has no prompt; write a line such as {{"prompt": "Once"}}')
    return rows


def parse_row(line, number):
    """A line of a .jsonl file -> {"prompt": text, ...}. Raises ValueError."""
    where = f"{prompts}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error}); name a file of plain lines .txt") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{where}: an object with a text "prompt" is wanted, not {line[:80]}')
    taken = [name for name in ("sample", "completion", "tokens", "ended") if name in row]
    if taken:
        raise ValueError(f"{where}: the fields {', '.join(taken)} are written here; rename them")
    return row | {"prompt": clean(row["prompt"])}


def encode(tokenizer, text):
    """The tokens of a prompt. An end of text comes first, as before every document in training."""
    parts = text.split(END_OF_TEXT) if special_tokens else [text]
    if len(parts) > 1 and not parts[0]:
        parts = parts[1:]  # the prompt begins with the token itself
    tokens = []
    for part in parts:
        tokens += [tokenizer.eot_token, *tokenizer.encode_ordinary(part)]
    return tokens


def warn_of_long(texts, block_size):
    """Say of which prompts the model does not read the beginning."""
    for number, text in enumerate(texts, 1):
        if len(text) > block_size:
            print(
                f"prompt {number} has {len(text):,} tokens; the model reads the last {block_size}",
                file=sys.stderr,
            )


# ---- samples -------------------------------------------------------------------------------------


class Speed:
    """Counts tokens and seconds: of prompts, of the step that compiles, and of all other steps."""

    def __init__(self):
        self.prompt_tokens = self.prompt_seconds = self.compile_seconds = 0
        self.new_tokens = self.new_seconds = 0
        self.compiling = compile  # the first step is still to come

    def add(self, prompt_tokens, times, new_tokens):
        """times: when generation began, and when each step ended. new_tokens: of each step.

        The first step reads the prompts, and the second one may compile."""
        self.prompt_tokens += prompt_tokens
        self.prompt_seconds += times[1] - times[0]
        if self.compiling and len(times) > 2:
            self.compiling = False
            self.compile_seconds = times[2] - times[1]
            times, new_tokens = times[1:], new_tokens[1:]
        self.new_tokens += sum(new_tokens[1:])
        self.new_seconds += times[-1] - times[1]

    def __str__(self):
        parts = [f"prompt: {rate(self.prompt_tokens, self.prompt_seconds)}"]
        if self.new_tokens:
            parts.append(f"new: {rate(self.new_tokens, self.new_seconds)}")
        if self.compile_seconds:
            parts.append(f"the first step, compiling included: {self.compile_seconds:.1f} s")
        return " | ".join(parts)


def rate(tokens, seconds):
    return f"{tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.1f} tok/s"


def continue_texts(decoder, trained, texts, numbers, speed, show=None):
    """Continue `texts`, lists of tokens. numbers: that of each sample, which its seed depends on.

    show: called after each step with the tokens of the first sample so far.
    -> (the new tokens, whether the document ended) of each.
    """
    end = trained.tokenizer.eot_token
    times, counts = [time.perf_counter()], []
    samples = [[] for _ in texts]
    for new in generate(
        decoder,
        texts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p if top_p < 1 else None,
        n_vocab=trained.n_vocab,
        seeds=[seed + 1_000_003 * number for number in numbers],
        stop=end,
    ):
        times.append(time.perf_counter())
        counts.append(sum(token is not None for token in new))
        for sample, token in zip(samples, new):
            if token is not None:
                sample.append(token)
        if show and new[0] != end:
            show(samples[0])
    speed.add(sum(map(len, texts)), times, counts)
    return [(s[:-1], True) if s[-1] == end else (s, False) for s in samples]


class Console:
    """Shows a text that grows. Half a character at its end is not shown before the rest comes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.shown = tokenizer, 0

    def show(self, tokens):
        text = self.tokenizer.decode(tokens).rstrip("\ufffd")
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))

    def finish(self, tokens):
        print(self.tokenizer.decode(tokens)[self.shown :], end="\n\n", flush=True)


def stream_samples(decoder, trained, row, tokens, speed):
    """The samples of one prompt, each shown while it is written."""
    for number in range(num_samples):
        print(f"--- sample {number + 1} ---\n{row['prompt']}", end="", flush=True)
        console = Console(trained.tokenizer)
        [(sample, _)] = continue_texts(decoder, trained, [tokens], [number], speed, console.show)
        console.finish(sample)


def write_samples(samples, file):
    """samples: a list of (row, number, text, how many tokens, whether the document ended). With a
    file of prompts they go to `file`, as JSON lines."""
    for row, number, text, tokens, ended in samples:
        if not prompts:
            print(f"--- sample {number + 1} ---\n{row['prompt']}{text}\n", flush=True)
            continue
        added = {"sample": number + 1, "completion": text, "tokens": tokens, "ended": ended}
        print(json.dumps(row | added, ensure_ascii=file is sys.stdout), file=file, flush=True)


def open_out():
    """The file that samples go to. Raises ValueError."""
    if not out:
        return sys.stdout
    try:
        # backslashreplace writes half a surrogate pair, in any field, as JSON's escape for it.
        return open(os.path.expanduser(out), "x", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ValueError(f"--out: {out} could not be written ({error.strerror})") from error


# ---- the run -------------------------------------------------------------------------------------


def main():
    sys.stdout.reconfigure(errors="replace")  # a console may lack some of the characters
    check_knobs()
    compiler.prepare(compile)
    device = pick_device(config["device"])
    rows = read_rows()
    trained = open_trained(out_dir, checkpoint, init_from, device)
    tokens = [encode(trained.tokenizer, row["prompt"]) for row in rows]
    warn_of_long(tokens, trained.model.config.block_size)
    jobs = [(i, number) for i in range(len(rows)) for number in range(num_samples)]

    chosen = activation_dtype(dtype, trained.model, device)
    print(trained.title, file=sys.stderr)
    if chosen != torch.float32:
        cast_weights(trained.model, chosen)
    decoder = Decoder(
        trained.model,
        1 if stream else min(batch_size, len(jobs)),
        max(map(len, tokens)) + max_new_tokens,
        dtype=chosen,
    )
    if compile:
        with compiler.on_trial(chosen, step_logits, decoder):
            decoder.compile()
    speed = Speed()
    if stream:
        stream_samples(decoder, trained, rows[0], tokens[0], speed)
    else:
        file = open_out()
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            texts, numbers = [tokens[i] for i, _ in batch], [number for _, number in batch]
            written = continue_texts(decoder, trained, texts, numbers, speed)
            samples = []
            for (i, number), (sample, ended) in zip(batch, written):
                text = trained.tokenizer.decode(sample)
                samples.append((rows[i], number, text, len(sample), ended))
            write_samples(samples, file)
    print(speed, file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
