"""
The residual state as n parallel streams, and everything that touches it.

    >>> hc = HyperConnection("tbp", n_streams=4, n_embd=64)
    >>> streams = start_streams(torch.randn(2, 8, 64), n_streams=4)     # x (2, 8, 4, 64)
    >>> streams = hc(streams, branch)       # branch: (B, T, 64) -> (B, T, 64), attention or an MLP
    >>> streams.x.mean(2)                   # what the head reads, (2, 8, 64)

All code here is plain PyTorch, forward and backward, so torch.compile generates every kernel. The
steps that pass over the streams are autograd.Functions with a backward written by hand: autograd's
own would keep float32 copies of the streams and move almost twice the bytes.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mixers import check_options, find_mixer, n_logits, start_logits


def compiler_options():
    """Options for torch.compile, which GPT.compile_regions passes."""
    wanted = {
        # A sum over the n streams stays a loop. Below this number of terms Inductor would unroll
        # it, and then could not fuse it with the kernel that wrote the streams.
        "unroll_reductions_threshold": 1,
        # A mixer is hundreds of small operations on planes, and one kernel.
        "max_fusion_size": 1024,
        # On a CPU, the sums over channels for all coefficients' gradients are one loop.
        "cpp.max_horizontal_fusion_size": 1024,
        # A stack of more planes than this is stored once. Inductor would compute a smaller one
        # again for every channel that uses it. Joining the gradients of q, k and v stays fused.
        "max_pointwise_cat_inputs": 3,
        "max_complex_pointwise_cat_inputs": 3,  # the same, since torch 2.13
    }
    known = set(torch._inductor.list_options())
    return {name: value for name, value in wanted.items() if name in known}


class Streams(NamedTuple):
    """The residual state between two sublayers.

    x            (B, T, n, C), in the dtype of the activations
    mean_square  (B, T) in float32, the mean of x^2 over streams and channels. It travels with x
                 because whoever writes x can take it in the same pass. Sublayers whose coefficients
                 do not depend on x hand it on unchanged: nothing reads it there.
    """

    x: torch.Tensor
    mean_square: torch.Tensor


def start_streams(x, n_streams, offsets=None):
    """x (B, T, C) -> Streams: n copies of x, plus offsets (n, C) if there are any."""
    x = x[:, :, None].repeat(1, 1, n_streams, 1)
    if offsets is not None:
        x = x + offsets.to(x.dtype)
    return Streams(x, mean_square(x))


@torch.no_grad()
def mean_square(x):
    """x (B, T, n, C) -> (B, T) in float32. Without a gradient: `Project` takes that one itself."""
    return at_least_float32(x).square().mean((-2, -1))


# ---- from the streams to logits ------------------------------------------------------------------


class Project(torch.autograd.Function):
    """y = phi @ x (K, B, T) and r = 1 / rms(x) (B, T), both in float32.

    x (B, T, n, C), mean_square (B, T), phi (K, n*C). The caller needs phi @ RMSNorm(x), which is
    y * r. Dividing after the product, with the mean square from whoever wrote x, reads x once.
    The backward gives x the gradient through r as well, and mean_square none.
    """

    @staticmethod
    def forward(ctx, x, mean_square, phi):
        flat = x.flatten(0, 1).flatten(1)  # (B*T, n*C)
        y = matmul_float32(phi.to(x.dtype), flat.t()).unflatten(1, x.shape[:2])
        r = torch.rsqrt(mean_square + 1e-6)
        ctx.save_for_backward(x, phi, r)
        return y, r

    @staticmethod
    def backward(ctx, grad_y, grad_r):
        x, phi, r = ctx.saved_tensors
        flat = x.flatten(0, 1).flatten(1)  # (B*T, n*C)
        grad_y = grad_y.to(x.dtype).flatten(1)  # (K, B*T)
        shrink = (grad_r * r * r * r / flat.shape[1]).to(x.dtype)[..., None, None]
        with torch.autocast(x.device.type, enabled=False):
            grad_x = grad_y.t() @ phi.to(x.dtype)
        return grad_x.view_as(x) - x * shrink, None, matmul_float32(grad_y, flat)


class Logits(torch.autograd.Function):
    """The K planes (B, T) of bias + alpha * f(y * r).

    y (K, B, T), r (B, T), alpha (parts,), bias (K,). The K logits lie in parts (read, write, mix),
    `sizes` of them in each; a part has one alpha, and f is tanh where `squashed` says so for the
    part, else the identity. One sum over the tokens gives the gradients of alpha and bias.
    """

    @staticmethod
    def forward(ctx, y, r, alpha, bias, sizes, squashed):
        ctx.sizes, ctx.squashed = sizes, squashed
        ctx.save_for_backward(y, r, alpha)
        y, bias = list(y.unbind(0)), list(bias.unbind(0))
        planes = []
        for a, size, squash in zip(alpha.unbind(0), sizes, squashed):
            for _ in range(size):
                z = y[len(planes)] * r
                planes.append(bias[len(planes)] + a * (z.tanh() if squash else z))
        return tuple(planes)

    @staticmethod
    def backward(ctx, *grad_planes):
        y, r, alpha = ctx.saved_tensors
        grad, z = torch.stack(grad_planes), y * r  # (K, B, T)
        part_of = one_hot_parts(ctx.sizes, alpha)  # (parts, K)
        f, slope = z, None
        if any(ctx.squashed):
            squash = squashed_logits(ctx.sizes, ctx.squashed, y.device)
            f = torch.where(squash, z.tanh(), z)
            slope = torch.where(squash, 1 - f * f, 1.0)
        grad_gain, grad_bias = torch.stack([grad * f, grad]).sum((-2, -1))
        gain = sum((alpha[:, None] * part_of).unbind(0))  # (K,)
        grad_z = grad * gain[:, None, None]
        if slope is not None:
            grad_z = grad_z * slope
        grad_alpha = (grad_gain * part_of).sum(1)
        return grad_z * r, (grad_z * y).sum(0), grad_alpha, grad_bias, None, None


def part_index(sizes, device):
    """(K,): the part in which each logit lies. Arithmetic on arange, since a table made on the host
    would be copied to the GPU at every step."""
    k = torch.arange(sum(sizes), device=device)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return sum((k >= end).int() for end in ends) if ends else torch.zeros_like(k)


def one_hot_parts(sizes, alpha):
    """(parts, K) in alpha's dtype: 1 where logit k lies in the part."""
    parts = torch.arange(len(sizes), device=alpha.device)[:, None]
    return (part_index(sizes, alpha.device) == parts).to(alpha.dtype)


def squashed_logits(sizes, squashed, device):
    """(K, 1, 1): whether logit k goes through tanh."""
    part = part_index(sizes, device)
    chosen = [part == i for i, squash in enumerate(squashed) if squash]
    return sum(c.int() for c in chosen).bool()[:, None, None]


# ---- from the streams to the branch, and back ----------------------------------------------------
# Both functions take each coefficient twice. `a`, `M` and `w` are values: stacked tensors, without
# a gradient. `planes` are the same numbers plane by plane, and gradients flow back to those. Were
# the stack differentiated, its gradient would be cut into planes again by one more kernel.
#
# (`*args`, because Dynamo, when it traces without gradients, drops the ctx of a forward that
# happens to have as many parameters as there are arguments.)


class ReadAndMix(torch.autograd.Function):
    """x (B, T, n, C), a (B, T, n), M (B, T, n, n) or None for I, then the planes of a and of M.

    -> u = sum_j a_j x_j (B, T, C) in x's dtype, the branch's input; and, unless M is None,
    sum_j M_ij x_j (B, T, n, C) in float32, to which the branch's output will be added.

    One function for the two, so that the backward passes once over x for the gradients of a and M.
    """

    @staticmethod
    def forward(ctx, *args):
        x, a, M = args[:3]
        ctx.save_for_backward(x, a, M)
        # One product over all streams, not n of them: Inductor then keeps u for the backward
        # instead of reading x again.
        u = cast(sum((a[..., None] * x).unbind(-2)), x.dtype)
        if M is None:
            return u
        return u, sum(M[..., :, j, None] * x[..., None, j, :] for j in range(x.shape[-2]))

    @staticmethod
    def backward(ctx, grad_u, grad_mixed=None):
        x, a, M = ctx.saved_tensors
        x_j = x.unbind(-2)
        grad_x = a[..., None] * grad_u[..., None, :]
        grad_planes = [(at_least_float32(grad_u) * x_).sum(-1) for x_ in x_j]
        if M is not None:
            n = len(x_j)
            back = [M[..., i, :, None] * grad_mixed[..., None, i, :] for i in range(n)]
            grad_x = grad_x + sum(back)
            g_i = grad_mixed.unbind(-2)
            grad_planes += [(g_ * x_).sum(-1) for g_ in g_i for x_ in x_j]
        return grad_x.to(x.dtype), None, None, *sum_to_shape(a.shape[:-1], grad_planes)


class Write(torch.autograd.Function):
    """mixed (B, T, n, C), v (B, T, C), w (B, T, n), a dtype, then the planes of w.

    -> x'_i = mixed_i + w_i v (B, T, n, C) in that dtype, and its mean square (B, T) in float32.
    """

    @staticmethod
    def forward(ctx, *args):
        mixed, v, w, dtype = args[:4]
        ctx.save_for_backward(v, w)
        new = mixed + w[..., None] * v[..., None, :]  # float32
        mean_square = new.square().mean((-2, -1))
        ctx.mark_non_differentiable(mean_square)
        return cast(new, dtype), mean_square

    @staticmethod
    def backward(ctx, grad, _):
        v, w = ctx.saved_tensors
        grad_planes = [(at_least_float32(g) * v).sum(-1) for g in grad.unbind(-2)]
        grad_v = (w[..., None] * grad).sum(-2).to(v.dtype)  # fuses with the kernel that wrote grad
        return grad, grad_v, None, None, *sum_to_shape(w.shape[:-1], grad_planes)


def sum_to_shape(shape, planes):
    """Planes (B, T) summed to the shape of the coefficients: (B, T), or (1, 1) where static."""
    if planes[0].shape == shape:
        return planes
    return torch.stack(planes).sum((-2, -1), keepdim=True).unbind(0)


def matmul_float32(a, b):
    """a @ b, summed and returned in float32 (float64 stays float64)."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return at_least_float32(a) @ at_least_float32(b)


def at_least_float32(t):
    return cast(t, torch.promote_types(t.dtype, torch.float32))


def cast(t, dtype):
    """t in another dtype, and t itself in its own: torch 2.11 loses the gradient of a Function's
    output that went through a `.to()` which changes nothing."""
    return t if t.dtype == dtype else t.to(dtype)


# ---- the modules around a branch -----------------------------------------------------------------


class Residual(nn.Module):
    """The plain residual stream, x + F(x), called as a HyperConnection is."""

    def forward(self, streams, branch):
        x = streams.x  # (B, T, 1, C)
        return Streams(x + branch(x.squeeze(2)).unsqueeze(2), streams.mean_square)

    def observe(self, streams):
        """As HyperConnection.observe: everything is read, written and kept."""
        one = torch.ones(streams.x.shape[:3], device=streams.x.device)  # (B, T, 1)
        return one, one, one[..., None]


class Coefficients(nn.Module):
    """Logits in parts of `sizes`: bias + alpha * f(phi @ RMSNorm(x)) for each token, or, static,
    the bias alone. What the logits mean is up to the subclass, in `maps`.

    squashed: for each part whether f is tanh; otherwise f is the identity.
    """

    def __init__(self, sizes, squashed, n_streams, n_embd, dynamic):
        super().__init__()
        self.sizes, self.squashed, self.dynamic = sizes, squashed, dynamic
        self.bias = nn.Parameter(torch.empty(sum(sizes)))
        if dynamic:
            self.phi = nn.Parameter(torch.empty(sum(sizes), n_streams * n_embd))  # (out, in)
            self.alpha = nn.Parameter(torch.empty(len(sizes)))

    @torch.no_grad()
    def reset_parameters(self):
        self.bias.copy_(self.start_bias())
        if self.dynamic:
            self.phi.zero_()
            self.alpha.fill_(0.01)

    def coefficients(self, streams):
        """`maps` of the logits: planes (B, T) in float32, or (1, 1) where static.

        The backward computes them again from phi's product, instead of keeping every number in
        between. The parameters are arguments, since a module may hold others by then
        (torch.func.functional_call).
        """
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        if self.dynamic:
            y, r = Project.apply(streams.x, streams.mean_square, self.phi)
            return recompute(self.of_tokens, y, r, self.alpha, self.bias)
        return recompute(self.of_layer, self.bias)

    def of_tokens(self, y, r, alpha, bias):
        return self.maps(Logits.apply(y, r, alpha, bias, self.sizes, self.squashed))

    def of_layer(self, bias):
        return self.maps(at_least_float32(bias)[None, None].unbind(-1))


class HyperConnection(Coefficients):
    """n residual streams around a branch F (2512.24880, eq. 5-8):

        u    = sum_j a_j x_j                    read
        x'_i = sum_j M_ij x_j + w_i F(u)        mix and write

    With z = phi @ RMSNorm(x), whose RMSNorm is over all n*C numbers of a token and has no gain:

        a = sigmoid(alpha_read * z_read + b_read)
        w = 2 sigmoid(alpha_write * z_write + b_write)
        M = mixer(alpha_mix * z_mix + b_mix)

    Static (dynamic=False): phi = 0, one a, w and M for all tokens. Free gates, and an unbounded
    mixer (hc), use tanh(z) and drop the sigmoids. At the start phi is 0, a sums to 1, w is 1 and
    M's rows sum to 1: on equal streams the module is exactly x + F(x).

    layer       the index of the sublayer. Stream layer % n is read most, with weight `read_start`:
                different layers read different streams, which drives equal streams apart.
    mix_start   the eps of the starting matrix (1 - eps) I + (eps / n) 11^T
    gates       how a and w are bounded: "bounded" (sigmoids), "free", or "auto", which is free for
                an unbounded mixer
    mix_scale   a factor exp(logit) of M, 1 at the start: "none", one for the "sublayer", or one for
                each "stream" (a row of M)
    options     the mixer's own, by name
    ValueError for a value that is not allowed.
    """

    def __init__(
        self,
        mixer,
        n_streams,
        n_embd,
        *,
        layer=0,
        dynamic=True,
        mix_start=0.01,
        read_start=0.7,
        gates="auto",
        mix_scale="none",
        **options,
    ):
        K = n_logits(mixer, n_streams)
        check_options(mixer, options)
        check_between_0_and_1(mix_start=mix_start, read_start=read_start)
        check_choice("gates", gates, ("auto", "bounded", "free"))
        check_choice("mix_scale", mix_scale, ("none", "sublayer", "stream"))
        squash_mix = not find_mixer(mixer).bounded
        free_gates = gates == "free" or gates == "auto" and squash_mix
        n_scales = {"none": 0, "sublayer": 1, "stream": n_streams}[mix_scale]
        sizes = (n_streams, n_streams, K + n_scales)  # read, write, mix
        squashed = (free_gates, free_gates, squash_mix)
        super().__init__(sizes, squashed, n_streams, n_embd, dynamic)

        self.mixer, self.n_streams, self.options = mixer, n_streams, options
        self.favoured, self.mix_start, self.read_start = layer % n_streams, mix_start, read_start
        self.free_gates, self.n_mixer_logits = free_gates, K
        self.reset_parameters()

    def start_bias(self):
        n = self.n_streams
        read = torch.full((n,), (1 - self.read_start) / (n - 1), dtype=torch.float64)
        read[self.favoured] = self.read_start
        write = torch.ones(n)
        if not self.free_gates:
            read, write = read.logit(), torch.zeros(n)  # 2 sigmoid(0) = 1
        mix = start_logits(self.mixer, n, self.mix_start, **self.options)
        scale = torch.zeros(self.sizes[2] - len(mix))  # exp(0) = 1
        return torch.cat([read, write, mix, scale])

    def maps(self, planes):
        """Planes of logits -> n planes of a, n of w, and n^2 of M row by row (none for M = I)."""
        n, K = self.n_streams, self.n_mixer_logits
        read, write, mix = planes[:n], planes[n : 2 * n], planes[2 * n :]
        if not self.free_gates:
            read, write = [p.sigmoid() for p in read], [2 * p.sigmoid() for p in write]
        M = find_mixer(self.mixer).rows(mix[:K], n, **self.options)
        M = scale_rows(M, mix[K:], n)
        # A view of each, since a mixer may return one plane for two entries, and Dynamo may not.
        return [*read], [*write], [m.view_as(m) for row in M for m in row]

    def forward(self, streams, branch):
        """Streams -> Streams. branch: (B, T, C) -> (B, T, C)."""
        x, n = streams.x, self.n_streams
        read, write, mix = self.coefficients(streams)
        values = torch.stack(read + write + mix, -1)  # (B, T, 2n + n^2)
        a, w = values[..., :n], values[..., n : 2 * n]
        if mix:
            M = values[..., 2 * n :].unflatten(-1, (n, n))
            u, mixed = ReadAndMix.apply(x, a, M, *read, *mix)
        else:
            u, mixed = ReadAndMix.apply(x, a, None, *read), x
        new, new_square = Write.apply(mixed, branch(u), w, x.dtype, *write)
        return Streams(new, new_square if self.dynamic else streams.mean_square)

    @torch.no_grad()
    def observe(self, streams):
        """-> a (B, T, n), w (B, T, n) and M (B, T, n, n) of every token, in float32, to look at."""
        (B, T, n, _), device = streams.x.shape, streams.x.device
        read, write, mix = self.coefficients(streams)
        a, w = (torch.stack(planes, -1).expand(B, T, n) for planes in (read, write))
        M = torch.stack(mix, -1).unflatten(-1, (n, n)) if mix else torch.eye(n, device=device)
        return a, w, M.expand(B, T, n, n)


class ReadOut(Coefficients):
    """Streams -> sum_j r_j x_j (B, T, C), the head's input, with r = sigmoid(alpha * z + b).

    At the start r = 1/n: the mean. What the last sublayer's M does reaches the loss only through a
    read-out that is not the mean, since a doubly stochastic M leaves the mean as it is.
    """

    def __init__(self, n_streams, n_embd, *, dynamic=True):
        super().__init__((n_streams,), (False,), n_streams, n_embd, dynamic)
        self.reset_parameters()

    def start_bias(self):
        n = self.sizes[0]
        return torch.full((n,), 1 / n, dtype=torch.float64).logit()

    def maps(self, planes):
        return [plane.sigmoid() for plane in planes]

    def forward(self, streams):
        read = self.coefficients(streams)
        return ReadAndMix.apply(streams.x, torch.stack(read, -1), None, *read)


def scale_rows(M, logits, n):
    """The rows of M times exp(logit): one logit for all rows, or one a row. No logits: M itself."""
    if not logits:
        return M
    scale = [logit.exp() for logit in logits]
    if not M:  # the identity
        zero = torch.zeros_like(scale[0])
        return [[scale[i % len(scale)] if i == j else zero for j in range(n)] for i in range(n)]
    return [[scale[i % len(scale)] * m for m in row] for i, row in enumerate(M)]


def check_between_0_and_1(**values):
    for name, value in values.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {value}")


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
