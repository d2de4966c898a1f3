"""
The training recipe again, as slowly and plainly as it can be said.

One process, float64, whole batches, no compiler, AdamW and its schedule by hand, each stream a
tensor of its own. Written from the docstrings of train.py, model.py, streams.py and data.py.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, gelu, layer_norm


def train(weights, folder, knobs, steps):
    """weights: a state dict, at the start. -> the loss, gradient norm and learning rate of each
    step, and the weights after the last."""
    p = {name: w.double().requires_grad_() for name, w in weights.items()}
    first, second = ({name: torch.zeros_like(w) for name, w in p.items()} for _ in range(2))
    lines = []
    for step in range(steps):
        loss = loss_of(p, *batch(folder, step, knobs), knobs)
        gradients = dict(zip(p, torch.autograd.grad(loss, p.values())))

        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        if norm > knobs["grad_clip"]:
            gradients = {name: g * knobs["grad_clip"] / norm for name, g in gradients.items()}

        lr, (b1, b2) = learning_rate(step, knobs), (knobs["beta1"], knobs["beta2"])
        with torch.no_grad():
            for name, g in gradients.items():
                first[name] = b1 * first[name] + (1 - b1) * g
                second[name] = b2 * second[name] + (1 - b2) * g**2
                mean = first[name] / (1 - b1 ** (step + 1))
                scale = (second[name] / (1 - b2 ** (step + 1))).sqrt() + 1e-8
                rate = lr * (knobs["connection_lr"] if ".hc_" in name else 1)
                p[name] -= rate * (decay(name, knobs) * p[name] + mean / scale)
        lines.append({"loss": loss.item(), "norm": norm, "lr": lr})
    return lines, {name: w.detach() for name, w in p.items()}


def learning_rate(step, knobs):
    peak, low = knobs["learning_rate"], knobs["min_lr"]
    warmup, end = knobs["warmup_iters"], knobs["lr_decay_iters"]
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step > end:
        return low
    return low + (peak - low) * (1 + math.cos(math.pi * (step - warmup) / (end - warmup))) / 2


def decay(name, knobs):
    """Only what multiplies activations decays: linear layers, embeddings and, if asked, phi."""
    if name.endswith(".phi"):
        return knobs["weight_decay"] * knobs["decay_phi"]
    return knobs["weight_decay"] * (name.endswith(".weight") and ".ln_" not in name)


# ---- the data ------------------------------------------------------------------------------------


def blocks(folder, split, T):
    """All blocks of T + 1 tokens, shard by shard."""
    files = sorted(Path(folder).glob(f"*{split}*.bin"))
    shards = [np.fromfile(file, "<u2", offset=1024).astype(np.int64) for file in files]
    return [x[b * T : b * T + T + 1] for x in shards for b in range((len(x) - 1) // T)]


def batch(folder, step, knobs):
    """-> idx and targets of a step, (sequences, T) each."""
    T, all_blocks = knobs["block_size"], blocks(folder, "train", knobs["block_size"])
    sequences, rows = knobs["total_batch_tokens"] // T, []
    for k in range(step * sequences, (step + 1) * sequences):
        epoch, at = divmod(k, len(all_blocks))
        draws = np.random.Philox(key=[knobs["seed"], epoch]).random_raw(len(all_blocks))
        rows.append(all_blocks[np.argsort(draws, kind="stable")[at]])
    rows = torch.from_numpy(np.stack(rows))
    return rows[:, :-1], rows[:, 1:]


def validation_loss(weights, folder, knobs):
    """Of the first eval_tokens of the validation split."""
    T = knobs["block_size"]
    rows = blocks(folder, "val", T)[: knobs["eval_tokens"] // T]
    rows = torch.from_numpy(np.stack(rows))
    weights = {name: w.double() for name, w in weights.items()}
    return loss_of(weights, rows[:, :-1], rows[:, 1:], knobs).item()


# ---- the model -----------------------------------------------------------------------------------


def loss_of(p, idx, targets, knobs):
    """The mean cross-entropy of a GPT with n streams; p: its parameters by name."""
    n, C = knobs["n_streams"], knobs["n_embd"]
    x = [p["embed.wte.weight"][idx] + p["embed.wpe.weight"]] * n  # n streams (B, T, C)
    for layer in range(knobs["n_layer"]):
        block = {k.removeprefix(f"blocks.{layer}."): w for k, w in p.items()}
        for hc, branch in (("hc_attn.", attention), ("hc_mlp.", mlp)):
            if knobs["mixer"] == "residual":
                x = [x[0] + branch(x[0], block, knobs)]
                continue
            read, write, mix = coefficients(x, block, hc, knobs)
            u = sum(read[j] * x[j] for j in range(n))
            v = branch(u, block, knobs)
            x = [sum(mix[i][j] * x[j] for j in range(n)) + write[i] * v for i in range(n)]
    x = sum(x) / n
    x = layer_norm(x, [C], p["head.ln_f.weight"], p.get("head.ln_f.bias"))
    return cross_entropy((x @ p["embed.wte.weight"].T).flatten(0, 1), targets.flatten())


def coefficients(x, block, hc, knobs):
    """-> read weights (n), write weights (n), M (n rows of n), each (B, T, 1)."""
    n = knobs["n_streams"]
    flat = torch.cat(x, -1)  # (B, T, n*C)
    z = flat @ block[hc + "phi"].T / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    z, bias, alpha = z.split(1, -1), block[hc + "bias"], block[hc + "alpha"]
    if knobs["mixer"] == "hc":
        z = [value.tanh() for value in z]
    gate = [alpha[0]] * n + [alpha[1]] * n + [alpha[2]] * (len(z) - 2 * n)
    logits = [bias[k] + gate[k] * z[k] for k in range(len(z))]
    read, write, mix = logits[:n], logits[n : 2 * n], logits[2 * n :]
    if knobs["mixer"] == "hc":
        return read, write, [mix[i * n : i * n + n] for i in range(n)]
    return [a.sigmoid() for a in read], [2 * w.sigmoid() for w in write], tbp(mix, n)


def tbp(logits, n):
    """The transportation chart, entry by entry."""
    one, logits = torch.ones_like(logits[0]), iter(logits)
    r, c, M = [one] * n, [one] * n, []
    for i in range(n - 1):
        M.append([])
        for j in range(n - 1):
            low = torch.maximum(
                0 * one, torch.maximum(r[i] - sum(c[j + 1 :]), c[j] - sum(r[i + 1 :]))
            )
            high = torch.minimum(r[i], c[j])
            M[i].append(low + (high - low) * next(logits).sigmoid())
            r[i], c[j] = r[i] - M[i][j], c[j] - M[i][j]
        M[i].append(r[i])
        c[n - 1] = c[n - 1] - r[i]
    return [*M, c]


def attention(u, block, knobs):
    B, T, C = u.shape
    H = knobs["n_head"]
    u = layer_norm(u, [C], block["ln_1.weight"], block.get("ln_1.bias"))
    u = linear(u, block, "attn.c_attn")
    q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in u.split(C, -1))
    scores = q @ k.transpose(2, 3) / math.sqrt(C // H)  # (B, H, T, T)
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    return linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C), block, "attn.c_proj")


def mlp(u, block, knobs):
    u = layer_norm(u, u.shape[-1:], block["ln_2.weight"], block.get("ln_2.bias"))
    return linear(gelu(linear(u, block, "mlp.c_fc"), approximate="tanh"), block, "mlp.c_proj")


def linear(u, block, name):
    y = u @ block[name + ".weight"].T
    return y + block[name + ".bias"] if name + ".bias" in block else y
