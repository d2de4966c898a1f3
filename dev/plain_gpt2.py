"""A GPT-2 as nanoGPT has it, without any notion of streams: a yardstick for the residual model."""

import torch
from torch import nn
from torch.nn import functional as F

from model import GPT


class PlainBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inside, bias = config.n_embd, config.n_mlp or 4 * config.n_embd, config.bias
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.c_fc = nn.Linear(width, inside, bias=bias)
        self.c_out = nn.Linear(inside, width, bias=bias)

    def forward(self, x):  # (B, T, C)
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(C, -1)
        q, k, v = (h.view(B, T, self.n_head, -1).transpose(1, 2) for h in (q, k, v))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class PlainHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, x, wte, targets):
        logits = F.linear(self.ln_f(x), wte)  # (B, T, V)
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class PlainGPT2(nn.Module):
    """Takes a model.GPTConfig and uses only its sizes; there is no dropout."""

    compile_regions = GPT.compile_regions  # the same settings, whatever they are

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.head = PlainHead(config)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, 0, 0.02)

    def forward(self, idx, targets):
        """idx, targets (B, T) -> logits (B, T, V), the mean cross-entropy."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        if torch.is_autocast_enabled(idx.device.type):
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        for block in self.blocks:
            x = block(x)
        return self.head(x, self.wte.weight, targets)
