"""batches.py: which sequences a step and an evaluation read, counted one by one."""

from types import SimpleNamespace

import pytest
import torch

from batches import evaluation_batches, micro_batches, sequences_per_step

CPU = torch.device("cpu")


class Blocks:
    """As TokenBlocks, but a sequence is its own number, and targets are the step's."""

    def batch(self, step, sequences, start, count):
        assert start + count <= sequences
        return torch.arange(start, start + count), torch.full((count,), step)


@pytest.mark.quick
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_share_the_sequences_of_each_step(world_size, monkeypatch):
    """Each of 12 sequences is read once a step, from the step on that was asked for."""
    seen = []
    for rank in range(world_size):
        monkeypatch.setattr("runtime.ranks", lambda rank=rank: (rank, rank, world_size))
        micro_steps = 12 // (2 * world_size)
        batches = micro_batches(Blocks(), 5, 12, 2, CPU)
        for step in (5, 6):
            for _ in range(micro_steps):
                idx, steps = next(batches)
                assert steps.tolist() == [step] * 2
                seen += [(step, number) for number in idx.tolist()]
    assert sorted(seen) == [(step, number) for step in (5, 6) for number in range(12)]


@pytest.mark.quick
def test_tokens_of_a_step_in_sequences():
    assert sequences_per_step(491_520, 12, 1024, 8) == 480
    with pytest.raises(ValueError, match="= 128; nearest: 256; or keep it, with --batch_size=1"):
        sequences_per_step(224, 4, 16, 2)


@pytest.mark.quick
@pytest.mark.parametrize(
    "n_blocks, tokens, expected",
    [
        (100, 320, (5, 4)),  # 320 tokens are 20 sequences of 16
        (100, 350, (5, 4)),  # whole batches alone
        (10, 320, (2, 4)),  # the split has two whole batches
        (3, 320, (1, 3)),  # and here less than one
    ],
)
def test_what_an_evaluation_reads(n_blocks, tokens, expected):
    blocks = SimpleNamespace(n_blocks=n_blocks, block_size=16)
    assert evaluation_batches(blocks, tokens, batch_size=4) == expected
