"""
A GPT whose residual state is n parallel streams (B, T, n, C); streams.py says how they are mixed.

GPT-2's architecture otherwise: learned positions, LayerNorm before each branch, GELU, tied head.
With the same seed, a model with any mixer computes at the start what the plain one-stream model
(mixer="residual") computes, to float32 rounding.

    model = GPT(GPTConfig(mixer="tbp", n_streams=4))
    logits, loss = model(idx, targets)
    model.compile_regions()                      # in place: state-dict keys stay as they are
"""

import math
from dataclasses import dataclass, field, fields
from functools import partial
from typing import NamedTuple

import torch
import torch._functorch.config
from torch import nn
from torch.nn import functional as F

from branches import MLP, Attention
from coefficients import Coefficients
from compile_options import compiler_options
from mixers import check_options, find_mixer, n_logits
from passes import mean_square
from streams import (
    HyperConnection,
    ReadOut,
    Residual,
    ScaledResidual,
    Streams,
    check_choice,
    check_connection,
    start_streams,
)

# Fields of GPTConfig that must stay at their defaults with one stream. mix_start and read_start
# have no effect there either, and any value that a HyperConnection takes is allowed: files of a
# study set them for all its arms.
OF_STREAMS = ("gates", "sees", "wraps", "stream_start", "readout")


@dataclass
class GPTConfig:
    block_size: int = 1024  # the longest sequence, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # C, channels of one stream
    n_mlp: int = 0  # channels inside the MLP; 0: 4 * n_embd
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms
    mixer: str = "tbp"  # a name of mixers.MIXERS
    n_streams: int = 4  # n; 1 for the residual mixer
    dynamic: bool = True  # coefficients depend on the token; False: parameters of the sublayer
    gates: str = "auto"  # reads and writes: bounded, exp (writes), free, or auto (free for hc)
    sees: str = "streams"  # what a, w and M see: streams, or input (needs a learned readout)
    wraps: str = "sublayer"  # a hyper-connection is around: sublayer, or block (both sublayers)
    mix_scale: str = "none"  # learned factors of M: none, sublayer (one), stream (one a row)
    mix_start: float = 0.01  # eps: M starts as (1 - eps) I + (eps / n) 11^T, in most mixers
    alpha_start: float = 0.01  # factor, at the start, of what a token adds to the logits
    read_start: float = 0.7  # weight of the stream that a sublayer reads most, at the start
    embed_scale: float = 1.0  # a factor of the embedding on its way into the streams
    stream_start: str = "equal"  # equal copies, or learned: plus a vector a stream, 0 at the start
    readout: str = "mean"  # what the head reads: the mean of the streams, or a learned sum
    x0_scalars: bool = False  # residual only: each block starts from r x + s x0, r and s learned
    stream_dtype: str = "auto"  # of the streams: auto (autocast's, else float32), float32, bfloat16
    options: dict = field(default_factory=dict)  # the mixer's own, see its entry in MIXERS

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.embed_scale > 0:
            raise ValueError(f"embed_scale must be above 0, not {self.embed_scale}")
        if self.n_mlp < 0:
            raise ValueError(f"n_mlp must be at least 0, not {self.n_mlp}; 0 means 4 * n_embd")
        if self.n_embd % self.n_head:
            nearest = self.n_embd // self.n_head * self.n_head or self.n_head
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; change either; "
                f"the nearest n_embd that is: {nearest}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        check_choice("stream_dtype", self.stream_dtype, ("auto", "float32", "bfloat16"))
        check_choice("stream_start", self.stream_start, ("equal", "learned"))
        check_choice("readout", self.readout, ("mean", "learned"))
        check_choice("wraps", self.wraps, ("sublayer", "block"))
        check_connection(
            alpha_start=self.alpha_start,
            mix_start=self.mix_start,
            read_start=self.read_start,
            gates=self.gates,
            mix_scale=self.mix_scale,
            sees=self.sees,
        )
        n_logits(self.mixer, self.n_streams)  # ValueError for an unknown mixer, or its n
        check_options(self.mixer, self.options)
        if find_mixer(self.mixer).one_stream:
            self.refuse_knobs_of_streams()
        elif self.x0_scalars:
            raise ValueError(f"x0_scalars are for the residual mixer, not for {self.mixer}")
        if self.sees == "input" and self.readout != "learned":
            raise ValueError(
                "with sees='input' the last sublayer learns what the head reads: readout must be "
                f"'learned', not {self.readout!r}"
            )

    def refuse_knobs_of_streams(self):
        """ValueError where knobs that mean nothing for one stream are not at their defaults."""
        wrong = [
            f"{knob.name} must be {knob.default!r}, not {getattr(self, knob.name)!r}"
            for knob in fields(self)
            if knob.name in OF_STREAMS and getattr(self, knob.name) != knob.default
        ]
        if wrong:
            raise ValueError(f"{self.mixer} has one stream, so {', and '.join(wrong)}")
        if self.mix_scale == "stream":
            raise ValueError(
                f"{self.mixer} has one stream, so mix_scale must be 'none' or 'sublayer', "
                "not 'stream'"
            )


def make_connection(config, sublayer, last=False):
    """The module around a sublayer (or a block): Residual, ScaledResidual or HyperConnection."""
    if find_mixer(config.mixer).one_stream:
        if config.mix_scale == "none":
            return Residual()
        return ScaledResidual(config.n_embd, dynamic=config.dynamic, alpha_start=config.alpha_start)
    return HyperConnection(
        config.mixer,
        config.n_streams,
        config.n_embd,
        sublayer=sublayer,
        dynamic=config.dynamic,
        alpha_start=config.alpha_start,
        mix_start=config.mix_start,
        read_start=config.read_start,
        gates=config.gates,
        sees=config.sees,
        last=last,
        mix_scale=config.mix_scale,
        **config.options,
    )


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        last = layer == config.n_layer - 1
        self.wraps_block = config.wraps == "block"
        if self.wraps_block:
            self.hc_block = make_connection(config, layer, last)
        else:
            self.hc_attn = make_connection(config, 2 * layer)
            self.hc_mlp = make_connection(config, 2 * layer + 1, last)
        self.x0_scalars = nn.Parameter(torch.empty(2)) if config.x0_scalars else None

    def connections(self, cache=None):
        """(name, connection, branch) of the attention and of the MLP, or of both in one."""
        if self.wraps_block:
            return (("hc_block", self.hc_block, partial(self.both, cache=cache)),)
        return (
            ("hc_attn", self.hc_attn, partial(self.attend, cache=cache)),
            ("hc_mlp", self.hc_mlp, self.feed_forward),
        )

    def attend(self, u, cache=None):
        return self.attn(self.ln_1(u), cache)

    def feed_forward(self, u):
        return self.mlp(self.ln_2(u))

    def both(self, u, cache=None):
        """Attention and MLP as one branch: what a plain block adds to u."""
        attended = self.attend(u, cache)
        return attended + self.feed_forward(u + attended)

    def enter(self, streams, x0):
        """What the first sublayer gets: with x0_scalars r x + s x0, else the streams themselves."""
        if self.x0_scalars is None:
            return streams
        r, s = self.x0_scalars.unbind(0)
        return Streams((r * streams.x + s * x0).to(x0.dtype), None)  # one stream: no mean square

    def forward(self, streams, x0, cache=None):
        """streams, and x0 (B, T, n, C), the streams at the start of the model -> streams."""
        streams = self.enter(streams, x0)
        for _, hyper_connection, branch in self.connections(cache):
            streams = hyper_connection(streams, branch)
        return streams


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_streams, self.dropout = config.n_streams, config.dropout
        self.dynamic = config.dynamic and not find_mixer(config.mixer).one_stream
        self.sees, self.scale = config.sees, config.embed_scale
        self.stream_dtype = config.stream_dtype
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.offsets = None  # (n, C), added to the copies
        if config.stream_start == "learned":
            self.offsets = nn.Parameter(torch.empty(config.n_streams, config.n_embd))

    def forward(self, idx, positions=None):
        """Tokens (B, T) at positions (B, T), by default 0 to T - 1 -> Streams."""
        if positions is None:
            positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.wte(idx) + self.wpe(positions)  # (B, T, C)
        if self.scale != 1:
            x = self.scale * x
        x = F.dropout(x, self.dropout, self.training)
        if self.stream_dtype != "auto":
            x = x.to(getattr(torch, self.stream_dtype))
        elif torch.is_autocast_enabled(idx.device.type):
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        streams = start_streams(x, self.n_streams, self.offsets, self.sees)
        if not self.dynamic:
            return streams
        # Computed here, so that all blocks get the same kind of input and share one graph.
        return streams._replace(mean_square=mean_square(streams.seen(self.sees)))


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.read_out = None
        if config.readout == "learned" and config.sees == "streams":
            self.read_out = ReadOut(
                config.n_streams,
                config.n_embd,
                dynamic=config.dynamic,
                alpha_start=config.alpha_start,
            )

    def read(self, streams):
        """-> (B, T, C): the mean of the streams, a learned sum, or what was read ahead."""
        if streams.input is not None:
            return streams.input
        return self.read_out(streams) if self.read_out else streams.x.mean(2)

    def forward(self, streams, wte, targets=None):
        """Streams, the tied embedding (V, C), targets (B, T) or None -> logits (B, T, V), loss."""
        logits = F.linear(self.ln_f(self.read(streams)), wte)
        if targets is None:
            return logits, None
        flat = logits.float().flatten(0, 1)
        return logits, F.cross_entropy(flat, targets.flatten(), ignore_index=-1)


class Observed(NamedTuple):
    """What one hyper-connection did to each token."""

    name: str  # "blocks.3.hc_mlp"
    x: torch.Tensor  # (B, T, n, C), the streams before it
    read: torch.Tensor  # (B, T, n); the next sublayer's where reads are taken ahead
    write: torch.Tensor  # (B, T, n)
    mix: torch.Tensor  # (B, T, n, n)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.head = Head(config)
        self.init_parameters()

    def forward(self, idx, targets=None):
        """idx, targets (B, T) integers -> logits (B, T, V), the mean cross-entropy or None. A
        target of -1 does not count.

        ValueError for more tokens than block_size."""
        if idx.shape[1] > self.config.block_size:
            raise ValueError(
                f"{idx.shape[1]} tokens are more than block_size {self.config.block_size}"
            )
        streams = self.embed(idx)
        x0 = streams.x
        for block in self.blocks:
            streams = block(streams, x0)
        return self.head(streams, self.embed.wte.weight, targets)

    @torch.no_grad()
    def observe(self, idx):
        """idx (B, T) -> an Observed for each hyper-connection, in order. Runs eagerly."""
        streams, observed = self.embed(idx), []
        x0 = streams.x
        for layer, block in enumerate(self.blocks):
            streams = block.enter(streams, x0)
            for name, connection, branch in block.connections():
                coefficients = connection.observe(streams)
                observed.append(Observed(f"blocks.{layer}.{name}", streams.x, *coefficients))
                streams = connection(streams, branch)
        return observed

    def mixing_matrices(self, idx):
        """idx (B, T) -> the M (n, n) of every hyper-connection, averaged over the tokens."""
        return [seen.mix.mean((0, 1)) for seen in self.observe(idx)]

    def compile_regions(self, activation_memory_budget=1.0):
        """Compile each block and the head in place, without graph breaks. Blocks have the same code
        and shapes, so what is compiled for the first serves all.

        The embedding stays eager: its backward adds up rows of the same token, and compiled code
        adds them in no fixed order.

        activation_memory_budget: how much of what the backward needs is kept, from 0 to 1; the rest
        is computed again. torch has one such setting for the whole process.
        """
        torch._functorch.config.activation_memory_budget = activation_memory_budget
        options = compiler_options(self.config.n_streams)
        for region in (*self.blocks, self.head):
            region.compile(fullgraph=True, dynamic=False, options=options)

    @torch.no_grad()
    def init_parameters(self):
        """GPT-2's initialisation. All parameters get their values again here, in one place.

        RuntimeError for a parameter that was not reached."""
        reached = set()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 0.02
                if name.endswith("c_proj"):  # writes to the streams, 2 n_layer times in all
                    std /= math.sqrt(2 * self.config.n_layer)
                module.weight.normal_(0, std)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.02)
            elif isinstance(module, (nn.LayerNorm, Coefficients)):
                module.reset_parameters()
            elif isinstance(module, Embedding) and module.offsets is not None:
                module.offsets.zero_()
            elif isinstance(module, Block) and module.x0_scalars is not None:
                module.x0_scalars.copy_(torch.tensor([1.0, 0.0]))
            else:
                continue
            reached |= {id(p) for p in module.parameters(recurse=False)}
        missed = [name for name, p in self.named_parameters() if id(p) not in reached]
        if missed:
            raise RuntimeError(
                f"init_parameters does not know how to start {', '.join(missed)}: add a case there"
            )

    def parameter_groups(self, weight_decay, connection_lr=1.0, decay_phi=True):
        """Optimizer groups by role, the same rule for every mixer.

        Matrices and embeddings decay, and phi if decay_phi. Parameters that shift or scale do not:
        norms, biases, the alphas, the offsets of the streams, x0_scalars.

        The "lr_factor" of a group is connection_lr for phi, alpha and bias of `Coefficients` (the
        hyper-connections, a learned read-out, scaled residuals), and 1 for all others. ValueError
        for a connection_lr other than 1 where the model has none of these, and for decay_phi=False
        where it has no phi; RuntimeError for a parameter of unknown role.
        """
        connections = [module for module in self.modules() if isinstance(module, Coefficients)]
        if not connections and connection_lr != 1:
            raise ValueError(
                f"connection_lr = {connection_lr} is for hyper-connections, and "
                f"{self.config.mixer} has none; leave it at 1"
            )
        if not decay_phi and not any(module.dynamic for module in connections):
            raise ValueError("decay_phi is False, and this model has no phi; leave it at True")
        decays = {
            (nn.Linear, "weight"): True,
            (nn.Linear, "bias"): False,
            (nn.Embedding, "weight"): True,
            (nn.LayerNorm, "weight"): False,
            (nn.LayerNorm, "bias"): False,
            (Coefficients, "phi"): decay_phi,
            (Coefficients, "alpha"): False,
            (Coefficients, "bias"): False,
            (Embedding, "offsets"): False,
            (Block, "x0_scalars"): False,
        }
        groups = {}  # (whether it decays, lr_factor): parameters
        for module_name, module in self.named_modules():
            kind = Coefficients if isinstance(module, Coefficients) else type(module)
            factor = connection_lr if kind is Coefficients else 1.0
            for name, parameter in module.named_parameters(recurse=False):
                if (kind, name) not in decays:
                    raise RuntimeError(
                        f"parameter_groups does not know the role of {module_name}.{name}: say in "
                        "`decays` whether it decays"
                    )
                groups.setdefault((decays[kind, name], factor), []).append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": weight_decay if decaying else 0.0,
                "lr_factor": factor,
            }
            for (decaying, factor), parameters in sorted(groups.items(), reverse=True)
        ]

    def parameter_counts(self):
        """How many parameters each part has, and their total.

        embedding: tokens, positions, and the streams' learned start. hyper_connections: all
        `Coefficients`, so a learned read-out and scaled residuals too. branches: all others, norms
        among them.
        """
        connections = [m for m in self.modules() if isinstance(m, Coefficients)]
        hyper = sum(p.numel() for module in connections for p in module.parameters())
        embedding = sum(p.numel() for p in self.embed.parameters())
        total = sum(p.numel() for p in self.parameters())
        return {
            "embedding": embedding,
            "branches": total - embedding - hyper,
            "hyper_connections": hyper,
            "total": total,
        }

    def flops_per_token(self):
        """Floating-point operations of a training step, forward and backward, per token of a
        sequence of block_size.

        6 for each weight of a matrix product, phi's among them (PaLM, appendix B), and 12 L C T for
        attention. A forward through a hyper-connection costs 2nC for the read, 2nC for the write,
        and 2 n^2 C for the mix unless M = I; through a learned read-out or a scaled residual, 2nC.
        Forward and backward cost three times that.
        """
        c, n = self.config, self.config.n_streams
        linear = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        weights = linear + self.embed.wte.weight.numel()
        streams = 0
        for module in self.modules():
            if isinstance(module, Coefficients):
                weights += module.phi.numel() if module.dynamic else 0
            if isinstance(module, HyperConnection):
                mix = n * n if module.sizes[2] else 0
                streams += 3 * 2 * c.n_embd * (n + n + mix)
            elif isinstance(module, (ReadOut, ScaledResidual)):
                streams += 3 * 2 * c.n_embd * n
        attention = 12 * c.n_layer * c.n_embd * c.block_size
        return 6 * weights + attention + streams
