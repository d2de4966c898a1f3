"""
Mixtures of permutation matrices, which are exactly doubly stochastic.

The mixer permutation mixes all n! permutations of n streams. The mixer kronecker needs fewer
logits: it is the Kronecker product of smaller mixtures, one for each prime factor of n. As in
mixers.py, M is a list of n rows of n planes.
"""

import itertools
import math

import torch

from planes import softmax

# ---- permutation ---------------------------------------------------------------------------------


def permutation(planes, n):
    """sum_k softmax(logits)_k P_k over all n! permutations P_k in lexicographic order (mHC-lite,
    2601.05732)."""
    weights = softmax(planes)
    shares = [[[] for _ in range(n)] for _ in range(n)]  # the weights that add up to each entry
    for weight, permuted in zip(weights, itertools.permutations(range(n))):
        for i, j in enumerate(permuted):
            shares[i][j].append(weight)
    # Rounding could give a sum above 1.
    return [[sum(entry).clamp(max=1) for entry in row] for row in shares]


def permutation_inverse(M, n):
    """By Birkhoff's theorem M is a mixture of permutations.

    First take as much of the uniform matrix out of M as M holds. Then, as long as something is
    left, take out the permutation of which most is left.
    """
    permutations = torch.tensor(list(itertools.permutations(range(n))))  # (n!, n)
    line = torch.arange(n)
    logits = []
    for matrix in M.reshape(-1, n, n):
        uniform = n * matrix.min()
        weights = M.new_full((len(permutations),), uniform / len(permutations))
        rest = matrix - uniform / n
        while True:
            held = rest[line, permutations].amin(-1)  # (n!,) how much of each is left
            if not held.max() > 1e-15:
                break
            k = held.argmax()
            weights[k] += held[k]
            rest[line, permutations[k]] -= held[k]
        logits.append(weights.log())
    return torch.stack(logits).reshape(*M.shape[:-2], -1)


def permutation_start(n, eps):
    """The identity, which is the first permutation, gets 1 - eps; all permutations share eps."""
    weights = torch.full((math.factorial(n),), eps / math.factorial(n), dtype=torch.float64)
    weights[0] += 1 - eps
    return weights.log()


def n_permutations(n):
    if math.factorial(n) > 5040:
        raise ValueError(
            f"a mixture of permutations of {n} streams needs {n}! logits; the most is 7! = 5040. "
            "tbp and rtbp reach every doubly stochastic matrix with (n-1)^2"
        )
    return math.factorial(n)


def permutation_stacked(logits, n):
    """As `permutation`, for many streams: logits (n!, ...) -> M (n, n, ...)."""
    # torch.softmax over 5040 strided logits is off by 4e-6 on a CPU; exp and sum are not.
    weights = (logits - logits.amax(0)).exp()
    return marginals(weights / weights.sum(0), n).clamp(max=1)


def marginals(weights, n):
    """sum_k weights_k P_k: (n!, ...) -> (n, n, ...).

    In lexicographic order, the first (n-1)! permutations have the 1 of row 0 in column 0, the next
    (n-1)! have it in column 1, and so on. Without row 0 and that column, each of these groups is a
    smaller sum of the same kind.
    """
    if n == 1:
        return weights[None]
    weights = weights.unflatten(0, (n, -1))  # (n, (n-1)!, ...)
    # smaller[:, :, k] is the sum whose permutations have the 1 of row 0 in column k.
    smaller = marginals(weights.transpose(0, 1), n - 1)  # (n-1, n-1, n, ...)
    below = []  # column j of the rows below row 0
    for j in range(n):
        before = smaller[:, j - 1, :j].sum(1)  # k < j: column j is column j - 1 there
        after = smaller[:, min(j, n - 2), j + 1 :].sum(1)  # k > j: column j is column j
        below.append(before + after)  # `before` is empty for j = 0, and `after` for n - 1
    return torch.cat([weights.sum(1)[None], torch.stack(below, 1)])


# ---- kronecker -----------------------------------------------------------------------------------


def kronecker(planes, n):
    """U_K (x) ... (x) U_1 over the prime factors of n in rising order, each U a mixture of
    permutations (KromHC, 2601.21579). The last factor is the outermost, as in numpy.kron(U, M).
    """
    M = None
    for p in prime_factors(n):
        own, planes = planes[: math.factorial(p)], planes[math.factorial(p) :]
        U = permutation(own, p)
        if M is None:
            M = U
        else:
            M = [[u * m for u in u_row for m in m_row] for u_row in U for m_row in M]
    return M


def kronecker_stacked(logits, n):
    """As `kronecker`, for many streams: logits (K, ...) -> M (n, n, ...)."""
    M = torch.ones_like(logits[:1])[None]  # (1, 1, ...)
    for p in prime_factors(n):
        own, logits = logits[: math.factorial(p)], logits[math.factorial(p) :]
        U = permutation_stacked(own, p)
        M = (U[:, None, :, None] * M[None, :, None]).flatten(2, 3).flatten(0, 1)
    return M


def kronecker_inverse(M, n):
    """Factor by factor. The sum of M over the indices of all factors but one is a multiple of that
    one, since the others are doubly stochastic.
    """
    rest, size, logits = M, n, []
    product = torch.ones_like(M[..., :1, :1])
    for p in prime_factors(n):
        size //= p
        blocks = rest.unflatten(-1, (size, p)).unflatten(-3, (size, p))  # (..., size, p, size, p)
        U, rest = blocks.sum((-4, -2)) / size, blocks.sum((-3, -1)) / p
        logits.append(permutation_inverse(U, p))
        product = U[..., :, None, :, None] * product[..., None, :, None, :]
        product = product.flatten(-4, -3).flatten(-2, -1)
    error = (product - M).abs().max()
    if error > 1e-5:
        raise ValueError(
            f"M is no Kronecker product of {prime_factors(n)} (off by {error:.3g}): kronecker "
            "does not reach every doubly stochastic matrix; tbp and rtbp do"
        )
    return torch.cat(logits, -1)


def kronecker_start(n, eps):
    """Unless n is prime, the blend of mixers.py is no Kronecker product. The start is the product
    of smaller blends, one for each prime. Their common eps, found by bisection, gives the product
    the diagonal of the blend.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        diagonal = math.prod(1 - middle + middle / p for p in prime_factors(n))
        if diagonal > 1 - eps + eps / n:
            low = middle
        else:
            high = middle
    return torch.cat([permutation_start(p, low) for p in prime_factors(n)])


def n_kronecker_logits(n):
    largest = max(prime_factors(n))
    if largest > 7:
        raise ValueError(
            f"{n} has the prime factor {largest}, so kronecker needs {largest}! logits and more; "
            "the largest prime factor is 7. tbp and rtbp take any n"
        )
    return sum(n_permutations(p) for p in prime_factors(n))


def prime_factors(n):
    """In rising order: 12 -> [2, 2, 3]."""
    p = next((p for p in range(2, math.isqrt(n) + 1) if n % p == 0), n)
    return [p] + (prime_factors(n // p) if n > p else [])
