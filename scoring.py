"""
How well a model predicts: the loss of a text, and the log-probability of endings.

    nats, count = text_loss(model, [tokens], stride=0, batch_size=8)
    scores = score_endings(model, [(context, ending), ...], batch_size=8)

Both run the model on windows of at most block_size tokens, and neither changes it.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

# ---- the loss of a text --------------------------------------------------------------------------


def windows(count, size, stride):
    """Windows of at most `size` tokens in which `count` targets are scored, each target once.

    Yields (begin, first, end): the window predicts the targets begin, ..., end - 1 and scores those
    from `first` on. Target t is predicted from the tokens begin, ..., t. stride 0: blocks side by
    side, as in training. Otherwise each window begins `stride` tokens after the one before it, so
    that all targets except the first `size` have at least size - stride tokens before them.
    """
    if not 0 <= stride <= size:
        raise ValueError(f"stride must lie between 0 and block_size {size}, not {stride}")
    done = 0
    while done < count:
        end = min(count, done + (stride if stride and done else size))
        begin = max(0, end - size) if stride else done
        yield begin, done, end
        done = end


@torch.no_grad()
def text_loss(model, pieces, *, stride, batch_size):
    """-> the sum of the losses in nats, and of how many targets it is.

    pieces: arrays of tokens, which are scored apart; the first token of each is never a target.
    ValueError for a stride that is not in [0, block_size].
    """
    size, device = model.config.block_size, model.embed.wte.weight.device
    rows = [
        (piece, *window) for piece in pieces for window in windows(len(piece) - 1, size, stride)
    ]
    nats, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        # One shape for all, so that a compiled model is one graph. Padding is no target (-1).
        idx = torch.zeros(batch_size, size, dtype=torch.int64)
        targets = torch.full_like(idx, -1)
        scored = 0
        for row, (piece, begin, first, end) in enumerate(rows[start : start + batch_size]):
            tokens = torch.from_numpy(np.asarray(piece[begin : end + 1], np.int64))
            idx[row, : end - begin] = tokens[:-1]
            targets[row, first - begin : end - begin] = tokens[first - begin + 1 :]
            scored += end - first
        loss = model(idx.to(device), targets.to(device))[1]  # the mean over targets
        nats += loss.item() * scored
        count += scored
    return nats, count


def byte_count(tokenizer, tokens):
    """How many bytes of text the array `tokens` stands for; ends of text have none."""
    text = tokens[tokens != tokenizer.eot_token]
    parts = range(0, len(text), 1 << 20)
    return sum(len(tokenizer.decode_bytes(text[i : i + (1 << 20)].tolist())) for i in parts)


# ---- endings -------------------------------------------------------------------------------------


class Score(NamedTuple):
    log_probability: float  # of the whole ending, in nats
    tokens: int  # of the ending
    likeliest: bool  # whether each of its tokens is the likeliest at its position
    cut: bool  # whether the context was too long and lost its beginning


@torch.no_grad()
def score_endings(model, pairs, *, batch_size):
    """-> a Score for each of `pairs`: (context, ending), two lists of tokens, neither empty.

    ValueError for an ending that is longer than block_size.
    """
    size, device = model.config.block_size, model.embed.wte.weight.device
    longest = max((len(ending) for _, ending in pairs), default=0)
    if longest > size:
        raise ValueError(f"an ending of {longest} tokens is longer than block_size {size}")
    scores = [None] * len(pairs)
    # Pairs of about the same length together, since shorter ones are padded.
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [(pairs[i][0] + pairs[i][1])[-(size + 1) :] for i in batch]
        idx = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
        for row, tokens in enumerate(rows):
            idx[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        logits = model(idx.to(device))[0]  # (rows, T, V)
        for row, i in enumerate(batch):
            context, ending = pairs[i]
            last = len(rows[row]) - 1
            own = logits[row, last - len(ending) : last].float().log_softmax(-1).cpu()
            target = torch.tensor(ending)
            scores[i] = Score(
                own.gather(1, target[:, None]).sum().item(),
                len(ending),
                torch.equal(own.argmax(-1), target),
                len(context) + len(ending) > size + 1,
            )
    return scores


def hellaswag(items, scores):
    """items: [(number of endings, index of the right one)]; scores: of all endings in this order.

    -> the results. accuracy: how often the right ending is the likeliest of its item;
    accuracy_norm: the same by the mean over an ending's tokens, since a long ending is less likely.
    """
    right = right_norm = first = 0
    for count, label in items:
        own = scores[first : first + count]
        by_sum = max(range(count), key=lambda k: own[k].log_probability)
        by_mean = max(range(count), key=lambda k: own[k].log_probability / own[k].tokens)
        right += by_sum == label
        right_norm += by_mean == label
        first += count
    return {
        "items": len(items),
        "accuracy": right / len(items),
        "accuracy_norm": right_norm / len(items),
        "cut": sum(score.cut for score in scores),
    }


def lambada(scores):
    """scores: of the last word of each text -> the results. accuracy: how often all its tokens are
    the likeliest; perplexity: exp of the mean of -log p(word), over the texts."""
    return {
        "items": len(scores),
        "accuracy": sum(score.likeliest for score in scores) / len(scores),
        "perplexity": math.exp(-sum(score.log_probability for score in scores) / len(scores)),
        "cut": sum(score.cut for score in scores),
    }
