"""Generation with a cache against the model without one, and the choice of a token."""

import bisect
import itertools
import math

import pytest
import torch

from compile_options import compiler_options
from generate import (
    Decoder,
    cache_length,
    cast_weights,
    generate,
    run_block,
    run_head,
    sample_token,
    uniforms,
)
from mixers import MIXERS
from model import GPT, GPTConfig

SIZES = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=24)
N_VOCAB = 61
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [60, 3, 60]]


def build(mixer="tbp", **changes):
    """A model whose every parameter is off its start, so that streams and coefficients differ."""
    n_streams = 1 if MIXERS[mixer].one_stream else 4
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | dict(mixer=mixer, n_streams=n_streams) | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def choose(logits, number, temperature, top_k, top_p):
    """sample_token for one row in plain Python."""
    if temperature == 0:
        return max(range(len(logits)), key=lambda token: logits[token])
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    weights = [math.exp((logits[token] - logits[ranked[0]]) / temperature) for token in ranked]
    kept, total = [], 0.0
    for weight in weights:
        if kept and top_p is not None and total >= top_p * sum(weights):
            break
        total += weight
        kept.append(weight)
    return ranked[bisect.bisect_right(list(itertools.accumulate(kept)), number * total)]


@torch.no_grad()
def without_cache(model, prompt, count, temperature=0, top_k=None, top_p=None, seed=0):
    """What `generate` yields for one prompt, by running the model on the whole window each time."""
    size = model.config.block_size
    numbers = uniforms([seed], 1, count, torch.device("cpu"))[:, 0].tolist()
    text, window = list(prompt), list(prompt)[-size:]
    for number in numbers:
        if len(window) > size:
            window = text[-(size // 2) :]
        logits = model(torch.tensor([window]))[0][0, -1, :N_VOCAB].tolist()
        token = choose(logits, number, temperature, top_k, top_p)
        text.append(token)
        window.append(token)
    return text[len(prompt) :]


def with_cache(decoder, prompts, count, **knobs):
    """-> the tokens of each prompt, and None where it had ended."""
    return list(map(list, zip(*generate(decoder, prompts, count, n_vocab=N_VOCAB, **knobs))))


@pytest.mark.quick
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_step_gives_the_logits_of_the_whole_text(mixer):
    readouts = ["mean"] if MIXERS[mixer].one_stream else ["mean", "learned"]
    for dynamic, readout in itertools.product([True, False], readouts):
        check_logits_of_steps(build(mixer, dynamic=dynamic, readout=readout))


def check_logits_of_steps(model):
    """Against the model on whole texts."""
    texts = torch.randint(N_VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(texts)[0]  # (2, 16, V)
    decoder = Decoder(model, 2, 16)
    found = [decoder.prefill([0, 1], [text[:3].tolist() for text in texts])]
    found += [decoder.step(texts[:, t], [True, True]) for t in range(3, 16)]
    torch.testing.assert_close(torch.stack(found, 1), expected[:, 2:], rtol=1e-4, atol=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("mixer", ["residual", "tbp"])
@pytest.mark.parametrize(
    "knobs", [{}, dict(temperature=1.0), dict(temperature=0.7, top_k=20, top_p=0.9)]
)
def test_tokens_are_those_without_a_cache_beyond_the_block(mixer, knobs):
    """Prompts of three lengths in one batch fill their blocks at different times, twice each."""
    model = build(mixer)
    knobs = dict(temperature=0) | knobs
    found = with_cache(Decoder(model, 3, 40), PROMPTS, 30, seeds=[3, 4, 5], **knobs)
    for prompt, seed, tokens in zip(PROMPTS, [3, 4, 5], found):
        assert tokens == without_cache(model, prompt, 30, seed=seed, **knobs)


def test_a_prompt_longer_than_the_block_is_cut():
    model = build()
    prompt = list(range(30))
    found = with_cache(Decoder(model, 1, 99), [prompt], 12, temperature=0)
    assert found == [without_cache(model, prompt, 12)]


FORMS = [
    dict(mixer="residual", x0_scalars=True),
    dict(stream_start="learned"),
    dict(wraps="block"),
    dict(sees="input", readout="learned"),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_the_model(form):
    model = build(**form)
    check_logits_of_steps(model)
    found = with_cache(Decoder(model, 1, 40), [[7, 8]], 20, temperature=0)
    assert found == [without_cache(model, [7, 8], 20)]


@pytest.mark.quick
def test_the_step_is_compiled_with_the_options(monkeypatch):
    compiled = {}
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled.update({function: how}))
    Decoder(build(), 1, 16).compile()
    how = {"fullgraph": True, "dynamic": False, "options": compiler_options(4)}
    assert compiled == {run_block: how, run_head: how}


@pytest.mark.parametrize("mixer", [pytest.param("residual", marks=pytest.mark.long), "tbp"])
def test_the_step_is_compiled_once(mixer):
    """In one block of 128 positions and beyond it, with rows that end, for a second batch too."""
    torch.compiler.reset()
    readout = "learned" if mixer == "tbp" else "mean"
    model = build(mixer, block_size=32, readout=readout)
    decoder = Decoder(model, 3, 99)
    decoder.compile()
    expected = [without_cache(model, prompt, 40, temperature=1.0) for prompt in PROMPTS]
    steps = generate(decoder, PROMPTS, 40, n_vocab=N_VOCAB, seeds=[0, 0, 0])
    found = [next(steps), next(steps)]
    with torch.compiler.set_stance("fail_on_recompile"):
        found += steps
        again = with_cache(decoder, PROMPTS[:2], 40, seeds=[0, 0], stop=expected[0][5])
    assert list(map(list, zip(*found))) == expected
    assert again[0] == expected[0][:6] + [None] * (len(again[0]) - 6)


@pytest.mark.quick
def test_a_text_that_ended_stays_so_and_the_others_go_on():
    model = build()
    alone = [without_cache(model, prompt, 20) for prompt in PROMPTS]
    stop = alone[1][3]
    found = with_cache(Decoder(model, 3, 40), PROMPTS, 20, temperature=0, stop=stop)
    for tokens, expected in zip(found, alone):
        if stop in expected:
            expected = expected[: expected.index(stop) + 1]
        assert tokens == expected + [None] * (len(found[0]) - len(expected))


def test_bfloat16_has_the_logits_of_autocast():
    model, texts = build(), torch.randint(N_VOCAB, (1, 12))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(texts)[0].float()
    cast_weights(model, torch.bfloat16)
    decoder = Decoder(model, 1, 16, dtype=torch.bfloat16)
    found = [decoder.prefill([0], [texts[0, :3].tolist()])]
    found += [decoder.step(texts[:, t], [True]) for t in range(3, 12)]
    error = (torch.stack(found, 1).float() - expected[:, 2:]).norm() / expected[:, 2:].norm()
    assert error < 0.05


@pytest.mark.quick
def test_sample_token_is_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 40, generator=generator)
    numbers = torch.rand(50, generator=generator, dtype=torch.float64)
    for temperature, top_k, top_p in itertools.product(
        [0, 0.5, 1.0, 1e-42], [None, 1, 7, 99], [None, 0.0, 0.3, 0.9]
    ):
        found = sample_token(logits, numbers, temperature, top_k, top_p).tolist()
        rows = zip(logits.tolist(), numbers.tolist())
        assert found == [choose(row, number, temperature, top_k, top_p) for row, number in rows]


@pytest.mark.quick
def test_tokens_come_as_often_as_their_probability_says():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().repeat(20_000, 1)
    numbers = uniforms([0], 1, 20_000, torch.device("cpu"))[:, 0]
    counts = torch.bincount(sample_token(logits, numbers), minlength=4) / 20_000
    assert (counts - torch.tensor([0.1, 0.4, 0.2, 0.3])).abs().max() < 0.015
    kept = sample_token(logits, numbers, top_p=0.65)  # .4 + .3
    assert set(kept.tolist()) == {1, 3}


def test_numbers_at_the_ends_choose_a_token_that_is_kept():
    logits = torch.tensor([[0.0, -math.inf, -200.0, 1.0]])
    most = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert sample_token(logits, most).item() in (0, 2)
    assert sample_token(logits, torch.zeros(1, dtype=torch.float64)).item() == 3


@pytest.mark.quick
def test_tokens_that_together_hold_exactly_top_p_are_enough():
    numbers = torch.linspace(0, 1 - 2**-53, 99, dtype=torch.float64)
    for top_p, count in ((0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)):
        found = sample_token(torch.zeros(99, 4), numbers, top_p=top_p)
        assert len(set(found.tolist())) == count


def test_a_seed_begins_with_the_same_numbers_at_any_length():
    cpu = torch.device("cpu")
    assert torch.equal(uniforms([1, 2], 2, 100, cpu)[:7], uniforms([1, 2], 2, 7, cpu))
    assert not torch.equal(*uniforms([1, 2], 2, 100, cpu).unbind(1))


def test_few_lengths():
    assert [cache_length(n, 1024) for n in (1, 128, 129, 2000)] == [128, 128, 256, 1024]
    assert cache_length(5, 100) == 100


@pytest.mark.parametrize(
    "prompts, count, knobs, says",
    [
        ([], 3, {}, "there is no prompt"),
        ([[1], []], 3, {}, "prompt 1 has no token"),
        ([[1], [1], [1]], 3, {}, "3 prompts are more than the decoder's 2 rows"),
        ([[1]], 200, {}, "201 tokens are more than the decoder's length 128"),
        ([[1], [1]], 3, {"seeds": [7]}, "1 seeds for 2 prompts"),
        ([[1], [1]], 3, {"seeds": []}, "0 seeds for 2 prompts"),
        ([[1]], 3, {"temperature": -1.0}, "temperature must be at least 0 and finite, not -1.0"),
        ([[1]], 3, {"temperature": math.nan}, "temperature must be at least 0 and finite, not nan"),
        ([[1]], 3, {"top_k": 0}, "top_k must be at least 1, or None for all tokens, not 0"),
        ([[1]], 3, {"top_p": 0.0}, "top_p must be above 0 and at most 1, or None, not 0.0"),
    ],
)
def test_generate_refuses(prompts, count, knobs, says):
    decoder = Decoder(build(block_size=256), 2, 100)
    with pytest.raises(ValueError, match=says):
        next(generate(decoder, prompts, count, **knobs))


def test_a_text_that_just_fits_is_no_refusal():
    decoder = Decoder(build(block_size=256), 1, 128)
    assert next(generate(decoder, [[1]], 127)) and decoder.length == 128


def test_a_diverged_model_is_refused():
    model = build()
    with torch.no_grad():
        model.head.ln_f.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        next(generate(Decoder(model, 1, 16), [[1]], 3))
