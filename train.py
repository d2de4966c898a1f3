"""
Train a GPT with mixed residual streams.

    python train.py config/tbp.py config/laptop.py                   # minutes on a CPU
    torchrun --standalone --nproc_per_node=8 train.py config/tbp.py  # the real job: 8 GPUs
    torchrun --standalone --nproc_per_node=8 train.py config/tbp.py --init_from=resume
    python train.py --out_dir=out/tbp --init_from=resume             # with the run's own knobs
    python train.py --out_dir=out/tbp --init_from=resume --eval_only=True
    python train.py --init_from=gpt2 --learning_rate=3e-5            # from weights: warm_start.py
    python train.py config/finetune.py --init_from=auto:out/tbp --dataset=mytexts
    python train.py --help                                           # every knob

Several machines, and SLURM: dev/many_machines.md.

The knobs below are those of GPT-2 124M with 4 TBP streams on OpenWebText; config files and
--key=value override them.

Which tokens a step sees depends on (seed, step) alone; dropout also on rank, number of processes
and batch_size. With these unchanged, a killed and resumed run ends with the same bits.
"""

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic; read when CUDA starts
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import compiler
import runtime
import warm_start
from configurator import configure, resolve
from data import DataError, TokenBlocks, verify, write_atomic
from mixers import OPTIONS, composite_gain, options_of
from model import GPT, GPTConfig
from progress import Clock, Tally, log_line, metrics_line
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
mixer = "tbp"  # residual, identity, hc, sinkhorn, permutation, kronecker, tbp, rtbp and others
n_streams = 4  # parallel residual streams; 1 for residual
dynamic = True  # coefficients depend on the token; False: learned constants of the layer
gates = "auto"  # reads and writes: bounded, exp (writes), free, or auto (free for hc)
mix_scale = "none"  # a learned factor of M, 1 at the start: none, one a sublayer, one a stream
sees = "streams"  # what coefficients depend on: all streams, or only the branch's input
wraps = "sublayer"  # a hyper-connection around each sublayer, or each whole block
mix_start = 0.01  # eps: M starts as (1 - eps) I + (eps / n) 11^T
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
weight_decay = 0.1  # of matrices; norms, biases and gates do not decay
decay_phi = True  # whether phi decays as the other matrices do
beta1 = 0.9  # AdamW
beta2 = 0.95  # AdamW
grad_clip = 1.0  # norm that gradients are clipped to; 0: never
max_bad_steps = 10  # stop after this many steps in a row with a loss or gradient not finite
# System
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # of activations: auto (bfloat16 on a GPU that can, else float32), or a torch dtype
compile = True  # blocks and head through torch.compile, in place
activation_memory_budget = 1.0  # share of the backward's needs that is kept, not computed again
deterministic = True  # cuda: algorithms whose result does not depend on timing; a CPU's never do
peak_flops = 0.0  # of one device, for MFU; 0: looked up by the GPU's name
hang_minutes = 10.0  # several processes: a rank that the others wait for so long ends the run
arguments = checkpoint.resume_arguments(sys.argv[1:], out_dir)
config = configure(globals(), arguments, extra=OPTIONS)
# The model's knobs that nobody named are the weights'.
if shape := warm_start.knobs(init_from, out_dir):
    config = resolve(Path(__file__), [*shape, *arguments], extra=OPTIONS)
    globals().update(config)


# ---- before the first step -----------------------------------------------------------------------


def check_knobs():
    """Raises ValueError for what no run can have."""
    at_least_1 = (
        *("batch_size", "block_size", "total_batch_tokens", "max_bad_steps"),
        *("eval_interval", "log_interval", "checkpoint_interval", "keep_checkpoints"),
    )
    for name in at_least_1:
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, not {config[name]}")
    for name in ("grad_clip", "weight_decay", "connection_lr", "max_iters", "warmup_iters"):
        if config[name] < 0:
            raise ValueError(f"{name} must not be negative, as {config[name]} is; 0 is none")
    if not 0 < hang_minutes < 1e6:
        raise ValueError(f"hang_minutes must be above 0 and below a million, not {hang_minutes}")
    warm_start.check_source(init_from, out_dir)
    check_packages(config)
    if not out_dir:
        raise ValueError("out_dir is empty; give the run a folder, such as --out_dir=out/tbp")
    if not 0 <= activation_memory_budget <= 1:
        raise ValueError(
            f"activation_memory_budget must lie between 0 and 1, not {activation_memory_budget}"
        )


def pick_activations(device):
    """The dtype of activations. ValueError where the streams' own does not go with it."""
    chosen = runtime.pick_dtype(dtype, device)
    if stream_dtype == "bfloat16" and chosen != torch.bfloat16:
        raise ValueError(
            "streams in bfloat16 need branches in bfloat16, and dtype is "
            f"{str(chosen).removeprefix('torch.')}: --dtype=bfloat16, or --stream_dtype=auto"
        )
    return chosen


def sequences_per_step(world_size):
    """total_batch_tokens in sequences.

    Raises ValueError if they do not split evenly over processes and micro-steps.
    """
    smallest = batch_size * world_size * block_size
    if total_batch_tokens % smallest == 0:
        return total_batch_tokens // block_size
    nearest = max(1, round(total_batch_tokens / smallest)) * smallest
    fitting = [
        size
        for size in range(1, batch_size)
        if total_batch_tokens % (size * world_size * block_size) == 0
    ]
    raise ValueError(
        f"total_batch_tokens = {total_batch_tokens:,} is no multiple of batch_size {batch_size} * "
        f"block_size {block_size} * {world_size} processes = {smallest:,}; nearest: {nearest}"
        + (f"; or keep it, with --batch_size={fitting[-1]}" if fitting else "")
    )


def open_data(device):
    """-> the training and the validation split. Raises DataError."""
    folder, pin_memory = os.path.join(data_dir, dataset), device.type == "cuda"
    train_blocks = TokenBlocks(folder, "train", block_size, seed, pin_memory)
    val_blocks = TokenBlocks(folder, "val", block_size, seed, pin_memory)
    batches, sequences = evaluation_batches(val_blocks)
    if sequences * block_size > eval_tokens:
        raise DataError(
            f"eval_tokens = {eval_tokens:,} is less than a batch: choose --eval_tokens of at least "
            f"{sequences * block_size:,}"
        )
    wanted = eval_tokens // (batch_size * block_size) * batch_size
    if batches * sequences < wanted:
        print0(
            f"evaluations read {batches * sequences * block_size:,} tokens, all whole batches of "
            f"the validation split, which has fewer than eval_tokens = {eval_tokens:,}"
        )
    return train_blocks, val_blocks


def evaluation_batches(blocks):
    """-> number of batches that an evaluation reads, and of sequences in each: eval_tokens, or all
    whole batches of a split that has fewer; a split of less than a batch is one, smaller batch."""
    sequences = min(batch_size, blocks.n_blocks)
    wanted = eval_tokens // (sequences * block_size)
    return min(wanted, blocks.n_blocks // sequences), sequences


def build_model(vocab_size):
    """The model at its start, the same on every rank."""
    torch.manual_seed(seed)
    sizes = {field.name: config[field.name] for field in fields(GPTConfig) if field.name in config}
    padded = math.ceil(vocab_size / 64) * 64
    return GPT(GPTConfig(vocab_size=padded, options=options_of(mixer, config), **sizes))


def resume(state, path, model, optimizer, progress, meta):
    """Put the checkpoint `state` of `path` into model, optimizer and progress. Raises RunError."""
    changed = checkpoint.check_same_run(path, state, config, model.config, meta)
    checkpoint.restore(path, state, model, optimizer)
    vars(progress).update({name: state[name] for name in vars(progress)})
    print0(f"resumed from {path} at step {progress.step}")
    if changed:
        print0("changed since the checkpoint: " + ", ".join(changed))
    if state["config"]["eval_tokens"] != eval_tokens:
        progress.evaluated = None  # the old evaluation read other tokens


def compile_model(model, val_blocks, activations, autocast, device):
    """Compile the model in place. Raises RunError where a torch that the tests do not know does
    it wrongly."""
    # Else Dynamo splits graphs at DDP's buckets; communication overlaps from block to block.
    torch._dynamo.config.optimize_ddp = False
    sample = to_device(val_blocks.in_order(0, 1), device)
    trial = (compiler.loss_and_gradients, model, sample, autocast)
    with compiler.on_trial(activations, *trial):
        model.compile_regions(activation_memory_budget=activation_memory_budget)


def open_metrics(step, provenance):
    """Write config.json and open metrics.jsonl, which keeps its lines up to `step`."""
    text = json.dumps({**config, "provenance": provenance}, indent=1)
    write_atomic(os.path.join(out_dir, "config.json"), text.encode())
    trackers = open_trackers(config, step, provenance)
    return checkpoint.Metrics(out_dir, step, trackers)


# ---- what the loop calls -------------------------------------------------------------------------


def to_device(batch, device):
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)


def micro_batches(blocks, step, sequences, device):
    """This rank's (idx, targets) on the device, micro-step by micro-step from `step` on, for ever.

    Micro-step m gives rank r the sequences from (m * world_size + r) * batch_size on.
    """
    rank, _, world_size = runtime.ranks()
    while True:
        for first in range(0, sequences, batch_size * world_size):
            start = first + rank * batch_size
            yield to_device(blocks.batch(step, sequences, start, batch_size), device)
        step += 1


@torch.no_grad()
def evaluate(model, blocks, autocast, device):
    """-> mean loss over the first eval_tokens of the validation split, and the composite gain of
    the token-averaged M of one sequence."""
    rank, _, world_size = runtime.ranks()
    batches, sequences = evaluation_batches(blocks)
    total = torch.zeros((), device=device)
    if device.type != "mps":  # which has no float64
        total = total.double()
    model.eval()
    with autocast:
        for batch in range(rank, batches, world_size):
            idx, targets = to_device(blocks.in_order(batch * sequences, sequences), device)
            total += model(idx, targets)[1]
        idx, _ = to_device(blocks.in_order(0, 1), device)
        gain = composite_gain(model.mixing_matrices(idx))
    model.train()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / batches, gain


def learning_rate_at(step):
    """Linear warmup, then a cosine down to min_lr at lr_decay_iters, and min_lr from then on.

    In the warmup step s (0, 1, …) has (s + 1) / (warmup_iters + 1) of the peak.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    done = min(1.0, (step - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)


def save(progress, tally, scaler, model, optimizer, about, best=False):
    """Write a checkpoint; `about` is what all checkpoints of the run have in common."""
    progress.tally, progress.scaler = tally.read(), scaler.state_dict()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= vars(progress) | about
    checkpoint.save(out_dir, state, keep=keep_checkpoints, best=best)


# ---- the run -------------------------------------------------------------------------------------


def main():
    # The machine
    rank, local_rank, world_size = runtime.ranks()
    check_knobs()
    compiler.prepare(compile)
    device = runtime.pick_device(config["device"], local_rank)
    activations = pick_activations(device)
    autocast = contextlib.nullcontext()
    if activations != torch.float32:
        autocast = torch.autocast(device.type, activations)
    torch.use_deterministic_algorithms(deterministic)
    # Filling takes time, and nothing here reads memory that was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False
    runtime.keep_freed_memory()
    group = runtime.init_distributed(device, patience=60 * hang_minutes)
    stop = runtime.StopSignal(group)

    # The run's folder
    if init_from == "resume":  # refused before there is a folder
        on_rank_0(group, checkpoint.check_resumable, out_dir)
    if not eval_only:
        _lock = on_rank_0(group, checkpoint.lock, out_dir)  # held until the process ends
    start = on_rank_0(group, checkpoint.starting_point, out_dir, init_from)
    start = runtime.from_rank_0(group, start)
    provenance = runtime.provenance()
    print0("command: " + provenance["command"])
    if arguments != sys.argv[1:]:
        print0(f"knobs that the command does not name are those of {out_dir}/config.json")
    print0("config: " + json.dumps(config))

    # The data
    sequences = sequences_per_step(world_size)
    micro_steps = sequences // (batch_size * world_size)
    train_blocks, val_blocks = on_all_ranks(group, open_data, device)
    meta = train_blocks.meta
    print0(
        f"data: {train_blocks.directory}, {tokenizer_name(meta['tokenizer'])} tokens, "
        f"{train_blocks.n_blocks:,} training sequences, "
        f"an epoch is {train_blocks.n_blocks / sequences:,.1f} steps; a step: "
        f"{sequences} sequences = {micro_steps} micro-steps * {world_size} processes * {batch_size}"
    )

    # The model and the optimizer
    model = build_model(meta["vocab_size"]).to(device)
    groups = model.parameter_groups(weight_decay, connection_lr, decay_phi)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)
    progress = SimpleNamespace(  # what a checkpoint carries beside weights and moments
        step=0,
        best_val=math.inf,
        evaluated=None,  # the step of the last evaluation
        logged_step=0,  # the step of the last log line
        tally=[0.0] * 5,  # what a Tally has counted since then
        scaler={},  # the loss scale of float16
    )
    if start:
        state = on_all_ranks(group, checkpoint.load, start)
        resume(state, start, model, optimizer, progress, meta)
        del state  # a second copy of weights and moments
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
        on_all_ranks(group, compile_model, model, val_blocks, activations, autocast, device)
    replica = model
    if group:
        gpu = [device.index] if device.type == "cuda" else None
        # Buffers are constants: there is nothing to broadcast at every step.
        replica = DistributedDataParallel(model, device_ids=gpu, forward_sync_buffers=False)

    # The files. Reading a large data set takes minutes, so all other refusals come before it.
    on_all_ranks(group, verify, train_blocks.directory, rank, world_size)
    if eval_only:
        val, gain = evaluate(model, val_blocks, autocast, device)
        print0(f"step {progress.step} | val {val:.4f} | composite gain {gain:.3f}")
        return
    metrics = on_rank_0(group, open_metrics, progress.step if start else None, provenance)
    about = {
        "config": config,
        "model_config": asdict(model.config),
        "command": sys.argv,
        "provenance": provenance,
        "tokenizer": meta["tokenizer"],
        "n_vocab": meta["vocab_size"],
        "shards": checkpoint.fingerprint(meta),
    }

    # The loop
    # In float16 small gradients are 0 unless the loss is scaled up. Else the scaler does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=activations == torch.float16)
    if progress.scaler:
        scaler.load_state_dict(progress.scaler)
    first_step = progress.step
    tally = Tally(progress.tally, device)
    clock, whole_run = Clock(first_step), Clock(first_step)
    flops_per_step = model.flops_per_token() * total_batch_tokens
    peak = (peak_flops or runtime.peak_flops(device)) * world_size
    ideal_ms = flops_per_step / peak * 1e3 if peak else 0.0
    batches = micro_batches(train_blocks, first_step, sequences, device)
    batch = next(batches)
    if compile and first_step < max_iters:
        print0("compiling: the first evaluation and the first step take a while")

    while True:
        # Evaluate, save
        at_end = progress.step >= max_iters
        improved = missed_evaluation = False
        if (at_end or progress.step % eval_interval == 0) and progress.evaluated != progress.step:
            val, gain = evaluate(model, val_blocks, autocast, device)
            print0(f"step {progress.step}/{max_iters} | val {val:.4f} | composite gain {gain:.3f}")
            if rank == 0:
                metrics.write(step=progress.step, val=val, gain=gain)
            # A run stopped just before an evaluation evaluates first after resuming, and saves a
            # checkpoint that knows of it.
            missed_evaluation = start is not None and progress.step == first_step
            improved = val < progress.best_val
            progress.best_val = min(val, progress.best_val)
            progress.evaluated = progress.step
        due = improved or at_end or progress.step % checkpoint_interval == 0
        if missed_evaluation or (due and progress.step > first_step):
            on_rank_0(group, save, progress, tally, scaler, model, optimizer, about, improved)
        if at_end:
            break
        if progress.evaluated == progress.step or due:
            clock.restart(progress.step)  # log lines time steps alone

        # Forward, backward
        torch.manual_seed(seed + 1_000_003 * progress.step + rank)  # dropout: by step and rank
        loss = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            replica.require_backward_grad_sync = micro_step == micro_steps - 1  # of DDP
            with autocast:
                micro_loss = replica(*batch)[1] / micro_steps
            began = time.time()
            batch = next(batches)  # while the device is busy with what was queued
            clock.waited += time.time() - began
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        if group:
            dist.all_reduce(loss)
            loss /= world_size

        # Clip, update
        lr = learning_rate_at(progress.step)
        for settings in optimizer.param_groups:
            settings["lr"] = lr * settings["lr_factor"]
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        bad = ~(loss.isfinite() & norm.isfinite())
        # Where this is 1, a fused optimizer skips the whole update; so GradScaler tells it to.
        optimizer.found_inf = bad.float()
        optimizer.step()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        tally.add(bad, norm, grad_clip or math.inf)
        progress.step += 1

        # Log, stop
        if progress.step == first_step + 1:
            loss.item()  # waits for the device
            seconds = clock.seconds_per_step(progress.step)
            print0(f"the first step, compiling included, took {seconds:.1f} s")
            whole_run.restart(progress.step)
        if progress.step % log_interval == 0 or progress.step == 1:
            line = metrics_line(progress.step, progress.logged_step, tally, clock, loss, norm, lr)
            left = 0.0
            if progress.step > whole_run.step:
                left = whole_run.seconds_per_step(progress.step) * (max_iters - progress.step)
            print0(log_line(line, max_iters, total_batch_tokens, ideal_ms, left))
            if rank == 0:
                metrics.write(**line)
            if tally.worst >= max_bad_steps:
                raise RunError(
                    f"{tally.worst:.0f} steps in a row had a loss or gradient that is not finite; "
                    "their updates were skipped. The last good checkpoint is "
                    f"{checkpoint.latest(out_dir)}. Lower --learning_rate, or look at metrics.jsonl"
                )
            tally.reset()
            progress.logged_step = progress.step
        if progress.step % log_interval == 0 or progress.step == first_step + 1:
            clock.restart(progress.step)
        if stop.agreed():
            on_rank_0(group, save, progress, tally, scaler, model, optimizer, about)
            print0(f"stopped at step {progress.step} by a signal; go on with --init_from=resume")
            return

    memory = runtime.peak_memory(device)
    print0(
        f"finished: {progress.step} steps, best validation loss {progress.best_val:.4f}"
        + (f", peak memory {memory / 2**30:.2f} GiB" if memory else "")
        + f"; sample with: python sample.py --out_dir={out_dir}"
    )


if __name__ == "__main__":
    try:
        record(main)()  # torchrun shows what is raised as the root cause
        if dist.is_initialized():
            dist.destroy_process_group()
    except (RunError, ValueError) as error:  # what a user can put right; DataError is a ValueError
        said = f"{type(error).__name__}: {error}"
        sys.exit(said if runtime.ranks()[1] == 0 else 1)  # once a machine
    except Exception as error:
        if not (reason := compiler.why_not_compiled(error)):
            raise
        sys.exit(reason if runtime.ranks()[1] == 0 else 1)
