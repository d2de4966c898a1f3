"""
Logits of a token, or of a sublayer, and the coefficients that they become: read, write and mix.

The modules of streams.py that use coefficients are subclasses of `Coefficients`.
"""

import itertools
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from passes import Logits, Project, at_least_float32, mean_square
from planes import FEW_STREAMS
from stacked_passes import LogitsStacked


class Coefficients(nn.Module):
    """Coefficients of the streams, made from logits.

    Dynamic: the logits of a token are bias + alpha * f(phi @ RMSNorm(x)). Static: the bias alone.

    sizes        how many logits each part has, such as (read, write, mix); each has its own alpha
    squashed     for each part, whether f is tanh; otherwise f is the identity
    n_streams    more than FEW_STREAMS: logits and coefficients are stacked, see below
    n_embd       C, the channels of a stream
    dynamic      whether coefficients depend on the token
    sees         what phi multiplies: the n_streams * C numbers of all "streams", or the C of the
                 branch's "input"
    alpha_start  where each alpha starts

    A subclass defines `start_bias()`, the bias at the start, and `coefficients_of(*parts)`, from
    logits to coefficients. Its __init__ ends with `reset_parameters()`, which calls start_bias.

    For up to FEW_STREAMS streams, logits and coefficients are lists of planes (planes.py). For
    more, `stacked` is True: a tensor, whose first dimension counts the planes, stands for each
    list.
    """

    def __init__(self, n_streams, n_embd, *, sizes, squashed, dynamic, alpha_start, sees="streams"):
        super().__init__()
        self.sizes, self.squashed, self.sees = sizes, squashed, sees
        self.dynamic, self.alpha_start = dynamic, alpha_start
        self.stacked = n_streams > FEW_STREAMS
        self.bias = nn.Parameter(torch.empty(sum(sizes)))
        if dynamic:
            n_seen = n_embd * (n_streams if sees == "streams" else 1)
            self.phi = nn.Parameter(torch.empty(sum(sizes), n_seen))  # (out, in)
            self.alpha = nn.Parameter(torch.empty(len(sizes)))

    @torch.no_grad()
    def reset_parameters(self):
        self.bias.copy_(self.start_bias())
        if self.dynamic:
            self.phi.zero_()
            self.alpha.fill_(self.alpha_start)

    def coefficients(self, streams):
        """-> what `coefficients_of` returns: planes (B, T) in float32, or (1, 1) if static.

        The backward computes the coefficients again from y = phi @ x and r = 1 / rms(x), so nothing
        in between is stored.
        alpha and bias are arguments of what is computed again: with torch.func.functional_call,
        self.alpha and self.bias may be other tensors by the time of the backward.
        """
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        if not self.dynamic:
            return recompute(self.static_coefficients, self.bias)
        seen, square = streams.seen(self.sees), streams.mean_square
        if square is None:
            square = mean_square(seen)
        y, r = Project.apply(square, seen, self.phi)
        return recompute(self.dynamic_coefficients, y, r, self.alpha, self.bias)

    def dynamic_coefficients(self, y, r, alpha, bias):
        logits = LogitsStacked if self.stacked else Logits
        planes = logits.apply(y, r, alpha, bias, self.sizes, self.squashed)
        return self.coefficients_of(*split_planes(planes, self.sizes))

    def static_coefficients(self, bias):
        planes = at_least_float32(bias)[:, None, None]  # (K, 1, 1)
        if not self.stacked:
            planes = planes.unbind(0)
        return self.coefficients_of(*split_planes(planes, self.sizes))


def split_planes(planes, sizes):
    """Planes, in a list or stacked -> one list or stack for each part, of these sizes."""
    ends = itertools.accumulate(sizes)
    return [planes[end - size : end] for end, size in zip(ends, sizes)]


def each(function, planes):
    """Apply a pointwise function to every plane, in a list or stacked."""
    if isinstance(planes, torch.Tensor):
        return function(planes)
    return [function(plane) for plane in planes]
