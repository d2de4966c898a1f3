"""
torch.compile on this machine: does it work, and is its code right?

    compiler.prepare(compile)                    # compile: the script's knob
    with compiler.on_trial(dtype, loss_and_gradients, model, sample, autocast):
        model.compile_regions()

Where a script ends with an error, runtime.run_script says whether the machine is the cause.
"""

import contextlib
import importlib
import os
import sys
from pathlib import Path

import filelock  # which torch brings
import torch

from runtime import RunError, ranks, why_not_compiled

# Versions that the tests of compiled code pass on: `make test-torch TORCH=2.11.0`.
TESTED_TORCH = ("2.11", "2.12", "2.13")


# ---- does it work? -------------------------------------------------------------------------------


def prepare(compile):
    """Called first, whether the script compiles (compile = True) or runs eagerly. Raises RunError
    for a machine that cannot compile, if that can be seen at once.

    The compiler locks files of its cache. Where the system has no locks, filelock takes a file that
    exists for a lock that is held, and another process may have left such a file behind.
    """
    if not compile:
        # Even then torch makes the folder of the compiler's cache, and fails where it cannot. So
        # the cache is said to be in a folder that exists. Nothing is written there.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(__file__).parent)
        return
    if filelock.FileLock is filelock.SoftFileLock:
        raise RunError(
            "torch.compile does not work here: this Python cannot lock files (it has no fcntl), "
            "so the compiler could wait for ever. Do without: --compile=False"
        )
    try:
        importlib.import_module("torch._dynamo")  # makes the folder of the cache
    except OSError as error:
        raise RunError(why_not_compiled(error)) from error


# ---- is it right? --------------------------------------------------------------------------------


def torch_is_tested():
    """Whether the tests pass on this version of torch."""
    return ".".join(torch.__version__.split(".")[:2]) in TESTED_TORCH


def differences(wanted, found, tolerance):
    """The names of the tensors that differ between `wanted` and `found`, the worst first.

    A tensor differs where |found - wanted| > tolerance * (|wanted| + 0.01 * the largest norm). The
    second term is for tensors so small beside the others that they are mostly rounding.
    """
    norms = {name: tensor.float().norm().item() for name, tensor in wanted.items()}
    floor = 0.01 * max(norms.values())
    off = {}
    for name, norm in norms.items():
        error = (found[name] - wanted[name]).float().norm().item()
        off[name] = error / (tolerance * (norm + floor))
    wrong = [name for name in off if not off[name] <= 1]  # so that NaN is wrong
    return sorted(wrong, key=off.get, reverse=True)


@contextlib.contextmanager
def on_trial(dtype, compute, *arguments):
    """A context for the statement that compiles a model. On a version of torch that the tests do
    not know, results of the compiled model are compared with those of the eager one.

    compute(*arguments) -> {name: tensor} is called before the statement and after it. dtype: of the
    activations. Raises RunError where the results differ; it names the worst.

    The tolerance of `differences` is 1e-3, and 0.2 in 16 bits, where eager and compiled code round
    at different places.
    """
    if torch_is_tested():
        yield
        return
    wanted = compute(*arguments)
    yield
    found = compute(*arguments)
    tolerance, why = 1e-3, ""
    if dtype != torch.float32:
        tolerance, why = 0.2, ", wide since activations are rounded to 16 bits"
    wrong = differences(wanted, found, tolerance)
    if wrong:
        raise RunError(
            f"torch {torch.__version__} compiles this model wrongly: {wrong[0]} (and "
            f"{len(wrong) - 1} more) is not what the eager model computes (tolerance: {tolerance} "
            f"of its norm{why}). Use --compile=False, or a torch that the tests know: "
            f"{', '.join(TESTED_TORCH)}"
        )
    if ranks()[0] == 0:  # on stderr, for stdout may be a file of samples or a table
        line = f"torch {torch.__version__} is untested; compiled, it computes what eager code does"
        print(line, file=sys.stderr, flush=True)


def loss_and_gradients(model, sample, autocast):
    """{name: tensor} of the loss and of each parameter's gradient, without dropout.

    sample: the model's arguments, here some sequences and their targets. autocast: the context in
    which the model computes.
    """
    model.eval()
    with autocast:
        loss = model(*sample)[1]
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        # No gradient at all counts as one of zeros.
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.zero_grad(set_to_none=True)
    model.train()
    return found


@torch.no_grad()
def logits_and_loss(model, sample, autocast):
    """As loss_and_gradients, for a model that is not trained: {"logits": (B, T, V), "loss": ()}."""
    with autocast:
        logits, loss = model(*sample)
    return {"logits": logits, "loss": loss}
