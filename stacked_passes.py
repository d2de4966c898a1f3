"""
Passes over many streams: those of passes.py with tensors instead of planes.

Above FEW_STREAMS (planes.py) a list of n^2 planes would make code that grows with n^2. Here a, w
and M are tensors (B, T, n), (B, T, n) and (B, T, n, n) in float32, with B = T = 1 where they do not
depend on the token, and the Functions give the gradients of these tensors.

The mix is a sum of n terms, written out: the compiler joins it with what comes before and after it.
A matrix product would store its result, the streams in float32. Only the gradient of M is a matrix
product, since it is n^2 sums over channels. The gradients of static coefficients are summed over
all tokens (sum_to_size).
"""

import torch

from passes import (
    alpha_of_logits,
    at_least_float32,
    cast,
    mixed_by,
    one_hot_parts,
    squashed_logits,
    through_logits,
)


@torch.library.custom_op("stacked::tokens_first", mutates_args=())
def tokens_first(planes: torch.Tensor) -> torch.Tensor:
    """(k, B, T) -> (B, T, k), in this order in memory.

    The compiler sees one operation, here and in the gradient, so it cannot leave out the copy.
    Without the copy the numbers of a token lie far apart, one in each plane, and a pass over the
    streams would go through all tokens once for each stream."""
    return planes.movedim(0, -1).clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("stacked::planes_first", mutates_args=())
def planes_first(values: torch.Tensor) -> torch.Tensor:
    """(B, T, k) -> (k, B, T), in this order in memory."""
    return values.movedim(-1, 0).clone(memory_format=torch.contiguous_format)


@tokens_first.register_fake
def like_tokens_first(planes):
    return planes.new_empty(*planes.shape[1:], len(planes))


@planes_first.register_fake
def like_planes_first(values):
    return values.new_empty(values.shape[-1], *values.shape[:-1])


tokens_first.register_autograd(lambda ctx, grad: planes_first(grad))


class LogitsStacked(torch.autograd.Function):
    """As `Logits`, but returns one tensor (K, B, T)."""

    @staticmethod
    def forward(ctx, y, r, alpha, bias, sizes, squashed):
        ctx.save_for_backward(y, r, alpha)
        ctx.sizes, ctx.squashed = sizes, squashed
        z = y * r
        if any(squashed):
            squash = squashed_logits(sizes, squashed, y.device)
            z = torch.where(squash, z.tanh(), z)
        gain = alpha_of_logits(alpha, one_hot_parts(sizes, alpha))
        return bias[:, None, None] + gain[:, None, None] * z

    @staticmethod
    def backward(ctx, grad):
        return through_logits(ctx, grad)


class ReadStacked(torch.autograd.Function):
    """x (B, T, n, C), a -> u = sum_j a_j x_j (B, T, C) in x's dtype."""

    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return cast((a[..., None] * x).sum(-2), x.dtype)

    @staticmethod
    def backward(ctx, grad_u):
        x, a = ctx.saved_tensors
        grad_u = at_least_float32(grad_u)[..., None, :]
        grad_a = (grad_u * x).sum(-1)
        return (a[..., None] * grad_u).to(x.dtype), grad_a.sum_to_size(a.shape)


class MixWriteStacked(torch.autograd.Function):
    """x (B, T, n, C), v (B, T, C), w, M or None for I.

    -> x'_i = sum_j M_ij x_j + w_i v (B, T, n, C) in x's dtype, and its mean square (B, T) in
    float32.
    """

    @staticmethod
    def forward(ctx, x, v, w, M):
        ctx.save_for_backward(x, v, w, M)
        new = mix_and_write(x, v, w, M)
        square = new.square().mean((-2, -1))
        ctx.mark_non_differentiable(square)
        return cast(new, x.dtype), square

    @staticmethod
    def backward(ctx, grad, _):
        x, v, w, M = ctx.saved_tensors
        grad_w = (at_least_float32(grad) * v[..., None, :]).sum(-1).sum_to_size(w.shape)
        grad_v = (w[..., None] * grad).sum(-2).to(v.dtype)
        if M is None:
            return grad, grad_v, grad_w, None
        grad_M = inner_products(grad, x).sum_to_size(M.shape)
        return mixed_by(M.mT, grad).to(x.dtype), grad_v, grad_w, grad_M


class MixWriteReadAheadStacked(torch.autograd.Function):
    """As `MixWriteReadAhead`, from x, v, a, w and M (None for I), without planes."""

    @staticmethod
    def forward(ctx, x, v, a, w, M):
        ctx.save_for_backward(x, v, a, w, M)
        new = mix_and_write(x, v, w, M)
        u = (a[..., None] * new).sum(-2)
        square = u.square().mean(-1)
        ctx.mark_non_differentiable(square)
        return cast(new, x.dtype), cast(u, x.dtype), square

    @staticmethod
    def backward(ctx, grad, grad_u, _):
        x, v, a, w, M = ctx.saved_tensors
        v32, grad_u = at_least_float32(v), at_least_float32(grad_u)
        u_v = (grad_u * v32).sum(-1, keepdim=True)
        u_x = (grad_u[..., None, :] * x).sum(-1)
        grad_w = (at_least_float32(grad) * v32[..., None, :]).sum(-1) + a * u_v
        mixed_u_x = u_x if M is None else (M * u_x[..., None, :]).sum(-1)
        grad_a = mixed_u_x + w * u_v  # <grad_u, x'_i>
        grad_M = None
        if M is not None:
            grad_M = inner_products(grad, x) + a[..., None] * u_x[..., None, :]
            grad_M = grad_M.sum_to_size(M.shape)

        # G_i = grad_i + a_i grad_u is the whole gradient of x'_i. Each sum over i is taken of the
        # two terms separately: otherwise the compiler would store G, in float32.
        mixed_a = a if M is None else (M * a[..., None]).sum(-2)  # sum_i M_ij a_i
        grad_x = grad if M is None else mixed_by(M.mT, grad)
        grad_x = (grad_x + mixed_a[..., None] * grad_u[..., None, :]).to(x.dtype)
        grad_v = (w[..., None] * grad).sum(-2) + (w * a).sum(-1, keepdim=True) * grad_u
        grad_v = grad_v.to(v.dtype)
        grad_a, grad_w = grad_a.sum_to_size(a.shape), grad_w.sum_to_size(w.shape)
        return grad_x, grad_v, grad_a, grad_w, grad_M


def mix_and_write(x, v, w, M):
    """-> sum_j M_ij x_j + w_i v (B, T, n, C) in float32."""
    mixed = x if M is None else mixed_by(M, x)
    return at_least_float32(mixed) + w[..., None] * at_least_float32(v)[..., None, :]


def inner_products(left, right):
    """Sums over channels <left_i, right_j>, (B, T, n, n) in float32 (float64 stays float64), of
    left and right (B, T, n, C) in one dtype."""
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
            tokens = left.flatten(0, 1), right.flatten(0, 1).mT
            return torch.bmm(*tokens, out_dtype=torch.float32).unflatten(0, left.shape[:2])
        return at_least_float32(left) @ at_least_float32(right).mT
