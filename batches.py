"""
What a step of training and an evaluation read, and on which rank.

    sequences = sequences_per_step(total_batch_tokens, batch_size, block_size, world_size)
    train_blocks, val_blocks = open_splits(folder, block_size, batch_size, eval_tokens, seed)
    for idx, targets in micro_batches(train_blocks, step, sequences, batch_size, device): ...
    val, gain = evaluate(model, val_blocks, eval_tokens, batch_size, machine)

The sequences of a step are the same on any number of processes; see TokenBlocks in data.py.
"""

import torch
import torch.distributed as dist

import runtime
from data import DataError, TokenBlocks
from mixers import composite_gain


def to_device(batch, device):
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)


# ---- training ------------------------------------------------------------------------------------


def sequences_per_step(tokens, batch_size, block_size, world_size):
    """The tokens of a step, total_batch_tokens, in sequences.

    Raises ValueError if they do not split evenly over processes and micro-steps.
    """
    smallest = batch_size * world_size * block_size
    if tokens % smallest == 0:
        return tokens // block_size
    nearest = max(1, round(tokens / smallest)) * smallest
    fitting = [
        size for size in range(1, batch_size) if tokens % (size * world_size * block_size) == 0
    ]
    raise ValueError(
        f"total_batch_tokens = {tokens:,} is no multiple of batch_size {batch_size} * "
        f"block_size {block_size} * {world_size} processes = {smallest:,}; nearest: {nearest}"
        + (f"; or keep it, with --batch_size={fitting[-1]}" if fitting else "")
    )


def micro_batches(blocks, step, sequences, batch_size, device):
    """This rank's (idx, targets) on the device, micro-step by micro-step from `step` on, for ever.

    Micro-step m gives rank r the sequences from (m * world_size + r) * batch_size on.
    """
    rank, _, world_size = runtime.ranks()
    while True:
        for first in range(0, sequences, batch_size * world_size):
            start = first + rank * batch_size
            yield to_device(blocks.batch(step, sequences, start, batch_size), device)
        step += 1


# ---- evaluations ---------------------------------------------------------------------------------


def open_splits(folder, block_size, batch_size, eval_tokens, seed, pin_memory=False):
    """-> the training and the validation split, as TokenBlocks.

    Raises DataError, also where eval_tokens is less than a batch.
    """
    train_blocks = TokenBlocks(folder, "train", block_size, seed, pin_memory)
    val_blocks = TokenBlocks(folder, "val", block_size, seed, pin_memory)
    batches, sequences = evaluation_batches(val_blocks, eval_tokens, batch_size)
    if sequences * block_size > eval_tokens:
        raise DataError(
            f"eval_tokens = {eval_tokens:,} is less than a batch: choose --eval_tokens of at least "
            f"{sequences * block_size:,}"
        )
    wanted = eval_tokens // (batch_size * block_size) * batch_size
    if batches * sequences < wanted:
        runtime.print0(
            f"evaluations read {batches * sequences * block_size:,} tokens, all whole batches of "
            f"the validation split, which has fewer than eval_tokens = {eval_tokens:,}"
        )
    return train_blocks, val_blocks


def evaluation_batches(blocks, tokens, batch_size):
    """-> how many batches an evaluation of so many tokens reads, and the sequences in each.

    A split that has fewer tokens is read in as many whole batches as it has. A split that is
    smaller than a batch is read as one, smaller batch.
    """
    sequences = min(batch_size, blocks.n_blocks)
    wanted = tokens // (sequences * blocks.block_size)
    return min(wanted, blocks.n_blocks // sequences), sequences


@torch.no_grad()
def evaluate(model, blocks, tokens, batch_size, machine):
    """-> mean loss over so many tokens from the start of the split, and the composite gain of the
    token-averaged M of one sequence. The ranks share the batches."""
    rank, _, world_size = runtime.ranks()
    batches, sequences = evaluation_batches(blocks, tokens, batch_size)
    total = torch.zeros((), device=machine.device)
    if machine.device.type != "mps":  # which has no float64
        total = total.double()
    model.eval()
    with machine.autocast:
        for batch in range(rank, batches, world_size):
            idx, targets = to_device(blocks.in_order(batch * sequences, sequences), machine.device)
            total += model(idx, targets)[1]
        idx, _ = to_device(blocks.in_order(0, 1), machine.device)
        gain = composite_gain(model.mixing_matrices(idx))
    model.train()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / batches, gain
