"""
The two branches of a block, as in GPT-2: attention over the tokens, and an MLP for each token.

A branch maps (B, T, C) to (B, T, C) and knows nothing of streams.
"""

from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, -1)
        q, k, v = (h.view(B, T, self.n_head, -1).transpose(1, 2) for h in (q, k, v))  # (B, H, T, D)
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            y = cache.attend(q, k, v)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        inside = config.n_mlp or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inside, bias=config.bias)
        self.c_proj = nn.Linear(inside, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)
