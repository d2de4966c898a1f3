"""
What a training step costs with each mixer: time, memory, compile time, kernels, side by side in one run.

    python bench.py --mixers=residual,identity,sinkhorn,permutation,kronecker,tbp,rtbp      # the README's table
    python bench.py config/tbp.py                               # GPT-2 124M, on a GPU
    python bench.py --mixers=tbp --fresh=False                  # only the steps' time
    python bench.py --mixers=tbp --rounds=0 --n_layer=12        # only compile time, memory and kernels
    python bench.py --mixers=tbp --n_layer=6 --budgets=1.0,0.5,0.0      # what memory costs in time
    python bench.py --help                                      # every knob

A step is forward, backward, fused AdamW and zero_grad on one batch. The models take turns, a few steps each, and a
mixer's ratio is the median over the rounds of (residual's seconds / its seconds) in the same round: above 1 it is faster
than the residual model. `fastest` is the same of both models' fastest rounds, which other processes disturb least.
`plain` is a GPT-2 without any notion of streams, written below. Config files are train.py's: the knobs that a benchmark
has no use for, such as out_dir, are left out, and `mixers` says which mixers run.

Every row's compile time, memory and kernels come from fresh processes:
compile_s           seconds of the first forward and backward, with an empty compiler cache
compile_warm_s      the same in another process, with the cache that the first one left
peak_memory_bytes   parameters, optimizer state, gradients and activations at the worst moment of a later step: CUDA's own
                    figure, or the running sum of the CPU allocator's events. The compiler's memory is not in it
kernels_forward     launches of kernels that Inductor generated (not matmuls, not attention), in the graphs that were
kernels_backward    compiled, in which a block and the head stand once each however deep the model is
recompiles          graphs compiled after the first step, which should be none
"""
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # deterministic cuBLAS; read when CUDA starts
import numpy as np
import torch
import torch._dynamo
import torch._inductor.graph
from torch import nn
from torch._inductor.analysis.device_info import datasheet_tops
from torch.nn import functional as F

from configurator import configure
from data import TokenBlocks, write_atomic, write_meta, write_shard
from mixers import MIXERS, OPTIONS, n_logits
from model import GPT, GPTConfig

# What to measure
mixers = "all"                      # names of mixers.MIXERS with commas between, or all; plain and residual always run
mode = "compiled"                   # compiled or eager
rounds = 20                         # turns of every model; 0: no timing of steps
steps = 2                           # steps in a turn
warmup = 3                          # steps of each model before the first round
fresh = True                        # compile time, memory and kernels, each row in fresh processes
out = "bench.json"                  # a list of objects, one for each row
# Model and batch
block_size = 256                    # tokens in a sequence
batch_size = 4                      # sequences in a step
vocab_size = 256
n_layer = 2
n_head = 6
n_embd = 384                        # channels of one stream
bias = False                        # in linear layers and layer norms
n_streams = 4                       # parallel residual streams; the residual model has 1
dynamic = True                      # mixing depends on the token; False: learned constants of the layer
# System
device = "auto"                     # auto (cuda if there is one), cpu or cuda
dtype = "auto"                      # of activations: auto (bfloat16 on cuda if it can, else float32), float32, bfloat16
deterministic = True                # cuda: algorithms whose result does not depend on timing, as in training
activation_memory_budget = 1.0      # of the mixers, see train.py; plain and residual keep all that the backward needs
budgets = ""                        # instead of that one several, such as 1.0,0.5,0.0: a row for each
config = configure(globals(), config_of="train.py", extra=OPTIONS)

RESIDUAL, PLAIN = ("residual", 1.0), ("plain", 1.0)     # a case is a pair (mixer, activation_memory_budget)
FRESH = ("compile_s", "compile_warm_s", "peak_memory_bytes", "peak_memory_ratio", "kernels_forward", "kernels_backward",
         "graph_breaks", "recompiles")
SPEED = ("step_ms", "tok_s", "ratio_to_residual", "ratio_min", "ratio_max", "ratio_fastest", "mfu", "data_wait")


class PlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd, bias=bias), nn.LayerNorm(n_embd, bias=bias)
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd, bias=bias), nn.Linear(n_embd, n_embd, bias=bias)
        self.c_fc, self.c_out = nn.Linear(n_embd, 4 * n_embd, bias=bias), nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x):                                                                   # (B, T, C)
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(C, -1)
        q, k, v = (h.view(B, T, n_head, C // n_head).transpose(1, 2) for h in (q, k, v))    # (B, H, T, C/H)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class PlainHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_f = nn.LayerNorm(n_embd, bias=bias)

    def forward(self, x, wte, targets):
        logits = F.linear(self.ln_f(x), wte)
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Plain(nn.Module):
    """GPT-2 as nanoGPT has it: the yardstick for our own residual model."""
    compile_regions = GPT.compile_regions       # the same settings, whatever they are

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks, self.head = nn.ModuleList(PlainBlock() for _ in range(n_layer)), PlainHead()
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, 0, 0.02)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        if torch.is_autocast_enabled(idx.device.type):
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        for block in self.blocks:
            x = block(x)
        return self.head(x, self.wte.weight, targets)


class Trainer:
    """The model of a row with its optimizer and one batch."""

    def __init__(self, mixer, budget):
        where, kind = pick_device()
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False     # costs time, and nothing here reads such memory
        torch.manual_seed(0)
        self.autocast = torch.autocast(where.type, torch.bfloat16) if kind == "bfloat16" else contextlib.nullcontext()
        self.model = (Plain() if mixer == "plain" else GPT(gpt_config(mixer))).to(where)
        groups = self.model.parameters() if mixer == "plain" else self.model.parameter_groups(0.1)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        self.batch = torch.randint(vocab_size, (2, batch_size, block_size), device=where)      # idx and targets
        if mode == "compiled":
            self.model.compile_regions(activation_memory_budget=budget)

    def loss(self):
        with self.autocast:
            return self.model(*self.batch)[1]

    def step(self):
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main():
    print("command: " + shlex.join(["bench.py", *sys.argv[1:]]), flush=True)
    print("config: " + json.dumps(config), flush=True)
    check_knobs()
    chosen, levels = choose_mixers(), choose_budgets()
    rows = {case: facts(*case) for case in (PLAIN, RESIDUAL, *((mixer, level) for level in levels for mixer in chosen))}
    if fresh:
        for case, row in rows.items():
            row |= measure_afresh(*case)
            figures = [f"{name} {row[name]:,.4g}" for name in FRESH if row[name] is not None]
            print(f"{case[0]}, budget {case[1]}: " + ", ".join(figures), flush=True)
        for row in rows.values():
            row["peak_memory_ratio"] = row["peak_memory_bytes"] / rows[RESIDUAL]["peak_memory_bytes"]
    if rounds:
        data_seconds = fetch_seconds()
        for level in levels:
            cases = [case for case in rows if case in (RESIDUAL, PLAIN) or case[1] == level]
            seconds = take_turns(cases)
            for case in cases:
                rows[case] |= speed(seconds[case], seconds[RESIDUAL], rows[case]["flops_per_token"], data_seconds)
    print_table(list(rows.values()))            # first: what was measured is seen even where it cannot be written
    write_atomic(out, json.dumps(list(rows.values()), indent=1).encode() + b"\n")
    if rounds:
        slowest = max(row["data_wait"] for row in rows.values())
        print(f"fetching a batch takes {data_seconds * 1e3:.3f} ms: the loop waits for data at most {slowest:.2%} of the time")
    print(f"wrote {out}")


def check_knobs():
    if mode not in ("compiled", "eager"):
        raise ValueError(f"mode must be compiled or eager, not {mode!r}")
    if min(steps, warmup, batch_size) < 1:
        raise ValueError(f"steps, warmup and batch_size must be at least 1, not {steps}, {warmup} and {batch_size}")
    if rounds < 0:
        raise ValueError(f"rounds must be at least 0, not {rounds}")
    if not (rounds or fresh):
        raise ValueError("with rounds = 0 and fresh = False there is nothing to measure; change one of them")


def choose_mixers():
    """The names in `mixers`, without those that are not defined for n_streams. ValueError for unknown ones."""
    names = list(MIXERS) if mixers == "all" else mixers.split(",")
    if unknown := [name for name in names if name not in MIXERS]:
        raise ValueError(f"mixers = {mixers!r}: there is no mixer {unknown[0]!r}; there are {', '.join(MIXERS)}, or all")
    chosen = []
    for name in names:
        try:
            n_logits(name, 1 if name == "residual" else n_streams)
            chosen.append(name)
        except ValueError as error:
            print(f"{name} is left out: {error}", flush=True)
    if not chosen:
        raise ValueError(f"mixers = {mixers!r}: none of them is defined for n_streams = {n_streams}; change --n_streams")
    return chosen


def choose_budgets():
    try:
        levels = [float(text) for text in budgets.split(",")] if budgets else [activation_memory_budget]
    except ValueError:
        raise ValueError(f"budgets must be numbers with commas between, such as 1.0,0.5,0.0, not {budgets!r}") from None
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"an activation_memory_budget lies between 0 and 1; these are {levels}")
    return levels


def gpt_config(mixer):
    sizes = {f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}
    options = {name: config[name] for name in MIXERS[mixer].options}
    n = 1 if MIXERS[mixer].one_stream else n_streams
    return GPTConfig(**sizes | {"mixer": mixer, "n_streams": n, "options": options})


def pick_device():
    """The device and the type of activations."""
    if device not in ("auto", "cpu", "cuda") or device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {device!r}: there are auto, cpu and, with a GPU and a torch for it, cuda; this torch is "
                         f"{torch.__version__}. CUDA_VISIBLE_DEVICES=1 chooses the second GPU")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, not {dtype!r}")
    name = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
    best = "bfloat16" if name == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.device(name), best if dtype == "auto" else dtype


def synchronize():
    if pick_device()[0].type == "cuda":
        torch.cuda.synchronize()


def facts(mixer, budget):
    """What a row says before anything was measured: every knob, and what it comes to for this case."""
    where, kind = pick_device()
    model = GPT(gpt_config("residual" if mixer == "plain" else mixer))      # plain has the same parameters
    return {"mixer": mixer, **config, "n_streams": model.config.n_streams, "activation_memory_budget": budget, "dtype": kind,
            "device": torch.cuda.get_device_name() if where.type == "cuda" else "cpu", "threads": torch.get_num_threads(),
            "torch": torch.__version__, "params": model.parameter_counts()["total"], "flops_per_token": model.flops_per_token(),
            **dict.fromkeys((*FRESH, *SPEED))}


def measure_afresh(mixer, budget):
    """The fields of FRESH, each from a process that has compiled nothing yet."""
    def fresh_process(cache):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(probe, mixer, budget, cache).result()

    with tempfile.TemporaryDirectory() as cache:
        cold = fresh_process(cache)
        if mode == "eager":
            return cold
        warm = fresh_process(cache)
    return cold | {"compile_warm_s": warm["compile_s"], "peak_memory_bytes": warm["peak_memory_bytes"]}


def probe(mixer, budget, cache):
    """Runs in a process of its own, with `cache` for the compiler's."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": os.path.join(cache, "triton")}
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")          # else the profiler tells when it starts
    programs, counters = [], torch._dynamo.utils.counters
    torch._inductor.graph.GraphLowering.save_output_code = programs.append
    trainer = Trainer(mixer, budget)
    synchronize()
    started = time.perf_counter()
    loss = trainer.loss()
    n_forward = len(programs)           # the backward is compiled when it first runs
    loss.backward()
    synchronize()
    compile_s = time.perf_counter() - started
    del loss
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(2):
        trainer.step()
    peak = peak_memory(trainer)
    kernels = [len(re.findall(r"^ +(?:cpp_|triton_)\w+(?:\.run)?\(", program, re.M)) for program in programs]
    compiled = {"compile_s": compile_s, "kernels_forward": sum(kernels[:n_forward]), "kernels_backward": sum(kernels[n_forward:]),
                "graph_breaks": sum(counters["graph_break"].values()), "recompiles": counters["stats"]["unique_graphs"] - graphs}
    return {"peak_memory_bytes": peak} | (compiled if mode == "compiled" else {})


def peak_memory(trainer):
    """Bytes of tensors at the worst moment of a step."""
    where = pick_device()[0]
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        trainer.step()
        return torch.cuda.max_memory_allocated(where)
    moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    kept = sum(tensor.nbytes for tensor in (*trainer.model.parameters(), *moments, trainer.batch))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]     # a free is negative
    return kept + max(itertools.accumulate(changes))


def take_turns(cases):
    """Seconds of a step of each case in each round: {case: [rounds]}. Compiles and warms up each of them first."""
    torch.compiler.reset()              # a budget is no guard: the graphs of another one would be taken again
    # All models share the code of their blocks, so without these the second would be compiled for shapes that vary,
    # since its streams have another shape than the first's, and the ninth not at all.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 8 * len(cases)
    trainers, seconds = {}, {case: [] for case in cases}
    for case in cases:
        trainers[case] = Trainer(*case)
        for _ in range(warmup):
            trainers[case].step()
    for _ in range(rounds):
        for case, trainer in trainers.items():
            synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                trainer.step()
            synchronize()
            seconds[case].append((time.perf_counter() - started) / steps)
    return seconds


def speed(seconds, residual, flops_per_token, data_seconds):
    """The fields of SPEED from a step's seconds in each round, and the residual model's."""
    where, kind = pick_device()
    step, ratios = statistics.median(seconds), [b / a for a, b in zip(seconds, residual)]
    tok_s = batch_size * block_size / step
    peak_flops = (datasheet_tops(getattr(torch, kind)) or 0) * 1e12 if where.type == "cuda" else 0      # of dense matmuls
    return {"step_ms": step * 1e3, "tok_s": tok_s, "ratio_to_residual": statistics.median(ratios), "ratio_min": min(ratios),
            "ratio_max": max(ratios), "ratio_fastest": min(residual) / min(seconds),
            "mfu": flops_per_token * tok_s / peak_flops if peak_flops else None,
            "data_wait": data_seconds / step}


def fetch_seconds():
    """Seconds that a batch takes from a shard to the device, as train.py fetches it."""
    where, n, tokens = pick_device()[0], 200, max(2**22, 2 * batch_size * block_size)
    with tempfile.TemporaryDirectory() as folder:
        write_shard(os.path.join(folder, "train.bin"), np.random.default_rng(0).integers(min(vocab_size, 2**16), size=tokens))
        write_meta(folder, {"tokenizer": "bytes", "vocab_size": vocab_size, "eot_token": 0, "source": {}, "command": "bench.py",
                            "splits": {"train": {"tokens": tokens, "shards": [{"file": "train.bin", "tokens": tokens, "crc32": ""}]},
                                       "val": {"tokens": 0, "shards": []}}})
        blocks = TokenBlocks(folder, "train", block_size, pin_memory=where.type == "cuda")
        started = time.perf_counter()
        for step in range(n):
            for tensor in blocks.batch(step, batch_size, 0, batch_size):
                tensor.to(where, non_blocking=True)
        synchronize()
        return (time.perf_counter() - started) / n


def print_table(rows):
    columns = {"mixer": "mixer", "n": "n_streams", "budget": "activation_memory_budget", "step ms": "step_ms", "tok/s": "tok_s",
               "ratio": "ratio_to_residual", "min": "ratio_min", "max": "ratio_max", "fastest": "ratio_fastest", "mfu": "mfu",
               "compile s": "compile_s", "warm s": "compile_warm_s", "peak bytes": "peak_memory_bytes",
               "peak ratio": "peak_memory_ratio", "params": "params", "kernels": "kernels_forward", "backward": "kernels_backward",
               "breaks": "graph_breaks", "recompiles": "recompiles"}
    measured = {title: [row[name] for row in rows] for title, name in columns.items()}
    table = [[title, *map(shown, values)] for title, values in measured.items() if set(values) != {None}]
    widths = [max(map(len, column)) for column in table]
    for line in zip(*table):
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]))


def shown(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else value or "-"         # text, or None: not measured


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:             # what the user can put right
        sys.exit(f"{type(error).__name__}: {error}")
