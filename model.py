"""
A GPT whose residual state is n parallel streams (B, T, n, C), mixed at every sublayer; see mixers.py for the mixing.

GPT-2's architecture otherwise: learned positions, pre-LayerNorm, GELU, tied head. With the same seed, a model with any
mixer computes at the start what the plain one-stream model (mixer='residual') computes.

    model = GPT(GPTConfig(mixer="tbp", n_streams=4))
    logits, loss = model(idx, targets)
    model.compile_regions()                      # in place: state-dict keys stay clean
"""
import math
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import nn
from torch.nn import functional as F

from mixers import HyperConnection, mean_square, mixer_options, n_logits


@dataclass
class GPTConfig:
    block_size: int = 1024          # the longest sequence, in tokens
    vocab_size: int = 50304         # GPT-2's 50257, rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768               # C, channels of one stream
    dropout: float = 0.0
    bias: bool = True               # in linear layers and layer norms
    mixer: str = "tbp"              # a name of mixers.MIXERS
    n_streams: int = 4              # n; 1 for the residual mixer
    dynamic: bool = True            # coefficients depend on the token; False: parameters of the layer
    interval_map: str = "plain"     # tbp and rtbp: 'plain' or 'scaled'
    sinkhorn_rounds: int = 20       # sinkhorn: column and row normalisations
    mix_start: float = 0.01         # M starts as (1 - mix_start) I + mix_start / n
    read_start: float = 0.7         # weight of the stream that a sublayer reads most, at the start
    stream_dtype: str = "auto"      # of the residual state: auto (autocast's, else float32), float32 or bfloat16

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; "
                             f"nearest that is: {self.n_embd // self.n_head * self.n_head or self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.stream_dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"stream_dtype must be auto, float32 or bfloat16, not {self.stream_dtype!r}")
        n_logits(self.mixer, self.n_streams)    # refuses an unknown mixer, and an n where it is not defined

    def hyper_connection(self, layer):
        options = {name: getattr(self, name) for name in mixer_options(self.mixer)}
        return HyperConnection(self.mixer, self.n_streams, self.n_embd, layer=layer, dynamic=self.dynamic,
                               mix_start=self.mix_start, read_start=self.read_start, **options)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (h.view(B, T, self.n_head, -1).transpose(1, 2) for h in self.c_attn(x).split(C, -1))   # (B, H, T, C/H)
        if cache is not None:
            k, v = cache.append(k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd, bias=config.bias), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd, bias=config.bias), MLP(config)
        self.hc_attn = config.hyper_connection(2 * layer)
        self.hc_mlp = config.hyper_connection(2 * layer + 1)

    def sublayers(self, cache=None):
        """(hyper-connection, branch) of the attention and of the MLP."""
        return ((self.hc_attn, lambda u: self.attn(self.ln_1(u), cache)), (self.hc_mlp, lambda u: self.mlp(self.ln_2(u))))

    def forward(self, x, square, cache=None):
        for hyper_connection, branch in self.sublayers(cache):
            x, square = hyper_connection(x, square, branch)                                 # (B, T, n, C), (B, T)
        return x, square


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_streams, self.dropout, self.stream_dtype = config.n_streams, config.dropout, config.stream_dtype
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, idx, start=0):
        """Tokens (B, T) at positions start, start + 1, ... -> streams (B, T, n, C), all equal, and their mean_square."""
        positions = torch.arange(start, start + idx.shape[1], device=idx.device)
        x = F.dropout(self.wte(idx) + self.wpe(positions), self.dropout, self.training)    # (B, T, C)
        if self.stream_dtype != "auto":
            x = x.to(getattr(torch, self.stream_dtype))
        elif torch.is_autocast_enabled(idx.device.type):
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        x = x[:, :, None]
        return x.repeat(1, 1, self.n_streams, 1), mean_square(x)


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, x, wte, targets=None):
        """Streams (B, T, n, C), the tied embedding (V, C), targets (B, T) or None -> logits (B, T, V), mean loss."""
        logits = F.linear(self.ln_f(x.mean(2)), wte)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.head = Head(config)
        self.init_parameters()

    def forward(self, idx, targets=None):
        """idx, targets (B, T) integers -> logits (B, T, V) and the mean cross-entropy (None without targets)."""
        if idx.shape[1] > self.config.block_size:
            raise ValueError(f"{idx.shape[1]} tokens are more than block_size {self.config.block_size}")
        x, square = self.embed(idx)                                                         # (B, T, n, C), (B, T)
        for block in self.blocks:
            x, square = block(x, square)
        return self.head(x, self.embed.wte.weight, targets)

    @torch.no_grad()
    def mixing_matrices(self, idx):
        """The M of every sublayer, averaged over the tokens idx (B, T): 2 n_layer matrices (n, n). Runs eagerly."""
        (x, square), matrices = self.embed(idx), []
        for block in self.blocks:
            for hyper_connection, branch in block.sublayers():
                matrices.append(hyper_connection.matrices(x, square).mean((0, 1)))
                x, square = hyper_connection(x, square, branch)
        return matrices

    def compile_regions(self, activation_memory_budget=1.0):
        """Compile each block and the head in place: one graph a region, compiled once however deep the model is.

        The embedding stays eager: its backward scatters, which compiled code does in no fixed order.
        activation_memory_budget: the share of what the backward needs that is kept rather than computed again.
        """
        torch._functorch.config.activation_memory_budget = activation_memory_budget
        for region in (*self.blocks, self.head):
            region.compile(fullgraph=True, dynamic=False)

    @torch.no_grad()
    def init_parameters(self):
        """GPT-2's initialisation; the only place where a parameter gets its first value."""
        reached = set()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes_to_stream = name.endswith("c_proj")
                module.weight.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer) if writes_to_stream else 0.02)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.02)
            elif isinstance(module, (nn.LayerNorm, HyperConnection)):
                module.reset_parameters()
            else:
                continue
            reached |= {id(p) for p in module.parameters(recurse=False)}
        missed = [name for name, p in self.named_parameters() if id(p) not in reached]
        if missed:
            raise RuntimeError(f"init_parameters does not know how to start {missed}")

    def parameter_groups(self, weight_decay):
        """Optimizer groups by role, the same rule for every mixer: what multiplies activations decays (linear layers,
        embeddings, phi); what shifts or scales them does not (norms, biases, the gates alpha and the mixer biases)."""
        roles = {(nn.Linear, "weight"): "decay", (nn.Linear, "bias"): "keep", (nn.Embedding, "weight"): "decay",
                 (nn.LayerNorm, "weight"): "keep", (nn.LayerNorm, "bias"): "keep", (HyperConnection, "phi"): "decay",
                 (HyperConnection, "alpha"): "keep", (HyperConnection, "bias"): "keep"}
        groups = {"decay": [], "keep": []}
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                groups[roles[type(module), name]].append(parameter)         # a KeyError here: give the parameter a role
        assert sorted(map(id, sum(groups.values(), []))) == sorted(map(id, self.parameters())), "groups must partition"
        return [{"params": groups["decay"], "weight_decay": weight_decay}, {"params": groups["keep"], "weight_decay": 0.0}]

    def parameter_counts(self):
        """Parameters by part: embedding, branches, hyper_connections, and their total."""
        hyper = sum(p.numel() for m in self.modules() if isinstance(m, HyperConnection) for p in m.parameters())
        embedding, total = (sum(p.numel() for p in m.parameters()) for m in (self.embed, self))
        return {"embedding": embedding, "branches": total - embedding - hyper, "hyper_connections": hyper, "total": total}

    def flops_per_token(self):
        """Floating-point operations of a training step (forward and backward) per token, hyper-connections included.

        6 for each weight that multiplies (PaLM, appendix B), 12 L C T for attention; of a hyper-connection, 6 for each
        weight of phi, and 3 times the forward's 2nC for the read, 2n^2 C for the mix and 2nC for the write.
        """
        c = self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear)) + self.embed.wte.weight.numel()
        phis = sum(m.phi.numel() for m in self.modules() if isinstance(m, HyperConnection) and m.dynamic)
        n, mixed = c.n_streams, c.mixer != "residual"
        streams = 2 * c.n_layer * 3 * 2 * c.n_embd * (2 * n + (n * n if n_logits(c.mixer, n) else 0)) if mixed else 0
        return 6 * (weights + phis) + 12 * c.n_layer * c.n_embd * c.block_size + streams

    def load_gpt2(self, state):
        """Copy OpenAI's GPT-2 weights, under the names that Hugging Face gives them, into the branches and embeddings.

        Any mixer will do: at the start the n-stream model computes what GPT-2 computes. ValueError where a shape does
        not fit. Positions beyond block_size are dropped; tokens beyond GPT-2's 50257 keep their own start.
        """
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        own = dict(self.named_parameters())
        for name, parameter in own.items():
            if ".hc_" in name:
                continue
            theirs = name.replace("embed.", "").replace("blocks.", "h.").replace("head.", "")
            if theirs not in state:
                raise ValueError(f"the GPT-2 weights have no {theirs} for {name}; does n_layer {self.config.n_layer} fit?")
            tensor = state[theirs]
            if theirs == "wpe.weight" and len(tensor) < len(parameter):
                raise ValueError(f"block_size {len(parameter)} is longer than the {len(tensor)} positions of the GPT-2 weights")
            if theirs.startswith("h.") and tensor.ndim == 2:
                tensor = tensor.t()                                     # GPT-2's linear layers are stored (in, out)
            rows = min(len(tensor), len(parameter)) if name.startswith("embed.") else len(parameter)
            if tensor[:rows].shape != parameter[:rows].shape or len(tensor) != rows != len(parameter):
                raise ValueError(f"{name} has shape {tuple(parameter.shape)}, GPT-2's {theirs} has {tuple(tensor.shape)}")
            with torch.no_grad():
                parameter[:rows] = tensor[:rows]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, n_vocab=None, generator=None):
        """Continue idx (B, T) by max_new_tokens, (B, T + max_new_tokens), with a cache of keys and values.

        temperature 0 takes the likeliest token. top_k keeps the k likeliest tokens, top_p the likeliest that together
        hold p of the probability; n_vocab leaves out the padding of the vocabulary. When block_size positions are
        full, the last half of them becomes the new beginning.
        """
        size, context = self.config.block_size, idx[:, -self.config.block_size:]
        caches, used = None, size
        for _ in range(max_new_tokens):
            if caches is None or used + context.shape[1] > size:
                context = idx[:, -size:] if caches is None else idx[:, -max(1, size // 2):]
                caches, used = [KeyValueCache() for _ in self.blocks], 0
            x, square = self.embed(context, used)
            for block, cache in zip(self.blocks, caches):
                x, square = block.forward(x, square, cache)     # not compiled: that would be a graph for each length
            used += context.shape[1]
            logits = self.head.forward(x[:, -1:], self.embed.wte.weight)[0][:, 0, :n_vocab]     # (B, V)
            context = sample_token(logits, temperature, top_k, top_p, generator)            # (B, 1)
            idx = torch.cat([idx, context], 1)
        return idx


class KeyValueCache:
    """Keys and values (B, H, T, C/H) of the tokens so far, of one layer."""

    def __init__(self):
        self.k = self.v = None

    def append(self, k, v):
        self.k, self.v = (k, v) if self.k is None else (torch.cat([self.k, k], 2), torch.cat([self.v, v], 2))
        return self.k, self.v


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Logits (B, V) -> a token each, (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ranked, order = probabilities.sort(-1, descending=True)
        ranked[:, 1:][(ranked.cumsum(-1) - ranked)[:, 1:] >= top_p] = 0     # the likeliest token always stays
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ranked)
    return torch.multinomial(probabilities, 1, generator=generator)
