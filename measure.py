"""
What a trained mixer does, in numbers: a model and tokens -> plain numbers for each sublayer.

    sublayers, n_tokens = look_at(model, batches)       # matrices, reads, writes, streams
    gains = gains_by_depth(matrices)                   # how signals can grow, by depth
    loss, changes = loss_changes(model, means, batches) # what each M is worth to the loss

analyze.py prints and draws them; what each number means is said there, in `analysis`.
"""

import contextlib
import functools
import itertools
import math
import sys
import time

import torch
from torch.nn import functional as F

from mixers import ds_error
from streams import HyperConnection, ScaledResidual


def look_at(model, batches):
    """-> a dict for each sublayer, with what `analysis` lists except gains and losses; and how many
    tokens were looked at. batches: a list of (idx, targets), each (B, T)."""
    totals, tokens_seen = [], 0
    for idx, _ in batches:
        observed = model.observe(idx)
        tokens_seen += idx.numel()
        totals = totals or [Totals(seen.name) for seen in observed]
        for total, seen in zip(totals, observed):
            total.add(seen)
    return [describe(total, tokens_seen) for total in totals], tokens_seen


class Totals:
    """Sums over the tokens of one sublayer, batch after batch."""

    def __init__(self, name):
        self.name, self.moments = name, {}
        self.ds_error = torch.zeros((), dtype=torch.float64)

    def add(self, seen):
        mix, read, write, gram = (
            part.flatten(0, 1).cpu().double()  # (tokens, ...)
            for part in (seen.mix, seen.read, seen.write, gram_matrices(seen.x))
        )
        values = {
            "mix": mix,  # (tokens, n, n)
            "read": read,  # (tokens, n)
            "write": write,
            "size": read.abs(),
            "share": read.abs() / read.abs().sum(-1, keepdim=True),
            "cosine": pairwise_cosine(gram),  # (tokens,)
            "effective_streams": effective_streams(gram),
        }
        for key, value in values.items():
            moments = torch.stack([value.sum(0), value.square().sum(0)])
            self.moments[key] = self.moments.get(key, 0) + moments
        self.ds_error = torch.maximum(self.ds_error, ds_error(mix).max())  # a NaN stays one


def describe(total, count):
    """The sums over `count` tokens -> the sublayer's part of `analysis`, in plain numbers."""
    mean = {key: moments[0] / count for key, moments in total.moments.items()}
    spread = {
        key: (moments[1] / count - mean[key].square()).clamp(min=0).sqrt()
        for key, moments in total.moments.items()
    }
    mix = mean["mix"]
    n = len(mix)
    _, layer, branch = total.name.split(".")
    finite = bool(mix.isfinite().all())  # else svdvals raises
    singular_values = torch.linalg.svdvals(mix) if finite else torch.full((n,), math.nan)
    dominant = mean["size"].argmax().item()
    return {
        "name": f"{layer} {branch.removeprefix('hc_')}",
        "mix": mix.tolist(),
        "mix_spread": spread["mix"].tolist(),
        "read": mean["read"].tolist(),
        "read_spread": spread["read"].tolist(),
        "write": mean["write"].tolist(),
        "write_spread": spread["write"].tolist(),
        "spread": spread["mix"].norm().item(),
        "from_identity": (mix - torch.eye(n)).norm().item(),
        "from_uniform": (mix - 1 / n).norm().item(),
        "singular_values": singular_values.tolist(),
        "ds_error": total.ds_error.item(),
        "cosine": mean["cosine"].item(),
        "effective_streams": mean["effective_streams"].item(),
        "dominant_stream": dominant,
        "dominant_share": mean["share"][dominant].item(),
    }


def gram_matrices(x):
    """Streams (B, T, n, C) -> the inner product of each stream with each, (B, T, n, n)."""
    x = x.float()
    return x @ x.transpose(-1, -2)


def pairwise_cosine(gram):
    """Inner products (..., n, n) -> the mean cosine of two streams, (...); NaN with one stream."""
    n = gram.shape[-1]
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosine = gram / (length[..., :, None] * length[..., None, :])
    one, other = torch.triu_indices(n, n, 1)
    return cosine[..., one, other].mean(-1)


def effective_streams(gram):
    """Inner products (..., n, n) of the streams -> how many streams there are in effect (...).

    The participation ratio (sum s)^2 / sum s^2 of the singular values s of this Gram matrix: 1 if
    all streams are multiples of one, n if they are orthogonal and equally long. The matrix has no
    negative eigenvalue, so sum s is its trace, and sum s^2 the sum of its squared entries.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace.square() / gram.square().sum((-2, -1))


def gains_by_depth(matrices):
    """(n, n) matrices in order of depth -> for each the four gains that `analysis` lists."""
    # from_first[l] = M_l ... M_1, and to_last[l] = M_L ... M_l.
    from_first = list(itertools.accumulate(matrices, lambda product, M: M @ product))
    to_last = list(itertools.accumulate(matrices[::-1], torch.matmul))[::-1]
    return [
        {
            "forward_gain_from_first": largest_row_sum(first),
            "backward_gain_from_first": largest_row_sum(first.T),
            "forward_gain_to_last": largest_row_sum(last),
            "backward_gain_to_last": largest_row_sum(last.T),
        }
        for first, last in zip(from_first, to_last)
    ]


def largest_row_sum(M):
    """The largest sum of absolute entries in a row of (n, n)."""
    return M.abs().sum(-1).max().item()


# ---- the loss with one M replaced ----------------------------------------------------------------


@contextlib.contextmanager
def replaced_mix(connection, matrix):
    """Inside `with`, the HyperConnection mixes the streams of every token by `matrix` (n, n).

    Of a ScaledResidual M is its factor s, and `matrix` (1, 1) stands for it."""
    connection.coefficients = functools.partial(coefficients_with, connection.coefficients, matrix)
    try:
        yield
    finally:
        del connection.coefficients  # the class's own is seen again


def coefficients_with(usual, matrix, *state):
    """What usual(*state) returns, with the entries of `matrix` instead of the planes of M."""
    found = usual(*state)
    if len(found) == 1:  # the s of a ScaledResidual
        return [matrix.to(found[0]).expand_as(found[0])]
    read, write, _ = found
    entries = matrix.to(read[0]).flatten()[:, None, None].expand(-1, *read[0].shape)
    return read, write, entries if isinstance(read, torch.Tensor) else [*entries]


@torch.no_grad()
def sequence_losses(model, batches):
    """-> the mean cross-entropy of every sequence, (sequences,) in float64 on the CPU."""
    losses = []
    for idx, targets in batches:
        logits = model(idx, targets)[0].float()
        by_token = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(by_token.view_as(targets).mean(1).cpu())
    return torch.cat(losses).double()


def standard_error(numbers):
    """The standard error of the mean of (count,); NaN for one number."""
    if len(numbers) < 2:
        return math.nan
    return numbers.std().item() / math.sqrt(len(numbers))


def loss_changes(model, means, batches):
    """-> the loss, and for each sublayer its `loss_change` as in `analysis`.

    means: one matrix (n, n) for each sublayer; M is replaced by it, and by I. In the plain residual
    model M is 1, and the change is 0. Says on stderr how long it will take.
    """
    kinds = (HyperConnection, ScaledResidual)
    connections = [module for module in model.modules() if isinstance(module, kinds)]
    begin = time.perf_counter()
    usual = sequence_losses(model, batches)
    if not connections:  # the plain residual model
        return usual.mean().item(), [{"identity": [0.0, 0.0], "mean": [0.0, 0.0]} for _ in means]
    seconds = (time.perf_counter() - begin) * 2 * len(connections)
    print(
        f"losses with one M replaced, {len(connections)} sublayers: about {seconds:.0f} s more "
        "(--loss_tokens=0 leaves them out)",
        file=sys.stderr,
        flush=True,
    )
    changes = []
    for connection, mean in zip(connections, means):
        change = {}
        for name, matrix in (("identity", torch.eye(len(mean))), ("mean", mean)):
            with replaced_mix(connection, matrix):
                difference = sequence_losses(model, batches) - usual
            change[name] = [difference.mean().item(), standard_error(difference)]
        changes.append(change)
    return usual.mean().item(), changes
