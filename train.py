"""
Train a GPT with mixed residual streams.

    python train.py config/tbp.py config/laptop.py                   # minutes on a CPU
    torchrun --standalone --nproc_per_node=8 train.py config/tbp.py  # the real job: 8 GPUs
    torchrun --standalone --nproc_per_node=8 train.py config/tbp.py --init_from=resume
    python train.py --out_dir=out/tbp --init_from=resume             # with the run's own knobs
    python train.py --out_dir=out/tbp --init_from=resume --eval_only=True
    python train.py config/finetune.py --init_from=gpt2              # from weights: warm_start.py
    python train.py config/finetune.py --init_from=auto:out/tbp --dataset=mytexts
    python train.py --help                                           # every knob

Several machines, and SLURM: dev/many_machines.md.

The knobs below are those of GPT-2 124M with 4 TBP streams on OpenWebText; config files and
--key=value override them.

Which tokens a step sees depends on (seed, step) alone; dropout also on rank, number of processes
and batch_size. With these unchanged, a killed and resumed run ends with the same bits.

Times in log lines are those of steps alone; only the time left counts evaluating and saving too.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic; read when CUDA starts
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import compiler
import recipe
import runtime
import warm_start
from batches import evaluate, micro_batches, open_splits, sequences_per_step, to_device
from configurator import configure, resolve
from data import verify, write_json
from mixers import OPTIONS
from model import GPT
from progress import Clock, Metrics, Progress, Tally, log_line, metrics_line
from runtime import RunError, on_all_ranks, on_rank_0, print0
from tokenizer import tokenizer_name
from trackers import check_packages, open_trackers

# Run
out_dir = "out"  # checkpoints, metrics.jsonl and config.json go here
init_from = "scratch"  # scratch, resume, gpt2, a path; auto, auto:gpt2 (resume if there is a run)
eval_only = False  # evaluate, print and end; nothing is written
seed = 1337  # of weights, data order and dropout
eval_interval = 2000  # steps between evaluations
eval_tokens = 20 * 12 * 8 * 1024  # validation tokens an evaluation reads, the same every time
log_interval = 1  # steps between log lines; each waits for the device
checkpoint_interval = 2000  # steps between checkpoints
keep_checkpoints = 2  # how many of the newest to keep, beside the best
tensorboard = False  # what goes to metrics.jsonl goes to out_dir/tensorboard too
wandb_project = ""  # and to this project of Weights & Biases
# Data
data_dir = "data"  # where prepare_data.py writes
dataset = "openwebtext"  # a folder of data_dir
# Model: see GPTConfig in model.py; the vocabulary comes from the data set
block_size = 1024  # tokens in a sequence
n_layer = 12
n_head = 12
n_embd = 768  # channels of one stream
n_mlp = 0  # channels inside the MLP; 0: 4 * n_embd
dropout = 0.0  # 0 is good for pretraining
bias = False  # in linear layers and layer norms
mixer = "tbp"  # residual, identity, hc, sinkhorn, permutation, kronecker, tbp, rtbp, or a control
n_streams = 4  # parallel residual streams; 1 for residual
dynamic = True  # coefficients depend on the token; False: learned constants of the sublayer
gates = "auto"  # reads and writes: bounded, exp (writes), free, or auto (free for hc)
mix_scale = "none"  # learned factors of M: none; sublayer, one in all; stream, one for each row
sees = "streams"  # what coefficients see: streams, or input, the branch's (then readout=learned)
wraps = "sublayer"  # what a hyper-connection goes around: sublayer, or block (both sublayers)
mix_start = 0.01  # eps: M starts as (1 - eps) I + (eps / n) 11^T; hc, orthogonal: as I
alpha_start = 0.01  # factor, at the start, of what a token adds to the coefficients' logits
read_start = 0.7  # weight of the stream that a sublayer reads most, at the start
embed_scale = 1.0  # a factor of the embedding on its way into the streams
stream_start = "equal"  # streams start as equal copies, or learned: plus a vector a stream
readout = "mean"  # what the head reads: the mean of the streams, or a learned sum
x0_scalars = False  # residual: each block starts from r x + s x0, with r and s learned
stream_dtype = "auto"  # of the residual state: auto (that of the activations), float32, bfloat16
# Optimizer
batch_size = 12  # sequences in a micro-step of one process
total_batch_tokens = 12 * 1024 * 5 * 8  # sequences * tokens * micro-steps * GPUs = 491,520
max_iters = 600_000  # steps: 295B tokens, 33 epochs of OpenWebText; nanoGPT's schedule
learning_rate = 6e-4  # peak, after warmup
min_lr = 6e-5  # at the end of the cosine
warmup_iters = 2000  # steps of linear warmup
lr_decay_iters = 600_000  # steps until min_lr
connection_lr = 1.0  # a factor of the rate for the hyper-connections' phi, alpha and biases
weight_decay = 0.1  # of matrices and embeddings; norms, biases and alphas do not decay
decay_phi = True  # whether phi decays as the other matrices do
beta1 = 0.9  # AdamW
beta2 = 0.95  # AdamW
grad_clip = 1.0  # norm that gradients are clipped to; 0: never
max_bad_steps = 10  # stop, at a log line, after so many steps in a row that are not finite
# System
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # of activations: float32, bfloat16, float16; auto: one of the first two, by device
compile = True  # blocks and head through torch.compile, in place
activation_memory_budget = 1.0  # share of the backward's needs that is kept, not computed again
deterministic = True  # cuda: algorithms whose result does not depend on timing (a CPU's never does)
peak_flops = 0.0  # of one device, for MFU; 0: looked up by the GPU's name
hang_minutes = 10.0  # several processes: the run ends when the others wait so long for a rank
# With init_from=resume and no config file, knobs that the command does not name are the run's.
arguments = checkpoint.resume_arguments(sys.argv[1:], out_dir, {*globals(), *OPTIONS})
config = configure(globals(), arguments, extra=OPTIONS)
# The model's knobs that the user did not name are those of the weights in init_from.
if of_weights := warm_start.knobs(init_from, os.path.expanduser(out_dir)):
    config = resolve(Path(__file__), [*of_weights, *arguments], extra=OPTIONS)
config["out_dir"] = os.path.expanduser(config["out_dir"])  # a shell leaves the ~ of --out_dir=~/x
globals().update(config)


# ---- before the first step -----------------------------------------------------------------------


def check_knobs():
    """Raises ValueError for knobs that no run can have, or not here."""
    recipe.check(config)
    warm_start.check_source(init_from, out_dir)
    check_packages(config)


def open_folder(group):
    """-> a lock on out_dir, to keep until the process ends; and the path of the checkpoint that the
    run goes on from, or None. Raises RunError."""
    lock = None
    if init_from == "resume":  # refused before there is a folder
        on_rank_0(group, checkpoint.check_resumable, out_dir)
    if not eval_only:
        lock = on_rank_0(group, checkpoint.lock, out_dir)
    start = on_rank_0(group, checkpoint.starting_point, out_dir, init_from)
    return lock, runtime.from_rank_0(group, start)


def build_model(vocab_size):
    """The model at its start, the same on every rank."""
    torch.manual_seed(seed)
    padded = math.ceil(vocab_size / 64) * 64
    return GPT(recipe.gpt_config(config, vocab_size=padded))


def compile_model(model, val_blocks, machine):
    """Compile the model in place. Raises RunError where this version of torch is unknown to the
    tests, and compiles it wrongly."""
    # Dynamo need not split graphs at DDP's buckets: communication overlaps from block to block.
    torch._dynamo.config.optimize_ddp = False
    sample = to_device(val_blocks.in_order(0, 1), machine.device)
    trial = (compiler.loss_and_gradients, model, sample, machine.autocast)
    with compiler.on_trial(machine.dtype, *trial):
        model.compile_regions(activation_memory_budget=activation_memory_budget)


def open_metrics(step, provenance):
    """Write config.json and open metrics.jsonl, which keeps its lines up to `step`."""
    write_json(os.path.join(out_dir, "config.json"), {**config, "provenance": provenance})
    trackers = open_trackers(config, step, provenance)
    return Metrics(out_dir, step, trackers)


def about_run(model, meta, provenance):
    """What all checkpoints of the run have in common."""
    return {
        "config": config,
        "model_config": asdict(model.config),
        "command": sys.argv,
        "provenance": provenance,
        "tokenizer": meta["tokenizer"],
        "n_vocab": meta["vocab_size"],
        "shards": checkpoint.fingerprint(meta),
    }


# ---- what the loop calls -------------------------------------------------------------------------


class Run:
    """What the loop works with."""

    def __init__(self, machine, model, optimizer, progress, about, metrics):
        """about: what all checkpoints of the run have in common. metrics: those of rank 0."""
        self.machine, self.model, self.optimizer = machine, model, optimizer
        self.progress, self.about, self.metrics = progress, about, metrics
        self.replica = model
        if machine.group:
            gpu = [machine.device.index] if machine.device.type == "cuda" else None
            # Buffers are constants: there is nothing to broadcast at every step.
            self.replica = DistributedDataParallel(
                model, device_ids=gpu, forward_sync_buffers=False
            )
        # In float16, small gradients would be 0 if the loss were not scaled up. With another dtype
        # the scaler does nothing.
        half = machine.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=half)
        if progress.scaler:
            self.scaler.load_state_dict(progress.scaler)
        self.tally = Tally(progress.tally, machine.device)
        self.clock = Clock(progress.step)  # restarts at log lines, evaluations and checkpoints
        self.whole_run = Clock(progress.step)  # of everything after the first step, which compiles
        peak = peak_flops or runtime.peak_flops(machine.device, machine.dtype)
        peak *= runtime.ranks()[2]
        flops_per_step = model.flops_per_token() * total_batch_tokens
        self.ideal_ms = flops_per_step / peak * 1e3 if peak else 0.0


def learning_rate_at(step):
    """Linear warmup, then a cosine down to min_lr at lr_decay_iters, and min_lr from then on.

    In the warmup step s (0, 1, …) has (s + 1) / (warmup_iters + 1) of the peak.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    done = min(1.0, (step - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)


def save(run, best=False):
    """Write a checkpoint."""
    progress = run.progress
    progress.tally, progress.scaler = run.tally.read(), run.scaler.state_dict()
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    state |= vars(progress) | run.about
    checkpoint.save(out_dir, state, keep=keep_checkpoints, best=best)


def evaluate_and_log(run, blocks):
    """-> whether the loss is the lowest so far."""
    progress = run.progress
    val, gain = evaluate(run.model, blocks, eval_tokens, batch_size, run.machine)
    print0(f"step {progress.step}/{max_iters} | val {val:.4f} | composite gain {gain:.3f}")
    if run.metrics:
        run.metrics.write(step=progress.step, val=val, gain=gain)
    improved = val < progress.best_val  # a loss that is NaN never is
    if improved:
        progress.best_val = val
    progress.evaluated = progress.step
    return improved


def forward_backward(run, batch, batches, micro_steps):
    """Add up the gradients of a step's micro-batches, of which `batch` is the first.

    -> the mean loss over all ranks, and the first micro-batch of the next step.
    """
    rank, _, world_size = runtime.ranks()
    torch.manual_seed(seed + 1_000_003 * run.progress.step + rank)  # dropout: by step and rank
    loss = torch.zeros((), device=run.machine.device)
    for micro_step in range(micro_steps):
        run.replica.require_backward_grad_sync = micro_step == micro_steps - 1  # of DDP
        with run.machine.autocast:
            micro_loss = run.replica(*batch)[1] / micro_steps
        began = time.perf_counter()
        batch = next(batches)  # while the device is busy with what was queued
        run.clock.waited += time.perf_counter() - began
        run.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    if run.machine.group:
        dist.all_reduce(loss)
        loss /= world_size
    return loss, batch


def update(run, loss, lr):
    """Clip the gradients and step; where loss or gradients are not finite, skip the step.

    -> the norm of the gradients.
    """
    optimizer, limit = run.optimizer, grad_clip or math.inf
    for settings in optimizer.param_groups:
        settings["lr"] = lr * settings["lr_factor"]
    run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), limit)
    bad = ~(loss.isfinite() & norm.isfinite())
    # A fused optimizer skips its whole update where found_inf is 1, as GradScaler sets it.
    optimizer.found_inf = bad.float()
    optimizer.step()
    run.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    run.tally.add(bad, norm, limit)
    return norm


def log_step(run, loss, norm, lr):
    """A line of the log. Raises RunError after max_bad_steps bad steps in a row."""
    step, tally = run.progress.step, run.tally
    line = metrics_line(step, run.progress.logged_step, tally, run.clock, loss, norm, lr)
    left = 0.0
    if step > run.whole_run.step:
        left = run.whole_run.seconds_per_step(step) * (max_iters - step)
    print0(log_line(line, max_iters, total_batch_tokens, run.ideal_ms, left))
    if run.metrics:
        run.metrics.write(**line)
    if tally.worst >= max_bad_steps:
        newest = checkpoint.latest(out_dir)
        raise RunError(
            f"{tally.worst:.0f} steps in a row had a loss or gradient that is not finite; their "
            f"updates were skipped. The newest checkpoint is {newest or 'yet to come'}. Lower "
            f"--learning_rate; {out_dir}/metrics.jsonl shows where it began"
        )
    tally.reset()
    run.progress.logged_step = step


# ---- the run -------------------------------------------------------------------------------------


def train(run, batches, micro_steps, val_blocks, resumed):
    """Steps until max_iters or a stop signal. -> whether all of them are done."""
    progress, clock, group = run.progress, run.clock, run.machine.group
    first_step = progress.step
    batch = next(batches)
    while True:
        # Evaluate, save
        step = progress.step
        at_end = step >= max_iters
        improved = missed_evaluation = False
        if (at_end or step % eval_interval == 0) and progress.evaluated != step:
            improved = evaluate_and_log(run, val_blocks)
            # A run that was stopped just before an evaluation makes it now that it is resumed, and
            # saves its checkpoint again, with the evaluation in it.
            missed_evaluation = resumed and step == first_step
        due = improved or at_end or step % checkpoint_interval == 0
        if missed_evaluation or (due and step > first_step):
            on_rank_0(group, save, run, improved)
        if at_end:
            return True
        if progress.evaluated == step or due:
            clock.restart(step)  # log lines time steps alone

        # Step
        lr = learning_rate_at(progress.step)
        loss, batch = forward_backward(run, batch, batches, micro_steps)
        norm = update(run, loss, lr)
        progress.step += 1

        # Log, stop
        if progress.step == first_step + 1:
            loss.item()  # waits for the device
            seconds = clock.seconds_per_step(progress.step)
            included = ", compiling included," if compile else ""
            print0(f"the first step{included} took {seconds:.1f} s")
            run.whole_run.restart(progress.step)
        if progress.step % log_interval == 0 or progress.step == 1:
            log_step(run, loss, norm, lr)
        # The first step compiles: the clock starts again after it, whether or not it was logged.
        if progress.step % log_interval == 0 or progress.step == first_step + 1:
            clock.restart(progress.step)
        if run.machine.stop.agreed():
            on_rank_0(group, save, run)
            print0(f"stopped at step {progress.step} by a signal; go on with --init_from=resume")
            return False


def main():
    # The machine and the run's folder
    check_knobs()
    compiler.prepare(compile)
    rank, local_rank, world_size = runtime.ranks()
    device = runtime.pick_device(config["device"], local_rank)
    activations = runtime.pick_dtype(dtype, device, stream_dtype)
    machine = runtime.set_up(device, activations, deterministic, 60 * hang_minutes)
    group = machine.group
    _lock, start = open_folder(group)
    provenance = runtime.provenance()
    print0("command: " + provenance["command"])
    if arguments != sys.argv[1:]:
        print0(f"knobs that the command does not name are those of {out_dir}/config.json")
    print0("config: " + json.dumps(config))

    # The data
    sequences = sequences_per_step(total_batch_tokens, batch_size, block_size, world_size)
    micro_steps = sequences // (batch_size * world_size)
    folder, pin_memory = os.path.join(data_dir, dataset), device.type == "cuda"
    train_blocks, val_blocks = on_all_ranks(
        group, open_splits, folder, block_size, batch_size, eval_tokens, seed, pin_memory
    )
    meta = train_blocks.meta
    print0(
        f"data: {train_blocks.directory}, {tokenizer_name(meta['tokenizer'])} tokens, "
        f"{train_blocks.n_blocks:,} training sequences, "
        f"an epoch is {train_blocks.n_blocks / sequences:,.1f} steps; a step: "
        f"{sequences} sequences = {micro_steps} micro-steps * {world_size} processes * {batch_size}"
    )

    # The model and the optimizer
    model, progress = build_model(meta["vocab_size"]).to(device), Progress()
    groups = model.parameter_groups(weight_decay, connection_lr, decay_phi)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)
    if start:
        on_all_ranks(group, checkpoint.resume, start, config, model, optimizer, progress, meta)
    elif source := warm_start.weights_of(init_from, out_dir):
        for line in on_all_ranks(group, warm_start.start_from, source, model, meta):
            print0(line)
    counts = model.parameter_counts()
    print0(
        f"model: {mixer}, {n_streams} stream{'s' * (n_streams > 1)}, {counts['total']:,} "
        f"parameters, of which {counts['hyper_connections']:,} in hyper-connections; on {device}, "
        f"{world_size} process{'es' * (world_size > 1)}"
    )
    if compile:
        on_all_ranks(group, compile_model, model, val_blocks, machine)

    # Reading a large data set takes minutes, so what can be refused without it comes before.
    on_all_ranks(group, verify, train_blocks.directory, rank, world_size)
    if eval_only:
        val, gain = evaluate(model, val_blocks, eval_tokens, batch_size, machine)
        print0(f"step {progress.step} | val {val:.4f} | composite gain {gain:.3f}")
        return
    metrics = on_rank_0(group, open_metrics, progress.step if start else None, provenance)
    about = about_run(model, meta, provenance)
    run = Run(machine, model, optimizer, progress, about, metrics)
    batches = micro_batches(train_blocks, progress.step, sequences, batch_size, device)
    if compile and progress.step < max_iters:
        print0("compiling: the first evaluation and the first step take a while")
    if train(run, batches, micro_steps, val_blocks, resumed=bool(start)):
        memory = runtime.peak_memory(device)
        print0(
            f"finished: {progress.step} steps, best validation loss {progress.best_val:.4f}"
            + (f", peak memory {memory / 2**30:.2f} GiB" if memory else "")
            + f"; sample with: python sample.py --out_dir={out_dir}"
        )


if __name__ == "__main__":
    runtime.run_script(record(main))  # record: torchrun then shows the error as the root cause
