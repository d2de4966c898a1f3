"""
Train a GPT with mixed residual streams.

    python train.py config/tbp.py config/laptop.py                                  # one process, minutes on a CPU
    torchrun --standalone --nproc_per_node=8 train.py config/tbp.py                 # the real job: one node of 8 GPUs
    torchrun --standalone --nproc_per_node=8 train.py config/tbp.py --init_from=resume
    python train.py --help                                                          # every knob

The knobs below are those of GPT-2 124M with 4 TBP streams on OpenWebText; config/*.py and --key=value override them.

A run is a pure function of its knobs and the step: which tokens a step sees and what dropout draws depend on
(seed, step) alone, so a run that was killed and resumed ends with the same bits as one that was not.
"""
import contextlib
import functools
import json
import math
import os
import resource
import shlex
import signal
import sys
import time
import zlib
from dataclasses import asdict, fields

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # deterministic cuBLAS; read when CUDA starts
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from configurator import configure
from data import DataError, TokenBlocks, verify, write_atomic
from mixers import composite_gain
from model import GPT, GPTConfig, pick_device

# Run
out_dir = "out"                     # checkpoints, metrics.jsonl and config.json go here
init_from = "scratch"               # scratch, resume, auto (resume if there is a run), or gpt2:FILE (Hugging Face weights)
seed = 1337                         # of weights, data order and dropout
eval_interval = 2000                # steps between evaluations
eval_tokens = 20 * 12 * 8 * 1024    # validation tokens an evaluation reads, the same every time
log_interval = 1                    # steps between log lines; each waits for the device
checkpoint_interval = 2000          # steps between checkpoints
keep_checkpoints = 2                # how many of the newest to keep, beside the best
# Data
data_dir = "data"                   # where prepare_data.py writes
dataset = "openwebtext"             # a folder of data_dir
# Model: see GPTConfig in model.py; the vocabulary comes from the data set
block_size = 1024                   # tokens in a sequence
n_layer = 12
n_head = 12
n_embd = 768                        # channels of one stream
dropout = 0.0                       # 0 is good for pretraining
bias = False                        # in linear layers and layer norms
mixer = "tbp"                       # residual, identity, hc, sinkhorn, permutation, kronecker, tbp or rtbp
n_streams = 4                       # parallel residual streams; 1 for residual
dynamic = True                      # mixing depends on the token; False: learned constants of the layer
interval_map = "plain"              # tbp and rtbp: plain or scaled
sinkhorn_rounds = 20                # sinkhorn: normalisations of columns and rows
mix_start = 0.01                    # M starts as (1 - mix_start) I + mix_start / n
read_start = 0.7                    # weight of the favoured stream in a sublayer's read, at the start
stream_dtype = "auto"               # of the residual state: auto (that of the activations), float32 or bfloat16
# Optimizer
total_batch_tokens = 491_520        # 12 sequences * 1024 tokens * 40, over all micro-steps and processes
batch_size = 12                     # sequences in a micro-step of one process
max_iters = 600_000                 # steps
learning_rate = 6e-4                # peak, after warmup
min_lr = 6e-5                       # at the end of the cosine
warmup_iters = 2000                 # steps of linear warmup
lr_decay_iters = 600_000            # steps until min_lr
weight_decay = 0.1                  # of matrices; norms, biases and gates do not decay
beta1 = 0.9                         # AdamW
beta2 = 0.95                        # AdamW
grad_clip = 1.0                     # norm that gradients are clipped to; 0: never
max_bad_steps = 10                  # stop after this many steps in a row with a loss or gradient that is not finite
# System
device = "auto"                     # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                      # of activations: auto (bfloat16 on cuda if it can, else float32), float32, bfloat16
compile = True                      # blocks and head through torch.compile, in place
activation_memory_budget = 1.0      # share of what the backward needs that is kept; less is recomputed, slower and smaller
deterministic = True                # cuda: algorithms whose result does not depend on timing; the CPU's never do
peak_flops = 0.0                    # of one device, for MFU; 0: looked up by the GPU's name
config = configure(globals())

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}
# What a resumed run may not change: with another value it would be another run.
FIXED = ("seed", "dataset", "total_batch_tokens", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "mixer",
         "n_streams", "dynamic", "interval_map", "sinkhorn_rounds", "mix_start", "read_start", "stream_dtype")


def main():
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    distributed = "RANK" in os.environ              # set by torchrun
    check_counts()
    where = pick_device(device, local_rank)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False     # costs time, and nothing here reads such memory
    if distributed:
        meet("nccl" if where.type == "cuda" else "gloo")
    stop = StopSignal(distributed)
    everywhere = functools.partial(on_every_rank, stop.group)
    lock = everywhere(lambda: checkpoint.lock(out_dir) if rank == 0 else None)      # held until the process ends
    start = [everywhere(lambda: starting_point() if rank == 0 else None)]
    if distributed:
        dist.broadcast_object_list(start, group=stop.group)
    train(rank, world_size, distributed, where, stop, everywhere, resume_from=start[0])
    if distributed:
        dist.destroy_process_group()


def check_counts():
    for name in ("batch_size", "block_size", "total_batch_tokens", "eval_interval", "log_interval", "checkpoint_interval", "keep_checkpoints",
                 "max_bad_steps"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, not {config[name]}")
    for name in ("grad_clip", "weight_decay", "max_iters", "warmup_iters"):
        if config[name] < 0:
            raise ValueError(f"{name} must not be negative, as {config[name]} is; 0 is none")
    if not out_dir:
        raise ValueError("out_dir is empty; give the run a folder of its own, such as --out_dir=out/tbp")
    if not 0 <= activation_memory_budget <= 1:
        raise ValueError(f"activation_memory_budget must lie between 0 and 1, not {activation_memory_budget}")


def meet(backend):
    """Start the group of all processes."""
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
    except dist.DistError as error:
        raise checkpoint.RunError(
            f"the processes could not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({str(error).splitlines()[0]}). If another run has the port, choose another: torchrun --standalone takes a "
            "free one, --master_port=… on several nodes") from error
    # torchrun keeps its store when it restarts the workers, and with it the addresses of those that died
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def on_every_rank(group, work):
    """work() of this process, once all have done theirs. What it raises on one of them (a shard is damaged, the disk is
    full) is raised on all, so that none is left waiting for another."""
    result = error = None
    try:
        result = work()
    except (checkpoint.RunError, ValueError) as raised:
        error = raised
    errors = [error]
    if group is not None:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=group)
    for error in filter(None, errors):
        raise error
    return result


def starting_point():
    """The checkpoint to resume from, or None to start at step 0. Raises RunError where init_from cannot be had."""
    if init_from not in ("scratch", "resume", "auto") and not init_from.startswith("gpt2:"):
        raise ValueError(f"init_from must be scratch, resume, auto or gpt2:FILE, not {init_from!r}")
    there = checkpoint.steps(out_dir)
    if init_from in ("resume", "auto") and there:
        if newest := checkpoint.latest(out_dir):
            return newest
        raise checkpoint.RunError(f"none of the {len(there)} checkpoints in {out_dir} is whole; begin again elsewhere with "
                                  "--init_from=scratch --out_dir=…")
    if init_from == "resume":
        raise checkpoint.RunError(f"{out_dir} has no checkpoint to resume from; begin with --init_from=scratch")
    if there:
        raise checkpoint.RunError(f"{out_dir} holds a run already (the newest checkpoint is {there[-1].name}); go on with "
                                  "--init_from=resume, or begin another with --out_dir=…")
    return None


def sequences_per_step(world_size):
    """total_batch_tokens in sequences. Raises ValueError if they do not split evenly over processes and micro-steps."""
    together = batch_size * world_size
    if total_batch_tokens % (together * block_size) or total_batch_tokens < together * block_size:
        nearest = max(1, round(total_batch_tokens / (together * block_size))) * together * block_size
        smaller = [size for size in range(1, batch_size) if total_batch_tokens % (size * world_size * block_size) == 0]
        raise ValueError(f"total_batch_tokens = {total_batch_tokens:,} is no multiple of batch_size {batch_size} * block_size "
                         f"{block_size} * {world_size} processes = {together * block_size:,}; nearest: {nearest}" +
                         (f"; or keep it, with --batch_size={smaller[-1]}" if smaller else ""))
    return total_batch_tokens // block_size


def learning_rate_at(step):
    """Linear warmup, then a cosine down to min_lr at lr_decay_iters."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    done = min(1.0, (step - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)


def fingerprint(meta):
    """Of a data set: with other shards, a step would see other tokens."""
    train_tokens, splits = meta["splits"]["train"]["tokens"], json.dumps(meta["splits"], sort_keys=True)
    return f"{train_tokens:,} training tokens, checksum {zlib.crc32(splits.encode()):08x}"


def check_same_run(saved, model_config, meta, say):
    """Raises RunError unless the knobs continue the checkpoint's run; tells of those that may change and did."""
    now = {**config, "vocab_size": model_config.vocab_size, "tokenizer": meta["tokenizer"], "shards": fingerprint(meta)}
    then = {**saved["config"], "vocab_size": saved["model_config"]["vocab_size"], "tokenizer": saved["tokenizer"],
            "shards": saved["shards"]}
    changed = {key: f"{key}: {then.get(key)!r} -> {now[key]!r}" for key in now if now[key] != then.get(key)}
    forbidden = [changed[key] for key in (*FIXED, "vocab_size", "tokenizer", "shards") if key in changed]
    if forbidden:
        raise checkpoint.RunError("the checkpoint is of another run: " + ", ".join(forbidden) + ". Give these the checkpoint's "
                                  f"values, or begin another run with --out_dir=…. A resumed run may change everything "
                                  f"but {', '.join(FIXED)}, and the data set's tokenizer and shards")
    if changed:
        say("changed since the checkpoint: " + ", ".join(changed.values()))


def pick_dtype(where):
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, not {dtype!r}")
    best = "bfloat16" if where.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    chosen = best if dtype == "auto" else dtype
    if stream_dtype == "bfloat16" != chosen:
        raise ValueError(f"streams in bfloat16 need branches in bfloat16, and dtype is {chosen}: --dtype=bfloat16, or "
                         "--stream_dtype=auto")
    return chosen


def peak_memory(where):
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StopSignal:
    """SIGTERM or Ctrl-C: the step is finished, a checkpoint is written, every rank leaves together.

    Without torchrun a second Ctrl-C leaves at once; under torchrun, which repeats signals, its own patience decides.
    """

    def __init__(self, distributed):
        self.received, self.group = False, dist.new_group(backend="gloo") if distributed else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.received = True
        if self.group is None:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """True on all ranks or on none. The flag travels between hosts: no device waits for it."""
        if self.group is None:
            return self.received
        flag = torch.tensor(float(self.received))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return flag.item() > 0


def train(rank, world_size, distributed, where, stop, everywhere, resume_from):
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    say("command: " + shlex.join(["train.py", *sys.argv[1:]]))
    say("config: " + json.dumps(config))

    # ---- data
    folder = os.path.join(data_dir, dataset)
    sequences = sequences_per_step(world_size)
    micro_steps = sequences // (batch_size * world_size)
    blocks, val_blocks = everywhere(lambda: [TokenBlocks(folder, split, block_size, seed, pin_memory=where.type == "cuda")
                                             for split in ("train", "val")])
    eval_batches = eval_tokens // (batch_size * block_size)
    if not 1 <= eval_batches * batch_size <= val_blocks.n_blocks:
        raise DataError(f"eval_tokens = {eval_tokens:,} are {eval_batches} batches of {batch_size} * {block_size}; the "
                        f"validation split of {folder} has {val_blocks.n_blocks} sequences, so choose --eval_tokens from "
                        f"{batch_size * block_size:,} to {val_blocks.n_blocks // batch_size * batch_size * block_size:,}")
    meta = blocks.meta
    say(f"data: {folder}, {meta['tokenizer']} tokens, {blocks.n_blocks:,} training sequences, an epoch is "
        f"{blocks.n_blocks / sequences:,.1f} steps; a step: {sequences} sequences = {micro_steps} micro-steps * "
        f"{world_size} processes * {batch_size}")

    # ---- model
    torch.manual_seed(seed)
    sizes = {f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}
    model_config = GPTConfig(vocab_size=math.ceil(meta["vocab_size"] / 64) * 64, **sizes)
    model = GPT(model_config).to(where)
    optimizer = torch.optim.AdamW(model.parameter_groups(weight_decay), lr=learning_rate, betas=(beta1, beta2),
                                  fused=True)
    step, best_val, evaluated = 0, math.inf, None   # evaluated: the step of the last evaluation
    tallied, tally = 0, [0.0] * 5                   # see the loop
    if resume_from:
        state = everywhere(lambda: checkpoint.load(resume_from))
        check_same_run(state, model_config, meta, say)
        checkpoint.restore(resume_from, state, model, optimizer)
        step, best_val, evaluated = state["step"], state["best_val"], state["evaluated"]
        tallied, tally = state["tallied"], state["tally"]
        say(f"resumed from {resume_from} at step {step}")
        del state                                   # a second copy of the weights and moments
    elif init_from.startswith("gpt2:"):
        model.load_gpt2(everywhere(lambda: checkpoint.load_tensors(init_from.removeprefix("gpt2:"))))
    counts = model.parameter_counts()
    say(f"model: {mixer}, {n_streams} stream{'s' * (n_streams > 1)}, {counts['total']:,} parameters, of which "
        f"{counts['hyper_connections']:,} in hyper-connections; on {where}, {world_size} process{'es' * (world_size > 1)}")
    if compile:
        torch._dynamo.config.optimize_ddp = False   # else it splits graphs at DDP's buckets; blocks overlap as they are
        model.compile_regions(activation_memory_budget=activation_memory_budget)
    replica = model
    if distributed:                                 # buffers are constants: nothing to broadcast at every step
        replica = DistributedDataParallel(model, device_ids=[where.index] if where.type == "cuda" else None,
                                          forward_sync_buffers=False)
    autocast = torch.autocast(where.type, torch.bfloat16) if pick_dtype(where) == "bfloat16" else contextlib.nullcontext()

    def to_device(batch):
        return tuple(tensor.to(where, non_blocking=True) for tensor in batch)

    @torch.no_grad()
    def evaluate():
        """Mean loss over the first eval_batches of the validation split, shared among the ranks."""
        model.eval()
        total = torch.zeros((), device=where, dtype=torch.float64 if where.type != "mps" else torch.float32)
        for batch in range(rank, eval_batches, world_size):
            with autocast:
                total += model(*to_device(val_blocks.in_order(batch * batch_size, batch_size)))[1]
        with autocast:
            gain = composite_gain(model.mixing_matrices(to_device(val_blocks.in_order(0, 1))[0]))
        model.train()
        if distributed:
            dist.all_reduce(total)
        return total.item() / eval_batches, gain

    def save(best=False):
        if rank == 0:
            tally = torch.stack([bad_in_a_row, worst, skipped, clipped, norm_max]).tolist()
            checkpoint.save(out_dir, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "best_val": best_val,
                "evaluated": evaluated, "tallied": tallied, "tally": tally, "config": config,
                "model_config": asdict(model_config), "command": sys.argv, "tokenizer": meta["tokenizer"],
                "n_vocab": meta["vocab_size"], "shards": fingerprint(meta)}, keep=keep_checkpoints, best=best)

    def open_metrics():
        if rank == 0:
            write_atomic(os.path.join(out_dir, "config.json"), json.dumps(config, indent=1).encode())
            return checkpoint.Metrics(out_dir, step if resume_from else None)

    # ---- loop
    everywhere(lambda: verify(folder, rank, world_size))        # minutes for a large data set: the other refusals come first
    metrics = everywhere(open_metrics)
    flops_per_step = model.flops_per_token() * total_batch_tokens
    peak = peak_flops or next((flops for name, flops in PEAK_FLOPS.items() if where.type == "cuda" and
                               name in torch.cuda.get_device_name(where)), 0)
    # Counted on the device: reading them would make the host wait. All but the first are of the steps since the last line of
    # metrics, step `tallied`; worst is the most that were bad in a row.
    bad_in_a_row, worst, skipped, clipped, norm_max = torch.tensor(tally, device=where).unbind()
    first = logged = step                           # logged: where the clock started
    begin, data_seconds = time.time(), 0.0
    if compile and step < max_iters:
        say("compiling: the first evaluation and the first step take a while")
    batch = to_device(blocks.batch(step, sequences, rank * batch_size, batch_size))
    while True:
        improved = late = False
        if (step % eval_interval == 0 or step >= max_iters) and evaluated != step:
            val, gain = evaluate()
            improved, best_val, evaluated = val < best_val, min(best_val, val), step
            late = step == first and resume_from is not None    # the run was stopped before it: its checkpoint does not know it
            say(f"step {step}/{max_iters} | val {val:.4f} | composite gain {gain:.3f}")
            if rank == 0:
                metrics.write(step=step, val=val, gain=gain)
            begin, logged, data_seconds = time.time(), step, 0.0        # log lines time steps alone
        if late or step > first and (improved or step % checkpoint_interval == 0 or step >= max_iters):
            everywhere(functools.partial(save, best=improved))
        if step >= max_iters:
            break

        lr = learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed + 1_000_003 * step + rank)       # dropout: nothing random is carried from step to step
        loss = torch.zeros((), device=where)
        for micro in range(micro_steps):
            last = micro == micro_steps - 1
            with contextlib.nullcontext() if last or not distributed else replica.no_sync():
                with autocast:
                    part = replica(*batch)[1] / micro_steps
                started = time.time()               # fetched while the device is busy with what was queued
                batch_at = (step + 1, rank) if last else (step, (micro + 1) * world_size + rank)
                batch = to_device(blocks.batch(batch_at[0], sequences, batch_at[1] * batch_size, batch_size))
                data_seconds += time.time() - started
                part.backward()
            loss += part.detach()
        if distributed:
            dist.all_reduce(loss)
            loss /= world_size
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        bad = ~(loss.isfinite() & norm.isfinite())
        bad_in_a_row = (bad_in_a_row + 1) * bad
        worst = torch.maximum(worst, bad_in_a_row)
        skipped = skipped + bad
        clipped = clipped + (~bad & (norm > (grad_clip or math.inf)))
        norm_max = torch.where(bad, norm_max, torch.maximum(norm_max, norm))
        optimizer.found_inf = bad.float()           # AdamW skips the whole update where this is 1, without the host
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        if step == first + 1:
            loss.item()
            say(f"the first step, compiling included, took {time.time() - begin:.1f} s")
        if step % log_interval == 0 or step == 1:
            loss_now, norm_now, bad_now, worst_now, skipped_now, clipped_now, norm_max_now = torch.stack(
                [loss, norm, bad_in_a_row, worst, skipped, clipped, norm_max]).tolist()
            seconds = (time.time() - begin) / (step - logged)
            tokens_per_second = total_batch_tokens / seconds
            mfu = flops_per_step / seconds / (peak * world_size) if peak else None
            say(f"step {step}/{max_iters} | loss {loss_now:.4f} | norm {norm_now:.3f} | lr {lr:.2e} | {seconds * 1e3:.0f} ms | "
                f"{tokens_per_second:,.0f} tok/s" + (f" | mfu {mfu:.1%}" if mfu else "") +
                (f" | {skipped_now:.0f} not finite, skipped ({bad_now:.0f} in a row)" if skipped_now else ""))
            if rank == 0:
                metrics.write(step=step, loss=loss_now, norm=norm_now, norm_max=norm_max_now, lr=lr,
                              clipped=clipped_now / (step - tallied), skipped=int(skipped_now), bad=int(bad_now),
                              ms=seconds * 1e3, data_ms=data_seconds / (step - logged) * 1e3)
            if worst_now >= max_bad_steps:
                raise checkpoint.RunError(
                    f"{worst_now:.0f} steps in a row had a loss or gradient that is not finite; their updates were skipped. The "
                    f"last good checkpoint is {checkpoint.latest(out_dir)}. Lower --learning_rate, or look at metrics.jsonl")
            begin, logged, tallied, data_seconds = time.time(), step, step, 0.0
            worst, skipped, clipped, norm_max = torch.zeros(4, device=where).unbind()
        elif step == first + 1:
            begin, logged, data_seconds = time.time(), step, 0.0        # no log line times the compilation
        if stop.agreed():
            everywhere(save)
            say(f"stopped at step {step} by a signal; go on with --init_from=resume")
            return
    say(f"finished: {step} steps, best validation loss {best_val:.4f}, peak memory {peak_memory(where) / 2**30:.2f} GiB; "
        f"sample with: python sample.py --out_dir={out_dir}")


if __name__ == "__main__":
    try:
        record(main)()                              # torchrun shows what is raised as the root cause
    except (checkpoint.RunError, ValueError) as error:      # what the user can put right; DataError is a ValueError
        sys.exit(f"{type(error).__name__}: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)     # said once
