"""The mixers again, as slowly and plainly as they can be said: one matrix at a time, in numpy,
float64 and loops."""

import itertools
import math

import numpy as np


def sigmoid(t):
    return 1 / (1 + math.exp(-t)) if t >= 0 else math.exp(t) / (1 + math.exp(t))


def point(lo, hi, t):
    return lo + (hi - lo) * sigmoid(t)


def identity(logits, n):
    return np.eye(n)


def hc(logits, n):
    return np.array(logits).reshape(n, n)


def sinkhorn(logits, n, sinkhorn_rounds=20):
    L = np.array(logits).reshape(n, n)
    M = np.exp(L - L.max())
    for _ in range(sinkhorn_rounds):
        for j in range(n):
            M[:, j] /= M[:, j].sum()
        for i in range(n):
            M[i] /= M[i].sum()
    return M


def rows(logits, n):
    M = np.exp(np.array(logits).reshape(n, n))
    for i in range(n):
        M[i] /= M[i].sum()
    return M


def columns(logits, n):
    M = np.exp(np.array(logits).reshape(n, n))
    for j in range(n):
        M[:, j] /= M[:, j].sum()
    return M


def orthogonal(logits, n):
    M, t = np.eye(n), iter(logits)
    for i in range(n):
        for j in range(i + 1, n):
            angle, rotation = next(t), np.eye(n)
            rotation[i, i] = rotation[j, j] = math.cos(angle)
            rotation[i, j], rotation[j, i] = -math.sin(angle), math.sin(angle)
            M = rotation @ M
    return M


def permutation(logits, n):
    weights = np.exp(np.array(logits) - max(logits))
    weights /= weights.sum()
    M = np.zeros((n, n))
    for weight, columns in zip(weights, itertools.permutations(range(n))):
        for i in range(n):
            M[i, columns[i]] += weight
    return M


def kronecker(logits, n):
    M, rest, used, p = np.eye(1), n, 0, 2
    while rest > 1:
        if rest % p:
            p += 1
            continue
        M = np.kron(permutation(logits[used : used + math.factorial(p)], p), M)
        used, rest = used + math.factorial(p), rest // p
    return M


def tbp(logits, n):
    """r, c: what is left of the sum of each row and column. M_ij is chosen between the least and
    the most that they allow."""
    t = iter(logits)
    r, c, M = np.ones(n), np.ones(n), np.zeros((n, n))
    for i in range(n - 1):
        for j in range(n - 1):
            lo = max(0, r[i] - c[j + 1 :].sum(), c[j] - r[i + 1 :].sum())
            hi = min(r[i], c[j])
            M[i, j] = point(lo, hi, next(t))
            r[i] -= M[i, j]
            c[j] -= M[i, j]
        M[i, n - 1] = r[i]
        c[n - 1] -= r[i]
    M[n - 1] = c
    return M


def rtbp(logits, n):
    """solve(r, c): the matrix with these sums of rows and columns. spread: mass over lines, none of
    which takes more than its w."""
    t = iter(logits)

    def choose(lo, hi):
        return point(lo, hi, next(t))

    def spread(mass, w):
        if len(w) == 1:
            return [mass]
        left, right = w[: len(w) // 2], w[len(w) // 2 :]
        m = choose(max(0, mass - sum(right)), min(mass, sum(left)))
        return spread(m, left) + spread(mass - m, right)

    def solve(r, c):
        n = len(r)
        r, c = np.array(r), np.array(c)
        if n == 1:
            return np.array([[r[0]]])
        if n == 2:
            m = choose(max(0, r[0] - c[1]), min(r[0], c[0]))
            return np.array([[m, r[0] - m], [c[0] - m, r[1] - c[0] + m]])
        if n % 2:
            corner = choose(max(0, r[-1] - c[:-1].sum()), min(r[-1], c[-1]))
            column = np.array(spread(c[-1] - corner, list(r[:-1])))
            row = np.array(spread(r[-1] - corner, list(c[:-1])))
            return np.block(
                [
                    [solve(r[:-1] - column, c[:-1] - row), column[:, None]],
                    [row[None], np.array([[corner]])],
                ]
            )
        h = n // 2
        R1, C1, C2 = r[:h].sum(), c[:h].sum(), c[h:].sum()
        m11 = choose(max(0, R1 - C2), min(R1, C1))
        a = np.array(spread(m11, list(r[:h])))
        g = np.array(spread(C1 - m11, list(r[h:])))
        u = np.array(spread(m11, list(c[:h])))
        s = np.array(spread(R1 - m11, list(c[h:])))
        upper = [solve(a, u), solve(r[:h] - a, s)]
        return np.block([upper, [solve(g, c[:h] - u), solve(r[h:] - g, c[h:] - s)]])

    return solve(np.ones(n), np.ones(n))


ORACLES = {
    "residual": identity,
    "identity": identity,
    "hc": hc,
    "rows": rows,
    "columns": columns,
    "orthogonal": orthogonal,
    "sinkhorn": sinkhorn,
    "permutation": permutation,
    "kronecker": kronecker,
    "tbp": tbp,
    "rtbp": rtbp,
}
