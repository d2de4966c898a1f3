"""
The residual state as n parallel streams, and everything that touches it.

    >>> connection = HyperConnection("tbp", n_streams=4, n_embd=64)
    >>> streams = start_streams(torch.randn(2, 8, 64), n_streams=4)     # x (2, 8, 4, 64)
    >>> streams = connection(streams, branch)   # branch: (2, 8, 64) -> the same, such as an MLP
    >>> streams.x.mean(2)                   # what the head reads, (2, 8, 64)

Where the numbers come from that read, mix and write is in coefficients.py; the passes over the
streams themselves, forward and backward, are in passes.py and stacked_passes.py.
"""

from typing import NamedTuple

import torch
from torch import nn

from coefficients import Coefficients, each
from mixers import (
    check_options,
    find_mixer,
    n_logits,
    stacked_matrix,
    start_logits,
)
from passes import MixWriteReadAhead, ReadAndMix, Write, at_least_float32
from stacked_passes import MixWriteReadAheadStacked, MixWriteStacked, ReadStacked, tokens_first


class Streams(NamedTuple):
    """The residual state between two sublayers.

    x            (B, T, n, C)
    mean_square  (B, T) in float32: the mean square of all numbers of a token that coefficients see.
                 It travels with x because the pass that writes x computes it on the way. None where
                 it is not known, as at the start: a dynamic sublayer then computes it.
    input        (B, T, C): u, which the next branch reads. None unless sublayers read ahead (`sees`
                 of HyperConnection).
    """

    x: torch.Tensor
    mean_square: torch.Tensor | None
    input: torch.Tensor | None = None

    def seen(self, sees):
        """What coefficients see, for a value of SEES."""
        return self.x if sees == "streams" else self.input

    def at(self, positions):
        """-> Streams with T = 1: of each sequence b, the token at positions[b]."""
        sequences = list(range(len(positions)))
        return Streams(*(None if t is None else t[sequences, positions][:, None] for t in self))


# What coefficients may see: all streams, or the branch's input alone. With the input, each sublayer
# also writes what the next one reads: one pass over the streams instead of two.
SEES = ("streams", "input")


def start_streams(x, n_streams, offsets=None, sees="streams"):
    """x (B, T, C) -> Streams: n copies of x, plus offsets (n, C) if there are any.

    sees: that of the HyperConnections. With "input" sublayers read ahead: the first branch reads
    the mean of the streams, and the head the `input` of the last Streams. ValueError for another
    shape.
    """
    if x.ndim != 3:
        raise ValueError(f"x must have the shape (B, T, C), not {tuple(x.shape)}")
    x = x[:, :, None].repeat(1, 1, n_streams, 1)
    if offsets is not None:
        x = x + offsets.to(x.dtype)
    return Streams(x, None, x.mean(2) if sees == "input" else None)


# ---- the modules around a branch -----------------------------------------------------------------


def output(branch, u):
    """branch(u), of the shape of u (B, T, C). ValueError for any other output."""
    v = branch(u)
    if not isinstance(v, torch.Tensor) or v.shape != u.shape:
        found = tuple(v.shape) if isinstance(v, torch.Tensor) else f"a {type(v).__name__}"
        raise ValueError(f"a branch must return a tensor of its input's shape, not {found}")
    return v


class Residual(nn.Module):
    """The plain residual stream, x + F(x), called as a HyperConnection is."""

    def forward(self, streams, branch):
        x = streams.x  # (B, T, 1, C)
        return Streams(x + output(branch, x.squeeze(2)).unsqueeze(2), None)

    def observe(self, streams):
        """As HyperConnection.observe, with a, w and M all 1: a matrix of one stream."""
        one = torch.ones(streams.x.shape[:3], device=streams.x.device)  # (B, T, 1)
        return one, one, one[..., None]


class ScaledResidual(Coefficients):
    """The plain residual stream times one learned number, s x + F(x), called as a HyperConnection.

    s = exp(alpha * z + b) for each token, with z = phi @ RMSNorm(x), or exp(b) where static. At the
    start s is 1. A control: what a scale is worth without any mixing.
    """

    def __init__(self, n_embd, *, dynamic=True, alpha_start=0.01):
        super().__init__(
            1,
            n_embd,
            sizes=(1,),
            squashed=(False,),
            dynamic=dynamic,
            alpha_start=alpha_start,
        )
        self.reset_parameters()

    def start_bias(self):
        return torch.zeros(1)  # exp(0) = 1

    def coefficients_of(self, scale):
        return each(torch.exp, scale)

    def forward(self, streams, branch):
        x = streams.x  # (B, T, 1, C)
        (scale,) = self.coefficients(streams)
        v = output(branch, x.squeeze(2)).unsqueeze(2)
        return Streams((scale[..., None, None] * x + v).to(x.dtype), None)

    @torch.no_grad()
    def observe(self, streams):
        """As HyperConnection.observe, with a and w 1 and M = s: a matrix of one stream."""
        one = torch.ones(streams.x.shape[:3], device=streams.x.device)  # (B, T, 1)
        (scale,) = self.coefficients(streams)
        return one, one, scale[..., None, None] * one[..., None]


class HyperConnection(Coefficients):
    """n residual streams around a branch F (mHC, 2512.24880, eq. 5-8):

        u    = sum_j a_j x_j                    read
        x'_i = sum_j M_ij x_j + w_i F(u)        mix and write

    With z = phi @ RMSNorm(x), whose RMSNorm is over all n*C numbers of a token and has no gain, and
    with gates="bounded":

        a = sigmoid(alpha_read * z_read + b_read)
        w = 2 sigmoid(alpha_write * z_write + b_write)
        M = mixer(alpha_mix * z_mix + b_mix)

    Static (dynamic=False): without phi, one a, w and M for all tokens. An unbounded mixer (hc) gets
    tanh(z_mix). At the start phi is 0, a sums to 1, w is 1 and M's rows sum to 1: on equal streams
    the module is x + F(x), to rounding.

    mixer       a name of mixers.MIXERS; n_streams is its n, and n_embd is C
    sublayer    its index among the model's hyper-connections. Stream sublayer % n is read most,
                with weight `read_start`: different sublayers read different streams, which drives
                equal streams apart. Where reads are taken ahead, the next sublayer reads, so its
                index counts.
    alpha_start the three alphas at the start. phi starts at 0, so that alpha says how fast the
                token begins to count
    mix_start   the eps of the starting matrix (1 - eps) I + (eps / n) 11^T, of the mixers that
                start there (Mixer.starts_at_blend)
    gates       "bounded", as above; "exp": w = exp(logit), without an upper bound; "free": a and w
                are b + alpha * tanh(z); "auto": free for an unbounded mixer, else bounded
    mix_scale   a learned factor of M, 1 at the start: "none", one for the "sublayer", or one for
                each "stream" (a row of M). The mixer's matrix is doubly stochastic; the product M
                is not. A factor is exp(logit), and its logit shares alpha_mix.
    sees        what a, w and M depend on: all "streams", as in the papers; or the branch's "input"
                u. phi then has C columns instead of n C, and the module also computes what the next
                branch reads, u' = sum_i a_i x'_i: one pass over the streams mixes, writes and
                reads. The first branch reads the mean.
    last        whether this is the last one. Where reads are taken ahead, the a of the last one
                makes the head's input, and starts at 1/n, the mean.
    options     the mixer's own, by name
    ValueError for a value that is not allowed.
    """

    def __init__(
        self,
        mixer,
        n_streams,
        n_embd,
        *,
        sublayer=0,
        dynamic=True,
        alpha_start=0.01,
        mix_start=0.01,
        read_start=0.7,
        gates="auto",
        mix_scale="none",
        sees="streams",
        last=False,
        **options,
    ):
        K = n_logits(mixer, n_streams)
        if find_mixer(mixer).one_stream:
            raise ValueError(f"{mixer} has one stream: use streams.Residual around its branches")
        check_options(mixer, options)
        check_connection(
            alpha_start=alpha_start,
            mix_start=mix_start,
            read_start=read_start,
            gates=gates,
            mix_scale=mix_scale,
            sees=sees,
        )

        squash_mix = not find_mixer(mixer).bounded
        if gates == "auto":
            gates = "free" if squash_mix else "bounded"
        n_scales = {"none": 0, "sublayer": 1, "stream": n_streams}[mix_scale]
        sizes = (n_streams, n_streams, K + n_scales)  # read, write, mix
        squashed = (gates == "free", gates == "free", squash_mix)
        super().__init__(
            n_streams,
            n_embd,
            sizes=sizes,
            squashed=squashed,
            dynamic=dynamic,
            alpha_start=alpha_start,
            sees=sees,
        )

        self.mixer, self.options = mixer, options
        self.n_streams, self.n_embd = n_streams, n_embd
        self.read_ahead = sees == "input"
        reader = sublayer + self.read_ahead  # the sublayer whose branch reads with this module's a
        self.most_read = reader % n_streams
        reads_evenly = last and self.read_ahead
        self.read_start = 1 / n_streams if reads_evenly else read_start
        self.mix_start, self.gates, self.n_mixer_logits = mix_start, gates, K
        self.reset_parameters()

    def start_bias(self):
        n = self.n_streams
        read = torch.full((n,), (1 - self.read_start) / (n - 1), dtype=torch.float64)
        read[self.most_read] = self.read_start
        write = torch.ones(n)
        if self.gates != "free":
            read, write = read.logit(), torch.zeros(n)  # 2 sigmoid(0) = exp(0) = 1
        mix = start_logits(self.mixer, n, self.mix_start, **self.options)
        scale = torch.zeros(self.sizes[2] - len(mix))  # exp(0) = 1
        return torch.cat([read, write, mix, scale])

    def coefficients_of(self, read, write, mix):
        """Planes of logits -> n planes of a, n of w, and n^2 of M row by row (none for M = I)."""
        if self.gates != "free":
            read = each(torch.sigmoid, read)
        if self.gates == "bounded":
            write = each(twice_sigmoid, write)
        elif self.gates == "exp":
            write = each(torch.exp, write)

        n, K = self.n_streams, self.n_mixer_logits
        if self.stacked:
            M = stacked_matrix(self.mixer, mix[:K], n, **self.options)
            M = scale_rows_stacked(M, mix[K:], n)
            return read, write, [] if M is None else M.flatten(0, 1)
        M = find_mixer(self.mixer).map(mix[:K], n, **self.options)
        M = scale_rows(M, mix[K:], n)

        # A view of each plane: a mixer may return the same plane for two entries of M, and Dynamo
        # refuses a function that returns the same tensor twice.
        return [*read], [*write], [m.view_as(m) for row in M for m in row]

    def forward(self, streams, branch):
        """Streams -> Streams. branch: (B, T, C) -> (B, T, C). ValueError for other shapes."""
        if not isinstance(streams, Streams):
            raise ValueError(
                f"Streams are needed, not a {type(streams).__name__}: start_streams(x, "
                f"n_streams={self.n_streams}) makes them from x (B, T, C)"
            )
        n, C = self.n_streams, self.n_embd
        if streams.x.shape[2:] != (n, C):
            raise ValueError(
                f"this connection takes streams of the shape (B, T, {n}, {C}), not "
                f"{tuple(streams.x.shape)}"
            )
        if not self.read_ahead:
            by = self.by_tensors if self.stacked else self.by_planes
            return by(streams, branch, *self.coefficients(streams))
        if streams.input is None:
            raise ValueError(
                "the streams have no input, which a connection with sees='input' needs: begin with "
                "start_streams(..., sees='input')"
            )
        # The branch comes first. If the coefficients did, the compiler would keep the branch's norm
        # of u in float32 for the backward, although it could compute the norm again from u. And v
        # becomes float32 here: if the pass that uses v did it, v too would be kept in float32.
        v = at_least_float32(output(branch, streams.input))
        by = self.ahead_by_tensors if self.stacked else self.ahead_by_planes
        return by(streams, v, *self.coefficients(streams))

    def by_planes(self, streams, branch, read, write, mix):
        """Forward for few streams. read, write, mix: lists of n, n and n^2 planes; no mix for I."""
        x = streams.x
        a, w, M = tensors_of_planes(read, write, mix)
        if mix:
            u, mixed = ReadAndMix.apply(x, a, M, *read, *mix)
        else:
            u, mixed = ReadAndMix.apply(x, a, None, *read), x
        new, square = Write.apply(mixed, output(branch, u), w, x.dtype, *write)
        return Streams(new, square if self.dynamic else None)

    def by_tensors(self, streams, branch, read, write, mix):
        """Forward for many streams: planes are stacked."""
        a, w, M = tensors_of_stacks(read, write, mix)
        v = output(branch, ReadStacked.apply(streams.x, a))
        new, square = MixWriteStacked.apply(streams.x, v, w, M)
        return Streams(new, square if self.dynamic else None)

    def ahead_by_planes(self, streams, v, read, write, mix):
        """As `by_planes`, with the branch's output v (B, T, C), where reads are taken ahead."""
        tensors, planes = tensors_of_planes(read, write, mix), read + write + mix
        new, u, square = MixWriteReadAhead.apply(streams.x, v, *tensors, *planes)
        return Streams(new, square if self.dynamic else None, u)

    def ahead_by_tensors(self, streams, v, read, write, mix):
        """As `by_tensors`, with the branch's output v (B, T, C), where reads are taken ahead."""
        tensors = tensors_of_stacks(read, write, mix)
        new, u, square = MixWriteReadAheadStacked.apply(streams.x, v, *tensors)
        return Streams(new, square if self.dynamic else None, u)

    @torch.no_grad()
    def observe(self, streams):
        """-> a (B, T, n), w (B, T, n) and M (B, T, n, n) of every token, in float32.

        With sees="input", a gives what the next sublayer reads."""
        (B, T, n, _), device = streams.x.shape, streams.x.device
        read, write, mix = self.coefficients(streams)
        a, w = (torch.stack([*planes], -1).expand(B, T, n) for planes in (read, write))
        M = torch.eye(n, device=device)
        if len(mix):
            M = torch.stack([*mix], -1).unflatten(-1, (n, n))
        return a, w, M.expand(B, T, n, n)


class ReadOut(Coefficients):
    """Streams -> sum_j r_j x_j (B, T, C), the head's input, with r = sigmoid(alpha * z + b).

    At the start r = 1/n, the mean. With the mean for ever, the last sublayer's M would have no
    effect on the loss: a doubly stochastic M leaves the mean of the streams as it is.
    """

    def __init__(self, n_streams, n_embd, *, dynamic=True, alpha_start=0.01):
        super().__init__(
            n_streams,
            n_embd,
            sizes=(n_streams,),
            squashed=(False,),
            dynamic=dynamic,
            alpha_start=alpha_start,
        )
        self.reset_parameters()

    def start_bias(self):
        n = self.sizes[0]
        return torch.full((n,), 1 / n, dtype=torch.float64).logit()

    def coefficients_of(self, read):
        return each(torch.sigmoid, read)

    def forward(self, streams):
        x, read = streams.x, self.coefficients(streams)
        if self.stacked:
            return ReadStacked.apply(x, tokens_first(read))
        return ReadAndMix.apply(x, torch.stack(read, -1), None, *read)


def tensors_of_planes(read, write, mix):
    """Lists of planes -> a and w (B, T, n), M (B, T, n, n). M is None where `mix` is empty: I."""
    return a_w_M(torch.stack(read + write + mix, -1), len(read))


def tensors_of_stacks(read, write, mix):
    """As `tensors_of_planes`, from tensors (k, B, T). They are joined first: one copy for all."""
    planes = torch.cat([read, write, mix] if len(mix) else [read, write])
    return a_w_M(tokens_first(planes), len(read))


def a_w_M(values, n):
    """values (B, T, 2 n + n^2) or (B, T, 2 n), with B = T = 1 if static -> a, w, M or None."""
    a, w, M = values.split([n, n, values.shape[-1] - 2 * n], -1)
    return a, w, M.unflatten(-1, (n, n)) if M.shape[-1] else None


def twice_sigmoid(plane):
    return 2 * plane.sigmoid()


def scale_rows(M, logits, n):
    """M, as rows of planes, times the factors exp(logit): one for all rows, or one for each row.

    No logits: M itself. No rows: M is the identity."""
    if not logits:
        return M
    scale = [logit.exp() for logit in logits]
    if not M:
        zero = torch.zeros_like(scale[0])
        return [[scale[i % len(scale)] if i == j else zero for j in range(n)] for i in range(n)]
    return [[scale[i % len(scale)] * m for m in row] for i, row in enumerate(M)]


def scale_rows_stacked(M, logits, n):
    """As `scale_rows`, of M (n, n, ...), or None for the identity, and logits (0, 1 or n, ...)."""
    if not len(logits):
        return M
    scale = logits.exp().expand(n, *logits.shape[1:])
    if M is None:
        return torch.eye(n, device=logits.device)[..., None, None] * scale[:, None]
    return scale[:, None] * M


def check_connection(*, alpha_start, mix_start, read_start, gates, mix_scale, sees):
    """ValueError for a value that no HyperConnection takes."""
    if not alpha_start > 0:
        raise ValueError(
            f"alpha_start must be above 0, not {alpha_start}: phi starts at 0, and with alpha at 0 "
            "neither gets a gradient"
        )
    for name, value in (("mix_start", mix_start), ("read_start", read_start)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {value}")
    check_choice("gates", gates, ("auto", "bounded", "exp", "free"))
    check_choice("mix_scale", mix_scale, ("none", "sublayer", "stream"))
    check_choice("sees", sees, SEES)


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
