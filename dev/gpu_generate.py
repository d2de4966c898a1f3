"""
Tokens per second of generation with a cache: several streams beside one.

    python -m dev.gpu_generate --folder=out-gpu             # 12 layers x 768, one and 16 sequences

The models take turns. A figure is the median of the rounds, beside the slowest and the fastest. The
time includes reading the prompts, and not compiling. Weights are random, which does not change the
time. FOLDER/generate.json has all figures.
"""

import json
import statistics
import time
from pathlib import Path

import torch

import compiler
import runtime
from configurator import configure
from data import write_json
from dev.table import print_table
from generate import Decoder, cast_weights, generate, step_logits
from mixers import find_mixer
from model import GPT, GPTConfig

folder = "out-gpu"  # everything is written here
mixers = "residual,identity,hc,tbp"  # names of mixers.MIXERS; ratios are to the first
n_streams = 4
batches = "1,16"  # how many sequences at a time; rows of the table for each number
prompt_tokens = 32
new_tokens = 256
rounds = 5
n_layer = 12
n_embd = 768
n_head = 12
block_size = 1024
vocab_size = 50304
device = "auto"
dtype = "auto"
compile = True  # the step of a token
config = configure(globals())

COLUMNS = {
    "mixer": "mixer",
    "n": "n_streams",
    "sequences": "sequences",
    "tok/s": "tok_s",
    "slowest": "slowest",
    "fastest": "fastest",
    "ratio": "ratio",
}


def build(mixer, where):
    torch.manual_seed(0)
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "block_size": block_size}
    n = 1 if find_mixer(mixer).one_stream else n_streams
    model = GPT(GPTConfig(**sizes, vocab_size=vocab_size, mixer=mixer, n_streams=n))
    return model.to(where).eval()


def time_generation(decoder):
    """The seconds for new_tokens tokens of each row of the decoder."""
    wait = getattr(torch, decoder.device.type).synchronize
    prompts = [[0] * prompt_tokens] * decoder.rows
    wait()
    began = time.perf_counter()
    for _ in generate(decoder, prompts, new_tokens):
        pass
    wait()
    return time.perf_counter() - began


def take_turns(models, sequences, activations):
    """-> {mixer: seconds of each round} for so many sequences at a time."""
    length = prompt_tokens + new_tokens
    decoders = {
        mixer: Decoder(model, sequences, length, dtype=activations)
        for mixer, model in models.items()
    }
    if compile:
        for decoder in decoders.values():
            with compiler.on_trial(decoder.dtype, step_logits, decoder):
                decoder.compile()
    seconds = {mixer: [] for mixer in models}
    for _ in range(rounds + 1):
        for mixer, decoder in decoders.items():
            seconds[mixer].append(time_generation(decoder))
    return {mixer: own[1:] for mixer, own in seconds.items()}  # the first round warms up


def table_rows(models, sequences, seconds):
    """A row for each model. seconds: of `take_turns`."""
    rows, tokens = [], sequences * new_tokens
    base = next(iter(seconds.values()))
    for mixer, own in seconds.items():
        rows.append(
            {
                "mixer": mixer,
                "n_streams": models[mixer].config.n_streams,
                "sequences": sequences,
                "tok_s": tokens / statistics.median(own),
                "slowest": tokens / max(own),
                "fastest": tokens / min(own),
                "ratio": statistics.median(b / o for b, o in zip(base, own)),
            }
        )
    return rows


def main():
    compiler.prepare(compile)
    path = Path(folder) / "generate.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    where = runtime.pick_device(device)
    activations = runtime.pick_dtype(dtype, where)
    models = {mixer: build(mixer, where) for mixer in mixers.split(",")}
    if activations != torch.float32:
        for model in models.values():
            cast_weights(model, activations)
    rows = []
    for sequences in map(int, batches.split(",")):
        rows += table_rows(models, sequences, take_turns(models, sequences, activations))
    about = {
        "provenance": runtime.provenance(),
        "machine": runtime.describe_machine(where),
        "config": config,
    }
    write_json(path, about | {"rows": rows})
    print("machine: " + json.dumps(about["machine"]) + f", commit {about['provenance']['commit']}")
    print_table(rows, COLUMNS)
    print(f"wrote {path}")


if __name__ == "__main__":
    runtime.run_script(main)
