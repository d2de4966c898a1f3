"""
Arithmetic on planes, from which mixers are made.

A plane is a tensor of the shape of one logit: in the model (B, T), one number of each token, or
(1, 1) where coefficients are static. A matrix is a list of n rows, each a list of n planes, or one
list of n^2 planes, row by row.
"""

from functools import reduce

import torch

FEW_STREAMS = 4  # up to this many, coefficients are lists of planes; for more they are tensors


def in_rows(planes, n):
    """n^2 planes, row by row -> n rows of n planes."""
    return [list(planes[i * n : i * n + n]) for i in range(n)]


def softmax(planes):
    """Softmax over a list of planes -> a list of planes."""
    highest = reduce(torch.maximum, planes)
    weights = [(plane - highest).exp() for plane in planes]
    total = sum(weights)
    return [weight / total for weight in weights]


def transpose(M):
    """n rows of n planes -> its n columns."""
    return [list(column) for column in zip(*M)]


def transpose_planes(planes, n):
    """n^2 planes, row by row -> the same, column by column."""
    return [plane for j in range(n) for plane in planes[j::n]]
