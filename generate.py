"""
Text from a model, a token at a time: the prompt in one pass, then a step a token, with a cache of
keys and values whose size never changes, so that the step is compiled once.

    decoder = Decoder(model, rows=2, length=256)
    decoder.compile()                           # pays off for long texts
    for new in generate(decoder, [[50256, 464], [50256]], 100, top_k=200):
        ...                                     # a token of each prompt

A text depends only on its prompt and its seed, except for rounding: other texts in the batch may
change the last bits of its logits, and so, rarely, a token. When a text fills block_size, its last
half becomes the new beginning.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from compile_options import compiler_options
from runtime import pick_autocast


class PrefillCache(NamedTuple):
    """One layer's cache, as attention sees it while whole texts are read."""

    keys: torch.Tensor  # (B, H, S, C/H), of the decoder's B rows
    values: torch.Tensor
    rows: list[int]  # the rows whose texts are read

    def attend(self, q, k, v):
        """q, k, v (rows, H, T, C/H) of positions 0 to T - 1 -> attention, of the same shape."""
        T = k.shape[2]
        self.keys[self.rows, :, :T] = k
        self.values[self.rows, :, :T] = v
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class DecodeCache(NamedTuple):
    """One layer's cache, as attention sees it when every row gets one token more."""

    keys: torch.Tensor  # (B, H, S, C/H), with room for S positions
    values: torch.Tensor
    rows: torch.Tensor  # (B,) 0, 1, ..., B - 1
    positions: torch.Tensor  # (B,), of the new tokens
    visible: torch.Tensor  # (B, 1, 1, S), the positions up to the new one

    def attend(self, q, k, v):
        """q, k, v (B, H, 1, C/H) of the new tokens -> attention, of the same shape."""
        self.keys[self.rows, :, self.positions] = k[:, :, 0]
        self.values[self.rows, :, self.positions] = v[:, :, 0]
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=self.visible)


class Decoder:
    """A model that reads up to `rows` texts side by side, with room for `length` tokens of each.

    dtype: of the activations, float32 or bfloat16. The shapes of a step are fixed here, so one
    decoder compiles once, whatever it reads.
    """

    def __init__(self, model, rows, length, *, dtype=torch.float32):
        config = model.config
        self.model, self.rows, self.dtype = model, rows, dtype
        self.length = cache_length(length, config.block_size)
        self.device = model.embed.wte.weight.device
        self.autocast = pick_autocast(dtype, self.device)
        shape = (rows, config.n_head, self.length, config.n_embd // config.n_head)
        # Zeros, since attention multiplies what is not visible by 0, and 0 times NaN is NaN.
        own = {"dtype": dtype, "device": self.device}
        self.keys = [torch.zeros(shape, **own) for _ in model.blocks]
        self.values = [torch.zeros(shape, **own) for _ in model.blocks]
        self.used = [0] * rows  # tokens of each row in the cache

        self.run_block, self.run_head = run_block, run_head

    def compile(self):
        """Send the step of a token through torch.compile; it compiles when it is first called."""
        options = compiler_options(self.model.config.n_streams)
        how = dict(fullgraph=True, dynamic=False, options=options)
        self.run_block = torch.compile(run_block, **how)
        self.run_head = torch.compile(run_head, **how)

    @torch.no_grad()
    def prefill(self, rows, texts):
        """Begin `rows` anew with `texts`, lists of 1 to `length` tokens -> the logits (rows, V) of
        the token after each.

        Shorter texts are padded at the end; causal attention never looks there. Runs eagerly, since
        each prompt length would need its own graph.
        """
        longest = max(map(len, texts))
        idx = torch.tensor(
            [text + [0] * (longest - len(text)) for text in texts], device=self.device
        )
        with self.autocast:
            streams = self.model.embed(idx)
            x0 = streams.x
            for block, keys, values in zip(self.model.blocks, self.keys, self.values):
                streams = run_block(block, streams, x0, PrefillCache(keys, values, rows))
            ends = [len(text) - 1 for text in texts]
            logits = run_head(self.model, streams.at(ends))
        for row, text in zip(rows, texts):
            self.used[row] = len(text)
        return logits

    @torch.no_grad()
    def step(self, tokens, keeps_token):
        """tokens (B,), one of each row -> the logits (B, V) of the token after it.

        keeps_token (B): whether the row keeps its token; otherwise the next step writes over it.
        """
        # A row that is full does not step, and writes over its last place.
        positions = torch.tensor([min(used, self.length - 1) for used in self.used])
        positions = positions.to(self.device)
        visible = torch.arange(self.length, device=self.device) <= positions[:, None]
        rows = torch.arange(self.rows, device=self.device)
        with self.autocast:
            streams = self.model.embed(tokens[:, None], positions[:, None])
            x0 = streams.x
            for block, keys, values in zip(self.model.blocks, self.keys, self.values):
                cache = DecodeCache(keys, values, rows, positions, visible[:, None, None])
                streams = self.run_block(block, streams, x0, cache)
            logits = self.run_head(self.model, streams)
        for row, keeps in enumerate(keeps_token):
            self.used[row] += keeps
        return logits

    def blank_logits(self):
        """Zeros (B, V), to be filled with the logits of some rows."""
        vocab_size = self.model.config.vocab_size
        return torch.zeros(self.rows, vocab_size, dtype=self.dtype, device=self.device)


def step_logits(decoder):
    """{"logits": (B, V)} of a step after texts that fill half of the cache: what
    compiler.on_trial compares."""
    texts = [[row] * math.ceil(decoder.length / 2) for row in range(decoder.rows)]
    decoder.prefill(list(range(decoder.rows)), texts)
    tokens = torch.zeros(decoder.rows, dtype=torch.int64, device=decoder.device)
    return {"logits": decoder.step(tokens, [False] * decoder.rows)}


def cache_length(length, block_size):
    """Room for `length` tokens: a multiple of 128, so that few lengths mean few graphs."""
    return min(math.ceil(length / 128) * 128, block_size)


# A Decoder compiles these functions and not the modules: a training run may have compiled the
# modules in place, for other shapes. For the same reason they call `forward`.


def run_block(block, streams, x0, cache):
    return block.forward(streams, x0, cache)


def run_head(model, streams):
    """Streams of one token a row -> logits (B, V)."""
    return model.head.forward(streams, model.embed.wte.weight)[0][:, 0]


def generate(
    decoder,
    prompts,
    max_new_tokens,
    *,
    temperature=1.0,
    top_k=None,
    top_p=None,
    n_vocab=None,
    seeds=None,
    stop=None,
):
    """Continue each of `prompts`, lists of tokens, by up to max_new_tokens.

    Yields a list at a time: the next token of each prompt, or None for one that has ended.

    n_vocab    only tokens below it; the others pad the vocabulary
    seeds      one for each prompt; by default 0, 1, ...
    stop       the token that ends a text; it is still yielded
    temperature, top_k, top_p: see sample_token.

    Of a prompt longer than block_size, the last block_size tokens are read. ValueError for no
    prompt, an empty one, more text than the decoder has room for, another number of seeds than of
    prompts, a temperature, top_k or top_p that means nothing, or logits that are not finite.
    """
    size = decoder.model.config.block_size
    check_room(decoder, prompts, max_new_tokens)
    check_sampling(temperature, top_k, top_p)
    seeds = list(range(len(prompts))) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; each prompt has one")
    decoder.used = [0] * decoder.rows
    rows, texts = list(range(len(prompts))), [list(prompt) for prompt in prompts]
    running = [row < len(texts) for row in range(decoder.rows)]
    numbers = uniforms(seeds, decoder.rows, max_new_tokens, decoder.device)

    logits = decoder.blank_logits()
    logits[rows] = decoder.prefill(rows, [text[-size:] for text in texts])
    for i in range(max_new_tokens):
        in_vocabulary = logits[:, :n_vocab]
        if not in_vocabulary.isfinite().all():
            raise ValueError(
                "the model's logits are not finite: its weights have diverged, or are damaged; "
                "take an earlier checkpoint"
            )
        tokens = sample_token(in_vocabulary, numbers[i], temperature, top_k, top_p)  # (B,)
        new = tokens.tolist()
        yield [new[row] if running[row] else None for row in rows]

        for row in rows:
            if running[row]:
                texts[row].append(new[row])
                running[row] = new[row] != stop
        if i + 1 == max_new_tokens or not any(running):
            return
        logits = next_logits(decoder, tokens, texts, running)


def next_logits(decoder, tokens, texts, running):
    """tokens (B,), the newest of each row -> the logits (B, V) of the token after it.

    texts      each prompt with all its new tokens, the newest included
    running    (B) whether the row goes on; the logits of the other rows mean nothing

    A row that has filled its block begins anew with the last half of its text.
    """
    size = decoder.model.config.block_size
    full = [row for row in range(len(texts)) if running[row] and decoder.used[row] == size]
    stepping = [run and row not in full for row, run in enumerate(running)]
    logits = decoder.step(tokens, stepping) if any(stepping) else decoder.blank_logits()
    if full:
        half = max(1, size // 2)
        logits[full] = decoder.prefill(full, [texts[row][-half:] for row in full])
    return logits


def check_room(decoder, prompts, max_new_tokens):
    """ValueError unless the decoder has room for the prompts and max_new_tokens more of each."""
    if not prompts:
        raise ValueError("there is no prompt to continue; give at least one")
    lengths = [len(prompt) for prompt in prompts]
    if len(prompts) > decoder.rows:
        raise ValueError(f"{len(prompts)} prompts are more than the decoder's {decoder.rows} rows")
    if not all(lengths):
        raise ValueError(f"prompt {lengths.index(0)} has no token; the model needs one to begin")
    needed = max(lengths) + max_new_tokens
    # Beyond block_size a row begins anew, so a cache of that length has room for any text.
    whole_block = decoder.length == decoder.model.config.block_size
    if needed > decoder.length and not whole_block:
        raise ValueError(f"{needed} tokens are more than the decoder's length {decoder.length}")


def check_sampling(temperature, top_k, top_p):
    """ValueError for a value with which `sample_token` could not choose."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all tokens, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, or None, not {top_p}")


def uniforms(seeds, rows, count, device):
    """Uniform numbers from [0, 1) for `count` tokens of each row, (count, rows) in float64, or in
    float32 on mps, which has no float64. The numbers of a row depend only on its seed."""
    numbers = torch.zeros(count, rows, dtype=torch.float64)
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        numbers[:, row] = torch.rand(count, generator=generator, dtype=torch.float64)
    if device.type == "mps":
        # Rounding may give 1, which is not in [0, 1).
        numbers = numbers.float().clamp(max=1 - 2**-24)
    return numbers.to(device)


def sample_token(logits, numbers, temperature=1.0, top_k=None, top_p=None):
    """Logits (B, V), uniform numbers (B,) from [0, 1) -> a token each, (B,).

    temperature 0 takes the likeliest token. top_k keeps the k likeliest tokens; of these, top_p
    keeps the likeliest that together hold p of the probability. Inverse-transform sampling: sort by
    probability, take the token whose cumulative interval holds the uniform number.
    """
    if temperature == 0:
        return logits.argmax(-1)
    k = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    highest, tokens = logits.float().topk(k)
    # Minus the highest first: then even a tiny temperature leaves it at 0, and not at infinity.
    probabilities = ((highest - highest[:, :1]) / temperature).softmax(-1)
    ends = probabilities.to(numbers.dtype).cumsum(-1)  # (B, k), where each token's interval ends
    last = torch.full_like(tokens[:, :1], k - 1)  # of those that are kept
    if top_p is not None:
        last = (ends[:, :-1] < top_p).sum(-1, keepdim=True)  # the likeliest always stays
    place = torch.searchsorted(ends, numbers[:, None] * ends.gather(1, last), right=True)
    return tokens.gather(1, place)[:, 0]


def cast_weights(model, dtype):
    """Cast the weights of linear layers and of the token embedding to `dtype`, in place; otherwise
    autocast would cast them again for every token. Norms and coefficients stay in float32."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    model.embed.wte.to(dtype)
