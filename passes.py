"""
The passes over the residual streams, as autograd.Functions.

All code here is plain PyTorch, forward and backward, so torch.compile generates every kernel. The
backwards are written by hand: autograd's own would keep float32 copies of the streams. With
autograd's, a layer on an H100's graph moved 2.62 times the bytes of the residual model's; with ours
it moves 1.91 times (LOG.md). streams.py puts the passes together.

Throughout, x (B, T, n, C) are the streams. A *plane* (B, T) is one coefficient of all tokens, in
float32; where coefficients do not depend on the token, a plane is (1, 1). This file is for few
streams, with a plane for each coefficient; stacked_passes.py is for many.
"""

import torch

# ---- dtypes --------------------------------------------------------------------------------------


def matmul_float32(a, b):
    """a @ b, summed and returned in float32 (float64 stays float64)."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(a, b, out_dtype=torch.float32)
        return at_least_float32(a) @ at_least_float32(b)


def at_least_float32(t):
    return cast(t, torch.promote_types(t.dtype, torch.float32))


def cast(t, dtype):
    """t in this dtype; t itself if it has it, since torch 2.11 loses the gradient of a Function's
    output that went through a `.to()` which changes nothing."""
    return t if t.dtype == dtype else t.to(dtype)


# ---- sums ----------------------------------------------------------------------------------------


@torch.no_grad()
def mean_square(x):
    """x (B, T, ...) -> (B, T) in float32, the mean square of all numbers of a token. Without a
    gradient: Project.backward adds what comes through the norm to the gradient of x."""
    return at_least_float32(x).flatten(2).square().mean(-1)


# ---- from the streams to logits ------------------------------------------------------------------


class Project(torch.autograd.Function):
    """square (B, T), x (B, T, ...), phi (K, N) for the N numbers of a token
    -> y = phi @ x (K, B, T) and r = 1 / rms(x) (B, T), both in float32.

    square is the mean square of x. The caller needs phi @ RMSNorm(x), which is y * r: the norm is
    applied after the product, and the mean square comes from the pass that wrote x, so x is read
    once. In the backward x gets the gradient that goes through r too, and square gets none.
    """

    @staticmethod
    def forward(ctx, square, x, phi):
        y = matmul_float32(phi.to(x.dtype), flat_tokens(x).t()).unflatten(1, square.shape)
        r = torch.rsqrt(square + 1e-6)
        ctx.save_for_backward(x, phi, r)
        return y, r

    @staticmethod
    def backward(ctx, grad_y, grad_r):
        x, phi, r = ctx.saved_tensors
        grad_y = grad_y.to(x.dtype).flatten(1)  # (K, B*T)
        # r = (mean(x^2) + 1e-6)^(-1/2), so dr/dx = -r^3 x / N.
        radial = (grad_r * r * r * r / phi.shape[1]).to(x.dtype)  # (B, T), for -x
        with torch.autocast(x.device.type, enabled=False):
            grad_x = (grad_y.t() @ phi.to(x.dtype)).view_as(x)
        grad_x = grad_x - x * radial[(..., *[None] * (x.ndim - 2))]
        return None, grad_x, matmul_float32(grad_y, flat_tokens(x))


def flat_tokens(x):
    """x (B, T, ...) -> (B*T, numbers of a token)."""
    return x.flatten(0, 1).flatten(1)


class Logits(torch.autograd.Function):
    """The K planes (B, T) of bias + alpha * f(y * r).

    y (K, B, T), r (B, T), alpha (parts,), bias (K,). The K logits lie in parts, such as read, write
    and mix. For each part, `sizes` has the number of its logits, alpha its factor, and `squashed`
    whether f is tanh; otherwise f is the identity.

    In the backward, one sum over the tokens gives the gradients of alpha and bias.
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
        return through_logits(ctx, torch.stack(grad_planes))


def through_logits(ctx, grad):
    """The gradient of the logits (K, B, T) -> those of the arguments of `Logits`."""
    y, r, alpha = ctx.saved_tensors
    z = y * r
    part_of = one_hot_parts(ctx.sizes, alpha)  # (parts, K)
    f, slope = z, None
    if any(ctx.squashed):
        squash = squashed_logits(ctx.sizes, ctx.squashed, y.device)
        f = torch.where(squash, z.tanh(), z)
        slope = torch.where(squash, 1 - f * f, 1.0)
    grad_gain, grad_bias = torch.stack([grad * f, grad]).sum((-2, -1))
    grad_z = grad * alpha_of_logits(alpha, part_of)[:, None, None]
    if slope is not None:
        grad_z = grad_z * slope
    grad_alpha = (grad_gain * part_of).sum(1)
    return grad_z * r, (grad_z * y).sum(0), grad_alpha, grad_bias, None, None


def alpha_of_logits(alpha, part_of):
    """(K,): the alpha of each logit's part."""
    return sum((alpha[:, None] * part_of).unbind(0))


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
# The three Functions below get each coefficient twice: in a stack (a, M or w), to compute with; and
# as a plane, to receive the gradient. The stacks get no gradient, since one more kernel would have
# to cut it into planes.
#
# Their forwards take *args. Without gradients, Dynamo tells by counting whether a forward expects
# ctx: it leaves ctx out where the call has as many arguments as the forward has parameters.


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
        # One product over all streams, then a sum. If this went stream by stream, Inductor would
        # compute u again from x in the branch's backward.
        u = cast(sum((a[..., None] * x).unbind(-2)), x.dtype)
        if M is None:
            return u
        return u, mixed_by(M, x)

    @staticmethod
    def backward(ctx, grad_u, grad_mixed=None):
        x, a, M = ctx.saved_tensors
        xs = x.unbind(-2)
        grad_x = a[..., None] * grad_u[..., None, :]
        grad_planes = [(at_least_float32(grad_u) * x_j).sum(-1) for x_j in xs]
        if M is not None:
            grads = grad_mixed.unbind(-2)
            grad_x = grad_x + mixed_by(M.mT, grad_mixed)
            grad_planes += [(grad_i * x_j).sum(-1) for grad_i in grads for x_j in xs]
        return grad_x.to(x.dtype), None, None, *sum_to_shape(a.shape[:-1], grad_planes)


def mixed_by(M, x):
    """sum_j M_ij x_j (B, T, n, C) in float32, one stream after the other: the compiler joins the
    sum with what follows. A matrix product would store its result, in float32."""
    return sum(M[..., :, j, None] * x[..., None, j, :] for j in range(x.shape[-2]))


class Write(torch.autograd.Function):
    """mixed (B, T, n, C) in float32, or x itself for M = I; v (B, T, C), w (B, T, n), a dtype, then
    the planes of w.

    -> x'_i = mixed_i + w_i v (B, T, n, C) in that dtype, and its mean square (B, T) in float32.
    """

    @staticmethod
    def forward(ctx, *args):
        mixed, v, w, dtype = args[:4]
        ctx.save_for_backward(v, w)
        new = mixed + w[..., None] * v[..., None, :]  # float32
        square = new.square().mean((-2, -1))
        ctx.mark_non_differentiable(square)
        return cast(new, dtype), square

    @staticmethod
    def backward(ctx, grad, _):
        v, w = ctx.saved_tensors
        grad_planes = [(at_least_float32(g) * v).sum(-1) for g in grad.unbind(-2)]
        # Inductor keeps this sum a loop over the streams (unroll_reductions_threshold), and joins
        # it with the kernel that wrote grad.
        grad_v = (w[..., None] * grad).sum(-2).to(v.dtype)
        return grad, grad_v, None, None, *sum_to_shape(w.shape[:-1], grad_planes)


class MixWriteReadAhead(torch.autograd.Function):
    """Mix, write and read ahead, in one pass over the streams.

    x (B, T, n, C), v (B, T, C), a and w (B, T, n), M (B, T, n, n) or None for I, then the planes of
    a, w and M.

    -> x'_i = sum_j M_ij x_j + w_i v (B, T, n, C) and u' = sum_i a_i x'_i (B, T, C), both in x's
    dtype; and the mean square of u' (B, T) in float32.

    Each stream is a tensor of its own throughout, so that every loop runs over tokens and channels.

    Backward: G_i = grad_i + a_i grad_u is the whole gradient of x'_i. With <., .> for a sum over
    channels, the gradients of the coefficients need only what the loop reads anyway (grad, grad_u,
    x and v), so that neither G nor x' is stored:
        <G_i, x_j> = <grad_i, x_j> + a_i <grad_u, x_j>         the gradient of M_ij
        <G_i, v> = <grad_i, v> + a_i <grad_u, v>               that of w_i
        <grad_u, x'_i> = sum_j M_ij <grad_u, x_j> + w_i <grad_u, v>            that of a_i
    """

    @staticmethod
    def forward(ctx, *args):
        x, v, a, w, M = args[:5]
        ctx.save_for_backward(x, v, a, w, M)
        xs, v = x.unbind(-2), at_least_float32(v)
        new = []
        for i in range(len(xs)):
            mixed = at_least_float32(xs[i])
            if M is not None:
                mixed = sum(M[..., i, j, None] * x_j for j, x_j in enumerate(xs))
            new.append(mixed + w[..., i, None] * v)
        u = sum(a[..., i, None] * x_i for i, x_i in enumerate(new))
        square = u.square().mean(-1)
        ctx.mark_non_differentiable(square)
        new = torch.stack([cast(x_i, x.dtype) for x_i in new], -2)
        return new, cast(u, x.dtype), square

    @staticmethod
    def backward(ctx, grad, grad_u, _):
        x, v, a, w, M = ctx.saved_tensors
        indices = range(x.shape[-2])
        xs = [at_least_float32(x_j) for x_j in x.unbind(-2)]
        grads = [at_least_float32(grad_i) for grad_i in grad.unbind(-2)]
        v32, grad_u = at_least_float32(v), at_least_float32(grad_u)
        a_planes, w_planes = a.unbind(-1), w.unbind(-1)

        u_v = (grad_u * v32).sum(-1)
        u_x = [(grad_u * x_j).sum(-1) for x_j in xs]
        grad_w = [(grads[i] * v32).sum(-1) + a_planes[i] * u_v for i in indices]
        grad_a, grad_M = [], []
        for i in indices:
            if M is None:
                grad_a.append(u_x[i] + w_planes[i] * u_v)
                continue
            grad_a.append(sum(M[..., i, j] * u_x[j] for j in indices) + w_planes[i] * u_v)
            grad_M += [(grads[i] * xs[j]).sum(-1) + a_planes[i] * u_x[j] for j in indices]

        G = [grads[i] + a[..., i, None] * grad_u for i in indices]
        grad_x = G
        if M is not None:
            grad_x = [sum(M[..., i, j, None] * G[i] for i in indices) for j in indices]
        grad_x = torch.stack([grad_j.to(x.dtype) for grad_j in grad_x], -2)
        grad_v = sum(w[..., i, None] * G[i] for i in indices).to(v.dtype)
        planes = sum_to_shape(a.shape[:-1], [*grad_a, *grad_w, *grad_M])
        return grad_x, grad_v, None, None, None, *planes


def sum_to_shape(shape, planes):
    """Planes (B, T) summed to the shape of the coefficients: (B, T), or (1, 1) where static."""
    if planes[0].shape == shape:
        return planes
    return torch.stack(planes).sum((-2, -1), keepdim=True).unbind(0)
