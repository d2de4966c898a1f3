"""
Tokens per second of generation on a CPU, beside nanoGPT's way of doing it.

    OMP_NUM_THREADS=2 python -m dev.cpu_generate                    # 12 layers x 768, float32
    OMP_NUM_THREADS=2 python -m dev.cpu_generate --rows=10          # ten samples side by side
    OMP_NUM_THREADS=2 python -m dev.cpu_generate --dtype=bfloat16

The yardstick runs the one-stream model eagerly on the whole text for every token, as nanoGPT's
`generate` does: on a CPU in float32, and one sample after the other. All models take turns in one
process: at each of `places` places, evenly spaced over the new tokens, first one token of the
yardstick, then `steps` tokens of each model with a cache. The yardstick's time is the mean over the
places, since it grows with the text; the others' time is the median.

CPU seconds are those of all threads. On a busy machine they vary less, if there is one thread:
threads that wait for each other spend CPU seconds too. Weights are random, which does not change
the time.
"""

import statistics
import time

import torch
from torch.nn import functional as F

import compiler
import runtime
from configurator import configure
from dev.table import print_table
from generate import Decoder, cast_weights, sample_token, step_logits
from model import GPT, GPTConfig

mixers = "residual,tbp"  # names of mixers.MIXERS
n_streams = 4
prompt_tokens = 16
new_tokens = 200
places = 10
steps = 4  # of each model at a place
rows = 1  # texts that the models with a cache continue side by side
top_k = 200
n_layer = 12
n_embd = 768
n_head = 12
block_size = 1024
vocab_size = 50304
dtype = "float32"  # of the models with a cache: float32 or bfloat16
compile = True  # the step of a token
config = configure(globals())

COLUMNS = {
    "model": "model",
    "ms a token": "wall",
    "to the yardstick": "gain",
    "CPU ms": "cpu",
    "to the yardstick, CPU": "cpu_gain",
}


def build(mixer):
    torch.manual_seed(0)
    n = 1 if mixer == "residual" else n_streams
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "block_size": block_size}
    return GPT(GPTConfig(**sizes, vocab_size=vocab_size, mixer=mixer, n_streams=n)).eval()


@torch.no_grad()
def yardstick_step(model, text):
    """One token as nanoGPT's generate finds it: text (1, T) -> (1, T + 1)."""
    streams = model.embed(text)
    x0 = streams.x
    for block in model.blocks:
        streams = block(streams, x0)
    logits = model.head(streams.at([text.shape[1] - 1]), model.embed.wte.weight)[0][:, 0]
    kth = logits.topk(top_k).values[:, -1:]
    probabilities = F.softmax(logits.masked_fill(logits < kth, -torch.inf), -1)
    return torch.cat([text, torch.multinomial(probabilities, 1)], 1)


def decoder_step(decoder, logits, numbers):
    """One token of a decoder, from the logits of the one before."""
    return decoder.step(sample_token(logits, numbers, top_k=top_k), [True] * rows)


class Times:
    """Seconds of each call, by the clock on the wall and by the CPU's."""

    def __init__(self):
        self.wall, self.cpu = [], []

    def call(self, work, *arguments):
        wall, cpu = time.perf_counter(), time.process_time()
        result = work(*arguments)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return result


def main():
    compiler.prepare(compile)
    plain = build("residual")
    models = {name: build(name) for name in mixers.split(",")}
    activations = getattr(torch, dtype)
    length = prompt_tokens + new_tokens
    numbers = torch.rand(rows, dtype=torch.float64)
    decoders, logits = {}, {}
    for name, model in models.items():
        if activations != torch.float32:
            cast_weights(model, activations)
        decoders[name] = Decoder(model, rows, length, dtype=activations)
        if compile:
            with compiler.on_trial(activations, step_logits, decoders[name]):
                decoders[name].compile()
        logits[name] = decoders[name].prefill(list(range(rows)), [[0] * prompt_tokens] * rows)
        began = time.perf_counter()
        logits[name] = decoder_step(decoders[name], logits[name], numbers)
        print(f"{name}: the first step took {time.perf_counter() - began:.1f} s", flush=True)

    yardstick, times = Times(), {name: Times() for name in models}
    yardstick_step(plain, torch.zeros(1, prompt_tokens, dtype=torch.int64))  # warms up
    for place in range(places):
        at = prompt_tokens + int((place + 0.5) * new_tokens / places)
        yardstick.call(yardstick_step, plain, torch.zeros(1, at, dtype=torch.int64))
        for name, decoder in decoders.items():
            decoder.used = [at] * rows
            for _ in range(steps):
                logits[name] = times[name].call(decoder_step, decoder, logits[name], numbers)

    base = {"wall": statistics.mean(yardstick.wall), "cpu": statistics.mean(yardstick.cpu)}
    lines = [{"model": "nanoGPT's loop", **{key: s * 1e3 for key, s in base.items()}}]
    for name, own in times.items():
        wall, cpu = statistics.median(own.wall) / rows, statistics.median(own.cpu) / rows
        row = {"model": f"{name}, n = {models[name].config.n_streams}"}
        row |= {"wall": wall * 1e3, "gain": base["wall"] / wall}
        lines.append(row | {"cpu": cpu * 1e3, "cpu_gain": base["cpu"] / cpu})
    print_table(lines, COLUMNS)


if __name__ == "__main__":
    runtime.run_script(main)
