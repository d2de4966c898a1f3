"""
What a training step costs with each mixer, side by side: time, memory, compile time and kernels.

    python bench.py --mixers=identity,kronecker,tbp,rtbp,permutation,sinkhorn   # README's table
    python bench.py config/tbp.py --mixers=tbp            # GPT-2 124M, on a GPU
    python bench.py --mixers=tbp --fresh=False            # only the steps' time
    python bench.py --mixers=tbp --rounds=0 --n_layer=12  # only compile time, memory and kernels
    python bench.py --mixers=tbp --n_layer=6 --budgets=1.0,0.5,0.0      # what memory costs in time
    python bench.py --sweep_streams=2,4,8,16,32           # growth; python -m dev.growth draws it

A step is train.py's on one batch: forward, backward, clipping, fused AdamW, zero_grad. The models
take turns, a few steps each. A ratio is the median over the rounds of (residual's seconds / the
mixer's seconds) in the same round: above 1 the mixer is faster than the residual model. `fastest`
is the ratio of both models' fastest rounds, which other processes disturb least. `plain` is a GPT-2
without any notion of streams, dev/plain_gpt2.py. `bound` is the ratio that floating-point
operations alone would give, and `of bound` what share of it was reached. `min` and `max` are the
ratio's lowest and highest round, and `of one` the parameters of one connection.

Config files are train.py's. Knobs that a benchmark has no use for, such as out_dir, are left out,
and `mixers` says which mixers run. `out` gets every row as soon as it is measured.

Compile time, memory and kernels come from fresh processes:
compile_s           seconds of the first forward and backward, with an empty compiler cache
compile_cpu_s       processor seconds of the same; on CUDA without torch's compile workers
compile_warm_s      seconds in another process, with the cache that the first one left
peak_memory_bytes   parameters, optimizer state, gradients and activations at the worst moment of a
                    later step
kernels_forward     launches of kernels that Inductor generated (not matmuls, not attention) in the
kernels_backward    compiled graphs, in which a block and the head stand once at any depth
recompiles          graphs compiled after the first step: none, or a few for rtbp beyond 4 streams
                    (stacked_charts.kernel_of)
stream_gb_s         CUDA: bytes per second of the generated kernels that touch a tensor as large as
                    all streams (dev/costs.py); copy_gb_s is a copy's in the same process
"""

import json
import os
import statistics
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic; read when CUDA starts
import torch

import compiler
import runtime
from configurator import at_least, configure
from data import write_json
from dev import costs
from dev.plain_gpt2 import PlainGPT2
from dev.table import print_table, shown
from mixers import MIXERS, OPTIONS, n_logits
from model import GPT, OF_STREAMS, GPTConfig

# What to measure
mixers = "all"  # names of mixers.MIXERS with commas between, or all; plain and residual always run
compile = True  # blocks and head through torch.compile, in place, as train.py does
rounds = 20  # turns of every model; 0: no timing of steps
steps = 2  # steps in a turn
clock = "wall"  # how steps are timed; processor: CPU seconds, where other programs run as well
warmup = 3  # steps of each model before the first round
fresh = True  # compile time, memory and kernels, each row in fresh processes
out = "bench.json"  # the rows, the knobs, the machine, and what made them
# Model and batch
block_size = 256  # tokens in a sequence
batch_size = 4  # sequences in a step
vocab_size = 256
n_layer = 2
n_head = 6
n_embd = 384  # channels of one stream
n_mlp = 0  # channels inside the MLP; 0: 4 * n_embd
bias = False  # in linear layers and layer norms
# Streams; the plain and the residual model have one
n_streams = 4  # parallel residual streams
sweep_streams = ""  # instead of that number several, such as 2,4,8: rows for each
dynamic = True  # coefficients depend on the token; False: learned constants of the sublayer
gates = "auto"  # reads and writes: bounded (sigmoids), exp (writes), free, or auto (free for hc)
sees = "streams"  # what coefficients see: streams, or input, the branch's (then readout=learned)
wraps = "sublayer"  # what a hyper-connection goes around: sublayer, or block (both sublayers)
mix_scale = "none"  # learned factors of M: none; sublayer, one in all; stream, one for each row
stream_start = "equal"  # streams start as equal copies, or learned: plus a vector a stream
readout = "mean"  # what the head reads: the mean of the streams, or a learned sum
# System
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # of activations: float32, bfloat16, float16; auto: one of the first two, by device
deterministic = True  # cuda: algorithms whose result does not depend on timing, as in training
both_deterministic = False  # cuda: rows without such algorithms too, which tell what they cost
activation_memory_budget = 1.0  # of the mixers, see train.py; plain and residual keep everything
budgets = ""  # instead of that budget several, such as 1.0,0.5,0.0: rows for each
config = configure(globals(), config_of="train.py", extra=OPTIONS)
out = os.path.expanduser(out)  # a shell leaves the ~ of --out=~/bench.json

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
PLAIN, RESIDUAL = "plain", "residual"  # the yardsticks, with one stream
NOT_OF_YARDSTICKS = (*OF_STREAMS, "mix_scale")  # knobs that stay at their defaults there

# Titles of the table's columns, and the fields that stand there
COLUMNS = {
    "mixer": "mixer",
    "n": "n_streams",
    "budget": "activation_memory_budget",
    "deterministic": "deterministic",
    "params": "params",
    "of one": "connection_params",
    "step ms": "step_ms",
    "tok/s": "tok_s",
    "ratio": "ratio_to_residual",
    "min": "ratio_min",
    "max": "ratio_max",
    "fastest": "ratio_fastest",
    "of plain": "ratio_to_plain",
    "bound": "flops_bound",
    "of bound": "share_of_bound",
    "mfu": "mfu",
    "compile s": "compile_s",
    "cpu s": "compile_cpu_s",
    "warm s": "compile_warm_s",
    "peak bytes": "peak_memory_bytes",
    "peak ratio": "peak_memory_ratio",
    "kernels": "kernels_forward",
    "backward": "kernels_backward",
    "breaks": "graph_breaks",
    "recompiles": "recompiles",
    "stream GB/s": "stream_gb_s",
    "copy GB/s": "copy_gb_s",
}
# Columns that are left out where all rows have the same value
ONLY_IF_SEVERAL = ("budget", "deterministic", "breaks", "recompiles")


class Case(NamedTuple):
    """What a row is about."""

    mixer: str
    n_streams: int
    activation_memory_budget: float
    deterministic: bool

    def cache(self, folder):
        """The path in `folder` of this case's own compiler cache."""
        return os.path.join(folder, "-".join(map(str, self)))


def residual_of(case):
    """The residual model that a case is compared with."""
    return Case(RESIDUAL, 1, 1.0, case.deterministic)


# ---- what the knobs say --------------------------------------------------------------------------


def check_knobs():
    """ValueError for knobs with which nothing can be measured."""
    on_cpu = runtime.pick_device(device).type == "cpu"
    if clock not in CLOCKS or clock == "processor" and not on_cpu:
        raise ValueError(f"clock must be wall, or processor (with --device=cpu), not {clock!r}")
    at_least(config, 1, "steps", "warmup", "batch_size")
    at_least(config, 0, "rounds")
    if not (rounds or fresh):
        raise ValueError("with rounds = 0 and fresh = False there is nothing to measure")
    if not os.access(Path(out).parent, os.W_OK):
        raise ValueError(f"out = {out!r}: there is no folder {Path(out).parent} to write to")


def numbers(name, single, kind, example):
    """The numbers in the knob `name`, or `single` where it is empty. ValueError for other text."""
    text = config[name]
    try:
        return [kind(word) for word in text.split(",")] if text else [single]
    except ValueError:
        raise ValueError(
            f"{name} must be numbers with commas between, such as {example}, not {text!r}"
        ) from None


def chosen_mixers():
    """The names in `mixers`, without the yardstick. ValueError for what is unknown or unused."""
    names = list(MIXERS) if mixers == "all" else mixers.split(",")
    for name in names:
        if name not in MIXERS:
            raise ValueError(
                f"mixers = {mixers!r}: there is no mixer {name!r}; there are "
                f"{', '.join(MIXERS)}, or all"
            )
    for key, option in OPTIONS.items():
        if config[key] != option.default and not any(key in MIXERS[name].options for name in names):
            raise ValueError(f"no mixer of {mixers!r} takes {key}; leave it at {option.default!r}")
    return [name for name in names if name != RESIDUAL]


def defined_for(n, names):
    """Those of the mixers `names` that are defined for n streams; prints which are left out."""
    defined = []
    for name in names:
        try:
            n_logits(name, n)
            defined.append(name)
        except ValueError as error:
            print(f"{name} is left out: {error}", flush=True)
    return defined


def make_groups():
    """Lists of cases that take turns, one for each number of streams and each budget.

    Each begins with the yardsticks. ValueError where none of the mixers is defined, or a knob has
    a value that is refused.
    """
    names = chosen_mixers()
    levels = numbers("budgets", activation_memory_budget, float, "1.0,0.5,0.0")
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"an activation_memory_budget lies between 0 and 1; these are {levels}")
    flags = [deterministic, not deterministic] if both_deterministic else [deterministic]
    groups = []
    for n in numbers("sweep_streams", n_streams, int, "2,4,8"):
        defined = defined_for(n, names)
        if names and not defined:
            raise ValueError(f"none of {mixers!r} is defined for {n} streams; change --n_streams")
        for level in levels:
            group = [Case(name, 1, 1.0, flag) for flag in flags for name in (RESIDUAL, PLAIN)]
            group += [Case(name, n, level, flag) for flag in flags for name in defined]
            groups.append(group)
            for case in group:
                gpt_config(case)  # refuses now rather than after an hour
    return groups


def gpt_config(case):
    """The GPTConfig of a case; the plain model has the sizes of the residual one."""
    name = RESIDUAL if case.mixer == PLAIN else case.mixer
    knobs = {f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}
    if MIXERS[name].one_stream:
        knobs = {key: value for key, value in knobs.items() if key not in NOT_OF_YARDSTICKS}
    knobs |= {"mixer": name, "n_streams": case.n_streams}
    knobs["options"] = {key: config[key] for key in MIXERS[name].options}
    return GPTConfig(**knobs)


def facts(case):
    """The fields of a row that need no measurement."""
    model, yardstick = GPT(gpt_config(case)), GPT(gpt_config(residual_of(case)))
    _, connection, _ = model.blocks[0].connections()[0]
    return {
        **case._asdict(),
        "dtype": str(runtime.pick_dtype(dtype, runtime.pick_device(device))),
        "params": model.parameter_counts()["total"],
        "connection_params": sum(p.numel() for p in connection.parameters()),
        "flops_per_token": model.flops_per_token(),
        "flops_bound": yardstick.flops_per_token() / model.flops_per_token(),
    }


# ---- a step --------------------------------------------------------------------------------------


class Trainer:
    """The model of a case with its optimizer and one batch."""

    def __init__(self, case):
        self.device = runtime.pick_device(device)
        activations = runtime.pick_dtype(dtype, self.device)
        self.autocast = runtime.pick_autocast(activations, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=activations == torch.float16)
        self.deterministic = case.deterministic
        # Filling takes time, and nothing here reads memory that was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False
        runtime.keep_freed_memory()

        torch.manual_seed(0)
        build = PlainGPT2 if case.mixer == PLAIN else GPT
        self.model = build(gpt_config(case)).to(self.device)
        groups = self.model.parameters()
        if case.mixer != PLAIN:
            groups = self.model.parameter_groups(0.1)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        shape = (2, batch_size, block_size)  # idx and targets
        self.batch = torch.randint(vocab_size, shape, device=self.device)
        if compile:  # without train.py's trial, since the first compilation is measured
            self.model.compile_regions(activation_memory_budget=case.activation_memory_budget)

    def loss(self):
        torch.use_deterministic_algorithms(self.deterministic)
        with self.autocast:
            return self.model(*self.batch)[1]

    def step(self):
        """train.py's: gradients are clipped, and an update that is not finite is skipped."""
        loss = self.loss()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        bad = ~(loss.detach().isfinite() & norm.isfinite())
        self.optimizer.found_inf = bad.float()
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def wait(self):
        """Until the device has done all that was queued."""
        getattr(torch, self.device.type).synchronize()


# ---- compile time, memory, kernels: in fresh processes -------------------------------------------


def probe(case, cache):
    """What one case costs, measured in a process that has compiled nothing yet.

    cache: the folder of this process's compiler cache."""
    costs.use_cache(cache)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler tells when it starts
    trainer, launches, found = Trainer(case), [], {}
    if compile:
        if trainer.device.type == "cuda":
            costs.record_launches(launches)
        found = costs.compiling(trainer.loss, trainer.wait)
    graphs = costs.compiled_graphs()
    for _ in range(2):
        trainer.step()
    if compile:
        found["recompiles"] = costs.compiled_graphs() - graphs
    moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    kept = (*trainer.model.parameters(), *moments, trainer.batch)
    found["peak_memory_bytes"] = costs.peak_memory(trainer.step, kept, trainer.device)
    if launches:
        size = batch_size * block_size * case.n_streams * n_embd
        found |= costs.bandwidth(trainer.step, launches, size)
    return found


# ---- the steps' time -----------------------------------------------------------------------------


def take_turns(group, caches):
    """Seconds of a step of each case in each round: {case: [rounds]}.

    Compiles and warms up each of them first, with what fresh processes left in `caches`.
    """
    # Dynamo does not check the memory budget: it would use the graphs of another budget again.
    torch.compiler.reset()
    # All models share the code of their blocks. Without this the second would be compiled for
    # shapes that vary, since its streams have another shape than the first's, and the ninth never.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 8 * len(group)
    trainers, seconds = {}, {case: [] for case in group}
    for case in group:
        costs.use_cache(case.cache(caches))
        trainers[case] = Trainer(case)
        for _ in range(warmup):
            trainers[case].step()
    for _ in range(rounds):
        for case, trainer in trainers.items():
            trainer.wait()
            began = CLOCKS[clock]()
            for _ in range(steps):
                trainer.step()
            trainer.wait()
            seconds[case].append((CLOCKS[clock]() - began) / steps)
    return seconds


def speed(case, seconds, row):
    """The row fields of a case about speed. seconds: those of all cases that took turns with it."""
    own = seconds[case]
    step, tok_s = statistics.median(own), batch_size * block_size / statistics.median(own)
    residual, plain = residual_of(case), residual_of(case)._replace(mixer=PLAIN)
    ratios = [theirs / ours for theirs, ours in zip(seconds[residual], own)]
    to_plain = [theirs / ours for theirs, ours in zip(seconds[plain], own)]
    where = runtime.pick_device(device)
    peak = runtime.peak_flops(where, runtime.pick_dtype(dtype, where))
    return {
        "step_ms": step * 1e3,
        "step_ms_min": min(own) * 1e3,
        "step_ms_max": max(own) * 1e3,
        "tok_s": tok_s,
        "mfu": row["flops_per_token"] * tok_s / peak if peak else None,
        "ratio_to_residual": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratio_fastest": min(seconds[residual]) / min(own),
        "ratio_to_plain": statistics.median(to_plain),
        "plain_min": min(to_plain),
        "plain_max": max(to_plain),
        "share_of_bound": statistics.median(ratios) / row["flops_bound"],
    }


# ---- the report ----------------------------------------------------------------------------------


def write_report(about, rows):
    """`about` and the rows so far, to the file `out`."""
    write_json(out, about | {"rows": list(rows.values())})


def print_found(case, found):
    """A line with what was just measured."""
    known = {key: found[key] for key in found if key in COLUMNS.values() and found[key] is not None}
    figures = [f"{key} {shown(value)}" for key, value in known.items()]
    print(f"{case.mixer}, n = {case.n_streams}: " + ", ".join(figures), flush=True)


def main():
    provenance = runtime.provenance()
    print("command: " + provenance["command"], flush=True)
    print("config: " + json.dumps(config), flush=True)
    check_knobs()
    compiler.prepare(compile)
    machine = runtime.describe_machine(runtime.pick_device(device))
    print("machine: " + json.dumps(machine), flush=True)
    about = {"provenance": provenance, "machine": machine, "config": config}

    rows, caches = {}, tempfile.TemporaryDirectory()  # removed when the program ends
    for group in make_groups():
        new = [case for case in group if case not in rows]  # the yardsticks stand in every group
        rows |= {case: facts(case) for case in new}
        if fresh:
            # Compile time, memory and kernels hardly depend on `deterministic`: once is enough.
            for case in [case for case in new if case.deterministic == deterministic]:
                found = costs.measure_afresh(probe, case, case.cache(caches.name), twice=compile)
                rows[case] |= found
                if memory := found["peak_memory_bytes"]:
                    most = rows[residual_of(case)]["peak_memory_bytes"]
                    rows[case]["peak_memory_ratio"] = memory / most
                print_found(case, found)
                write_report(about, rows)
        if rounds:
            seconds = take_turns(group, caches.name)
            for case in new:
                found = speed(case, seconds, rows[case])
                rows[case] |= found
                print_found(case, found)
            write_report(about, rows)
    print_table(list(rows.values()), COLUMNS, ONLY_IF_SEVERAL)
    print(f"wrote {out}")


if __name__ == "__main__":
    runtime.run_script(main)
