"""
A trained model with another mixer.

    >>> new, off = with_mixer(model, "rtbp", None, {})
    >>> left_out = drop_misleading_rows(model, new, idx)
    >>> report_differences(model, new, idx, targets)                  # lines of text

From n streams:
* The biases of the mix become those at which the other mixer gives the same M, by its inverse. So
  every M is the same before a token adds to it. Where the other mixer does not reach M, the nearest
  M that it reaches is taken, and `with_mixer` returns how far off it is.
* What a token adds to M has no exact counterpart. The rows of phi are multiplied by the derivative
  of the new logits with respect to the old ones, taken at the biases: the new M is the old one to
  first order in what the token adds. Where M is almost out of the other mixer's reach, a small step
  of M is a large step of the logits, and first order is not enough. These rows of phi are set to 0
  in each sublayer where that brings the new M, on average, nearer to the old one.
* Reads, writes, their gates, scales of M and everything else are copied.
From one stream: the streams start as equal copies, and the new model computes the same function.
"""

from dataclasses import replace
from functools import partial

import torch

from data import TokenBlocks
from mixers import find_mixer, mixing_logits, mixing_matrix, start_logits
from model import GPT
from streams import HyperConnection
from tokenizer import same_tokens, tokenizer_name

AT_ONCE = 1024  # tokens in a batch on which the models are compared


def with_mixer(old, mixer, n_streams, options):
    """The model `old` with another mixer -> the new model, and {sublayer: how far an entry of its M
    is off at the biases, at most}; {} where `old` has one stream. Raises ValueError."""
    config = old.config
    from_one = find_mixer(config.mixer).one_stream
    if find_mixer(mixer).one_stream:
        raise ValueError(f"{mixer} has one stream, and n streams do not fit into one; name another")
    if config.x0_scalars:
        raise ValueError("a model with x0_scalars has no counterpart with n streams")
    if from_one and config.mix_scale != "none":
        raise ValueError(
            f"one stream with mix_scale={config.mix_scale!r} has no counterpart with n streams"
        )
    if from_one and not n_streams:
        raise ValueError("the model has one stream: pass --n_streams=4, or another number")
    if not from_one and n_streams not in (None, config.n_streams):
        raise ValueError(f"n_streams stays {config.n_streams}: leave --n_streams={n_streams} out")

    gates = config.gates
    if not from_one:  # "auto" would follow the mixer, and so change the reads and writes
        gates = next(m.gates for m in old.modules() if isinstance(m, HyperConnection))
    changes = dict(mixer=mixer, n_streams=n_streams or config.n_streams, gates=gates)
    new = GPT(replace(config, **changes, options=options)).eval()
    same = {name: tensor for name, tensor in old.state_dict().items() if ".hc_" not in name}
    new.load_state_dict(same, strict=False)  # all but the hyper-connections
    off = {}
    for name, module in new.named_modules():
        if isinstance(module, HyperConnection) and not from_one:
            off[name] = translate(old.get_submodule(name), module)
    return new, off


@torch.no_grad()
def translate(old, new):
    """Give the HyperConnection `new` the parameters of `old`, through the inverse of its mixer.

    -> the largest absolute error of an entry of M at the biases.
    """
    n, K_old, K_new = old.n_streams, old.n_mixer_logits, new.n_mixer_logits
    parts = [2 * n, K_old, len(old.bias) - 2 * n - K_old]  # reads and writes, mix, scales of M
    gates, logits, scales = old.bias.double().split(parts)
    M = mixing_matrix(old.mixer, logits, n, **old.options)
    nearest = reach(new.mixer, M, new.mix_start, **new.options)
    new.bias.copy_(torch.cat([gates, nearest, scales]))
    if old.dynamic:
        to_M = jacobian(new.mixer, nearest, n, new.options)  # (n^2, K_new)
        from_M = torch.linalg.pinv(to_M, rtol=1e-6)  # (K_new, n^2)
        change = from_M @ jacobian(old.mixer, logits, n, old.options)  # (K_new, K_old)
        gates, mix, scales = old.phi.double().split(parts)
        new.phi.copy_(torch.cat([gates, change @ mix, scales]))
        new.alpha.copy_(old.alpha)
    logits = new.bias[2 * n : 2 * n + K_new].double()  # as they are stored
    return (mixing_matrix(new.mixer, logits, n, **new.options) - M).abs().max().item()


def jacobian(mixer, logits, n, options):
    """dM / dlogits, (n^2, K)."""
    if not len(logits):
        return logits.new_zeros(n * n, 0)
    matrix = partial(mixing_matrix, mixer, n_streams=n, **options)
    with torch.enable_grad():
        return torch.autograd.functional.jacobian(matrix, logits).flatten(0, 1)


def reach(mixer, M, mix_start, **options):
    """-> the logits (K,) at which the mixer gives M (n, n), or the nearest matrix it can give."""
    n = len(M)
    try:
        logits = mixing_logits(mixer, M, **options)
        if (mixing_matrix(mixer, logits, n, **options) - M).abs().max() < 1e-6:
            return logits
    except ValueError:  # no logits give this M, or no inverse is known
        pass
    return nearest_logits(mixer, M, mix_start, **options)


def nearest_logits(mixer, M, mix_start, **options):
    """The logits with the least sum of squared differences from M, by a search from the start."""
    logits = start_logits(mixer, len(M), mix_start, **options).double()
    if not len(logits):
        return logits
    logits.requires_grad_()
    search = torch.optim.LBFGS(
        [logits],
        max_iter=300,
        tolerance_grad=1e-10,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def distance():
        search.zero_grad()
        squares = (mixing_matrix(mixer, logits, len(M), **options) - M).square().sum()
        squares.backward()
        return squares

    with torch.enable_grad():
        search.step(distance)
    return logits.detach()


def matrices(old, new, idx):
    """Yields (sublayer, M of the old model, M of the new one), each M (B, T, n, n). The streams are
    those of the old model, for both."""
    streams = old.embed(idx)
    x0 = streams.x
    for layer, block in enumerate(old.blocks):
        streams = block.enter(streams, x0)
        for part, connection, branch in block.connections():
            name = f"blocks.{layer}.{part}"
            if isinstance(connection, HyperConnection):
                other = new.get_submodule(name)
                yield name, connection.observe(streams)[2], other.observe(streams)[2]
            streams = connection(streams, branch)


def sequences(block_size, tokenizer, n_vocab, data, tokens):
    """-> idx (B, T), on which the models are compared, and targets (None with random tokens).

    tokens              how many there should be; it is at least one sequence
    data                the folder of a data set: from its validation split. None: random tokens
    tokenizer, n_vocab  of the checkpoint
    Raises ValueError for a data set of another tokenizer.
    """
    count = max(1, tokens // block_size)
    if not data:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(n_vocab, (count, block_size), generator=generator), None
    blocks = TokenBlocks(data, "val", block_size)
    if not same_tokens(blocks.meta["tokenizer"], tokenizer):
        raise ValueError(
            f"{data} has tokens of {tokenizer_name(blocks.meta['tokenizer'])}, and the "
            f"checkpoint is of {tokenizer_name(tokenizer)}; name another --data"
        )
    return blocks.in_order(0, min(count, blocks.n_blocks))


@torch.no_grad()
def drop_misleading_rows(old, new, idx):
    """Set the mix's rows of phi to 0 in each sublayer whose M is nearer to the old one without
    them, on average over the first tokens of idx. -> the names of these sublayers."""
    some = idx[: max(1, AT_ONCE // idx.shape[1])]
    mapped = mean_differences(old, new, some)
    rows = {name: rows_of_mix(new.get_submodule(name)) for name in mapped}  # views of phi
    kept = {name: view.clone() for name, view in rows.items()}
    for view in rows.values():
        view.zero_()
    without = mean_differences(old, new, some)
    left_out = [name for name in mapped if without[name] < mapped[name]]
    for name in mapped.keys() - set(left_out):
        rows[name].copy_(kept[name])
    return left_out


def rows_of_mix(hc):
    """A view of the rows of a HyperConnection's phi that belong to its mixer's logits."""
    return hc.phi.data[2 * hc.n_streams : 2 * hc.n_streams + hc.n_mixer_logits]


def mean_differences(old, new, idx):
    """{sublayer: the mean absolute difference of the entries of M}."""
    return {
        name: (after - before).abs().mean().item()
        for name, before, after in matrices(old, new, idx)
    }


@torch.no_grad()
def report_differences(old, new, idx, targets):
    """Lines on how far the new model is from the old one, on idx and targets (B, T) or None."""
    goals = idx if targets is None else targets
    at_once = max(1, AT_ONCE // idx.shape[1])
    losses, logits_off = torch.zeros(2), 0.0
    mean_off, most_off = {}, {}  # by sublayer
    moved = 0.0  # how much M varies between tokens, summed over the sublayers
    for some, goal in zip(idx.split(at_once), goals.split(at_once)):
        share = len(some) / len(idx)  # of the means
        (theirs, old_loss), (ours, new_loss) = old(some, goal), new(some, goal)
        losses += share * torch.stack([old_loss, new_loss])
        logits_off = max(logits_off, (ours - theirs).abs().max().item())
        for name, before, after in matrices(old, new, some):
            off = (after - before).abs()
            mean_off[name] = mean_off.get(name, 0.0) + share * off.mean().item()
            most_off[name] = max(most_off.get(name, 0.0), off.max().item())
            moved += share * (before - before.mean((0, 1))).abs().mean().item()

    source = "random tokens" if targets is None else "tokens of the validation split"
    lines = [f"measured on {idx.numel():,} {source}:"]
    if mean_off:
        worst, sublayers = max(most_off, key=most_off.get), len(mean_off)
        lines.append(
            f"  an entry of M is off by {sum(mean_off.values()) / sublayers:.2g} on average, by "
            f"{most_off[worst]:.2g} at most ({worst}); between tokens it varies by "
            f"{moved / sublayers:.2g}"
        )
    lines.append(f"  logits are off by {logits_off:.2g} at most")
    if targets is not None:
        before, after = losses.tolist()
        lines.append(f"  loss {before:.4f} -> {after:.4f} ({after - before:+.4f})")
    return lines
