"""The options with which torch.compile makes the kernels of a model."""

import torch

from planes import FEW_STREAMS


def compiler_options(n_streams):
    """The options for torch.compile that this version of torch knows."""
    wanted = {
        # Inductor unrolls a sum of fewer terms than this. A sum over the n streams has to stay a
        # loop, or it could not be fused with the kernel that wrote the streams.
        "unroll_reductions_threshold": 1,
        # A mixer is hundreds of pointwise operations. The default, 64, would split its kernel.
        "max_fusion_size": 1024,
        # On a CPU, one loop makes the sums over channels for the gradients of all coefficients. The
        # default would split it.
        "cpp.max_horizontal_fusion_size": 1024,
        # Inductor stores a stack of more planes than this. It would compute a smaller stack again
        # for every channel that uses it. 3, because one kernel should still join the gradients of
        # q, k and v.
        "max_pointwise_cat_inputs": 3,
        "max_complex_pointwise_cat_inputs": 3,  # the same, since torch 2.13
    }
    if n_streams > FEW_STREAMS:
        # A sum over the streams has 2 n reads, n streams and n factors, and may be fused with
        # another sum. After the default's 8 reads Inductor would store the sum so far, in float32.
        wanted["realize_acc_reads_threshold"] = 4 * n_streams
    known = set(torch._inductor.list_options())
    return {name: value for name, value in wanted.items() if name in known}
