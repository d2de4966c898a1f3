import math

import pytest
import torch
from torch._dynamo.utils import counters

from coefficients import Coefficients
from compile_options import compiler_options
from generate import Decoder, generate
from mixers import MIXERS, Mixer, n_logits
from model import GPT, GPTConfig
from streams import SEES, HyperConnection

SIZES = dict(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=24)
MIXING = [name for name in MIXERS if not MIXERS[name].one_stream]


def build(mixer, seed=0, n_streams=4, **changes):
    n_streams = 1 if MIXERS[mixer].one_stream else n_streams
    torch.manual_seed(seed)
    return GPT(GPTConfig(**SIZES | {"mixer": mixer, "n_streams": n_streams} | changes))


@pytest.fixture
def tokens():
    return torch.randint(SIZES["vocab_size"], (3, 16), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("n_streams", [2, 3, 4])
def test_starts_as_the_plain_gpt(mixer, dynamic, n_streams, tokens):
    plain = build("residual")(tokens)[0]
    logits = build(mixer, n_streams=n_streams, dynamic=dynamic)(tokens)[0]
    assert (logits - plain).abs().max() < 1e-6


def trained(model, tokens, steps, lr=1e-2):
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        optimizer.step()
    return loss.item()


def bias_gradients(model, tokens):
    """{sublayer: norms of the gradients of its read, write and mix biases}."""
    model.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    connections = {n: m for n, m in model.named_modules() if isinstance(m, HyperConnection)}
    return {
        name: [part.norm().item() for part in hc.bias.grad.split(hc.sizes)]
        for name, hc in connections.items()
    }


@pytest.mark.parametrize("mixer", MIXING)
@pytest.mark.parametrize("dynamic", [True, False])
def test_streams_part_and_every_mixer_parameter_learns(mixer, dynamic, tokens):
    model = build(mixer, dynamic=dynamic, mix_start=0.2)
    trained(model, tokens, 20)
    x = model.observe(tokens)[-1].x  # (B, T, n, C)
    assert (x - x.mean(2, keepdim=True)).norm() > 1e-3 * x.norm()

    entry, inert = MIXERS[mixer], set()
    if entry.doubly_stochastic or "rows" in entry.exact_sums:
        inert.add("blocks.0.hc_attn")  # mixes equal streams
    if entry.doubly_stochastic or "columns" in entry.exact_sums:
        inert.add("blocks.1.hc_mlp")  # the mean of the streams does not see it
    for name, (read, write, mix) in bias_gradients(model, tokens).items():
        assert write > 1e-5 and (read > 1e-7 or name == "blocks.0.hc_attn"), name
        assert mix > 1e-8 or name in inert or not n_logits(mixer, 4), name
    for name, module in model.named_modules():
        if isinstance(module, Coefficients) and dynamic:
            assert module.phi.grad.norm() > 1e-5 and module.alpha.grad[1].abs() > 1e-7, name


@pytest.mark.parametrize("mixer", [m for m in MIXING if n_logits(m, 4)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_with_both_ends_learned_every_matrix_gets_a_gradient(mixer, dynamic, tokens):
    """A learned start makes the streams unequal, and a learned read-out sees which one is which."""
    model = build(mixer, dynamic=dynamic, stream_start="learned", readout="learned")
    trained(model, tokens, 5)
    for name, (_, _, mix) in bias_gradients(model, tokens).items():
        assert mix > 1e-8, name


@pytest.mark.quick
@pytest.mark.parametrize("mixer", MIXING)
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "knobs",
    [
        {"stream_start": "learned", "readout": "learned"},
        {"gates": "free"},
        {"gates": "exp"},
        {"gates": "bounded", "mix_scale": "sublayer"},
        {"mix_scale": "stream"},
        {"wraps": "block"},
        {"sees": "input", "readout": "learned"},
        {"sees": "input", "readout": "learned", "wraps": "block", "stream_start": "learned"},
    ],
)
def test_every_knob_starts_as_the_plain_gpt(mixer, dynamic, knobs, tokens):
    plain = build("residual")(tokens)[0]
    logits = build(mixer, dynamic=dynamic, **knobs)(tokens)[0]
    assert (logits - plain).abs().max() < 1e-6


@pytest.mark.quick
@pytest.mark.parametrize("mixer", MIXING)
@pytest.mark.parametrize("sees", SEES)
def test_whatever_coefficients_see_the_start_is_the_plain_gpt(mixer, sees, tokens):
    plain = build("residual")(tokens)[0]
    logits = build(mixer, sees=sees, readout="learned")(tokens)[0]
    assert (logits - plain).abs().max() < 1e-6


@pytest.mark.quick
@pytest.mark.parametrize("sees", SEES)
def test_the_embedding_gives_the_mean_square_of_what_is_seen(sees, tokens):
    model = build("tbp", sees=sees, readout="learned", stream_start="learned")
    with torch.no_grad():
        model.embed.offsets.normal_()
    streams = model.embed(tokens)
    seen = streams.x.flatten(2) if sees == "streams" else streams.x.mean(2)
    torch.testing.assert_close(streams.mean_square, seen.square().mean(-1))


LEAN = {"sees": "input", "readout": "learned"}
FORMS = [
    *((dynamic, LEAN) for dynamic in (True, False)),
    *((dynamic, LEAN | {"wraps": "block"}) for dynamic in (True, False)),
    *((dynamic, {"wraps": "block"}) for dynamic in (True, False)),
]


@pytest.mark.parametrize("dynamic, knobs", FORMS)
def test_other_forms_learn_and_generate_as_the_usual_one(knobs, dynamic, tokens):
    """A few sequences learned; the cache of generation."""
    model = build("tbp", n_streams=2, dynamic=dynamic, stream_start="learned", **knobs)
    assert trained(model, tokens, 60) < 1.0
    assert_cache_changes_nothing(model, tokens)


def compile_regions(model, backend):
    """As GPT.compile_regions; aot_eager traces the same graphs, and runs them by eager kernels."""
    if backend == "inductor":
        return model.compile_regions()
    for region in (*model.blocks, model.head):
        region.compile(fullgraph=True, dynamic=False, backend=backend)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("dynamic, knobs", FORMS)
def test_other_forms_compile_as_the_usual_one(backend, knobs, dynamic, tokens):
    torch.compiler.reset()
    counters.clear()
    few = {"n_streams": 2, "mix_start": 0.2, "dynamic": dynamic, "stream_start": "learned"}
    eager, compiled = (build("tbp", **few, **knobs) for _ in range(2))
    compile_regions(compiled, backend)
    for model in (eager, compiled):
        trained(model, tokens, 3)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.quick
def test_every_block_and_the_head_are_compiled_with_the_options(monkeypatch):
    compiled = {}
    note = lambda module, **how: compiled.update({module: how})
    monkeypatch.setattr(torch.nn.Module, "compile", note)
    with torch._functorch.config.patch(activation_memory_budget=1.0):
        model = build("tbp")
        model.compile_regions(activation_memory_budget=0.5)
        how = {"fullgraph": True, "dynamic": False, "options": compiler_options(4)}
        assert compiled == dict.fromkeys([*model.blocks, model.head], how)
        assert torch._functorch.config.activation_memory_budget == 0.5


def assert_cache_changes_nothing(model, tokens):
    """The likeliest continuation of 4 tokens by 12, with the cache and without."""
    model.eval()
    idx = tokens[:, :4]
    steps = generate(Decoder(model, 3, 16), idx.tolist(), 12, temperature=0)
    out = torch.cat([idx, torch.tensor(list(steps)).t()], 1)
    for _ in range(12):
        idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, idx)


def test_a_block_s_two_branches_are_what_a_plain_block_adds(tokens):
    plain = build("residual", n_layer=1)
    block, x = plain.blocks[0], plain.embed(tokens)
    expected = block(x, x.x).x - x.x
    torch.testing.assert_close(block.both(x.x[:, :, 0])[:, :, None], expected)


@pytest.mark.quick
@pytest.mark.parametrize("mixer", MIXING)
def test_a_scaled_embedding_is_scaled_alike_for_every_mixer(mixer, tokens):
    plain, scaled = build("residual"), build("residual", embed_scale=8.0)
    torch.testing.assert_close(scaled.embed(tokens).x, 8 * plain.embed(tokens).x)
    logits = build(mixer, embed_scale=8.0)(tokens)[0]
    assert (logits - scaled(tokens)[0]).abs().max() < 1e-5


@pytest.mark.quick
def test_x0_scalars_start_as_the_plain_gpt_and_do_what_they_say(tokens):
    plain, model = build("residual", n_layer=1), build("residual", n_layer=1, x0_scalars=True)
    assert torch.equal(model(tokens)[0], plain(tokens)[0])
    with torch.no_grad():
        model.blocks[0].x0_scalars.copy_(torch.tensor([0.5, 2.0]))
    x0 = model.embed(tokens)
    expected = plain.blocks[0](x0._replace(x=2.5 * x0.x), x0.x).x
    torch.testing.assert_close(model.blocks[0](x0, x0.x).x, expected)


@pytest.mark.quick
@pytest.mark.parametrize("dynamic", [True, False])
def test_one_stream_with_a_scale_starts_as_the_plain_gpt(dynamic, tokens):
    plain = build("residual")
    model = build("residual", mix_scale="sublayer", dynamic=dynamic)
    assert torch.equal(model(tokens)[0], plain(tokens)[0])
    assert_cache_changes_nothing(model, tokens)
    assert model.flops_per_token() - plain.flops_per_token() == 4 * (dynamic * 6 * 24 + 6 * 24)
    assert trained(model, tokens, 60) < 1.0
    scales = [M.item() for M in model.mixing_matrices(tokens)]
    assert min(abs(scale - 1) for scale in scales) > 1e-3


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_fits_a_few_sequences(mixer, tokens):
    assert trained(build(mixer, n_streams=2), tokens, 60) < 1.0 < math.log(61) - 1


# Inductor takes ten times as long as the tracing before it, where a mixer can go wrong. The
# residual model goes through Inductor in test_gpu_scripts.py.
OTHERS = [m for m in MIXERS if m != GPTConfig.mixer]
TO_COMPILE = [
    (GPTConfig.mixer, "inductor"),
    *((m, "aot_eager") for m in OTHERS),
    *(pytest.param(m, "inductor", marks=pytest.mark.long) for m in OTHERS),
]


@pytest.mark.parametrize("mixer, backend", TO_COMPILE)
def test_compiled_is_eager_one_graph_a_region_compiled_once(mixer, backend, tokens):
    torch.compiler.reset()
    counters.clear()
    few = dict.fromkeys(MIXERS[mixer].options, 3)  # rounds, which take long to compile
    eager, compiled = (build(mixer, n_streams=2, mix_start=0.2, options=few) for _ in range(2))
    compile_regions(compiled, backend)
    graphs = []
    optimizers = [
        torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-3) for model in (eager, compiled)
    ]
    for _ in range(4):
        losses = [model(tokens[:, :-1], tokens[:, 1:])[1] for model in (eager, compiled)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
        for (name, a), b in zip(eager.named_parameters(), compiled.parameters()):
            assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6), name
        for optimizer in optimizers:
            optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    # A block and the head, both in the first step.
    assert graphs == [2] * 4 and not counters["graph_break"]
    assert list(compiled.state_dict()) == list(eager.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens)[0], eager(tokens)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("mixer", [m for m in MIXING if MIXERS[m].exact and m in ("tbp", "rtbp")])
@pytest.mark.parametrize("knobs", [{}, {"sees": "input", "readout": "learned"}])
def test_thirty_two_streams_compile_and_train(mixer, knobs, tokens):
    model = build(mixer, n_streams=32, **knobs)
    model.compile_regions()
    assert trained(model, tokens, 60) < 1.0


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_parameter_groups_partition_by_role(mixer, dynamic):
    model = build(mixer, dynamic=dynamic)
    decay, keep = model.parameter_groups(0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names) == sorted(id(p) for group in (decay, keep) for p in group["params"])
    assert decay["weight_decay"] == 0.1 and keep["weight_decay"] == 0
    assert {names[id(p)].split(".")[-1] for p in keep["params"]} <= {"bias", "alpha", "weight"}
    assert all("ln_" in names[id(p)] or not names[id(p)].endswith("weight") for p in keep["params"])
    assert all(
        names[id(p)].endswith(("weight", "phi")) and "ln_" not in names[id(p)]
        for p in decay["params"]
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    "mixer, knobs, kind",
    [
        ("tbp", {"stream_start": "learned"}, "offsets"),
        ("residual", {"x0_scalars": True}, "x0_scalars"),
        ("residual", {"mix_scale": "sublayer"}, "alpha"),
    ],
)
def test_what_shifts_or_scales_streams_does_not_decay(mixer, knobs, kind):
    model = build(mixer, **knobs)
    decay, keep = (set(map(id, group["params"])) for group in model.parameter_groups(0.1))
    shifts = [id(p) for name, p in model.named_parameters() if name.endswith(kind)]
    assert shifts and keep.issuperset(shifts) and decay.isdisjoint(shifts)


@pytest.mark.quick
@pytest.mark.parametrize("connection_lr", (1.0, 4.0))
@pytest.mark.parametrize("decay_phi", (True, False))
def test_connections_may_have_a_rate_and_a_decay_of_their_own(connection_lr, decay_phi):
    """Adam's first step is rate * sign(gradient), and a decay takes rate * decay * w."""
    model = build("tbp", readout="learned")
    with torch.no_grad():
        for p in model.parameters():  # phi starts at 0, which cannot decay
            p.add_(0.1 * torch.randn_like(p))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = model.parameter_groups(0.5, connection_lr, decay_phi)
    optimizer = torch.optim.AdamW([{**group, "lr": 0.01 * group["lr_factor"]} for group in groups])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()

    for name, p in model.named_parameters():
        of_connection = name.endswith(("phi", "alpha")) or ".hc_" in name or "read_out" in name
        rate = 0.01 * (connection_lr if of_connection else 1)
        matrix = p.ndim == 2 and (decay_phi or not name.endswith("phi"))
        wanted = before[name] - rate * (1 + 0.5 * before[name] * matrix)
        torch.testing.assert_close(p.detach(), wanted, msg=name, rtol=0, atol=1e-6)


@pytest.mark.quick
def test_a_model_without_connections_refuses_knobs_of_theirs():
    with pytest.raises(ValueError, match="residual has none"):
        build("residual").parameter_groups(0.1, connection_lr=2.0)
    for model in (build("residual"), build("tbp", dynamic=False)):
        with pytest.raises(ValueError, match="this model has no phi"):
            model.parameter_groups(0.1, decay_phi=False)


def test_initialisation_refuses_a_parameter_it_does_not_know():
    model = build("tbp")
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match="extra"):
        model.init_parameters()


def test_counts_and_flops():
    model, plain = build("tbp"), build("residual")
    counts, K = model.parameter_counts(), 9
    assert counts["hyper_connections"] == 4 * ((4 * 24 + 1) * (8 + K) + 3)
    assert (
        counts["total"] - counts["hyper_connections"]
        == plain.parameter_counts()["total"]
        == sum(p.numel() for p in plain.parameters())
    )
    assert plain.flops_per_token() == 6 * (2 * 12 * 24 * 24 + 61 * 24) + 12 * 2 * 24 * 16
    assert model.flops_per_token() - plain.flops_per_token() == 4 * (
        6 * 4 * 24 * (8 + K) + 6 * 24 * (4 + 4 + 16)
    )
    learned = build("tbp", readout="learned")
    assert learned.parameter_counts()["hyper_connections"] == counts["hyper_connections"] + 389
    assert learned.flops_per_token() - model.flops_per_token() == 6 * 4 * 24 * 4 + 6 * 24 * 4
    unmixed, scaled = build("identity"), build("identity", mix_scale="stream")  # I, and diagonal
    assert unmixed.flops_per_token() - plain.flops_per_token() == 4 * (
        6 * 4 * 24 * 8 + 6 * 24 * (4 + 4)
    )
    assert scaled.flops_per_token() - plain.flops_per_token() == 4 * (
        6 * 4 * 24 * (8 + 4) + 6 * 24 * (4 + 4 + 16)
    )


def test_too_long_a_sequence_is_refused(tokens):
    with pytest.raises(ValueError, match="32 tokens are more than block_size 16"):
        build("tbp")(tokens.repeat(1, 2))


def test_mixing_matrices_are_one_a_sublayer(tokens):
    matrices = build("rtbp").mixing_matrices(tokens)
    assert len(matrices) == 4 and all((M.sum(0) - 1).abs().max() < 1e-6 for M in matrices)
    assert build("residual").mixing_matrices(tokens) == [torch.ones(1, 1)] * 4


def test_a_mixer_may_give_one_plane_for_several_entries(monkeypatch, tokens):
    def circulant(planes, n):
        total = sum(plane.exp() for plane in planes)
        shares = [plane.exp() / total for plane in planes]
        return [[shares[(j - i) % n] for j in range(n)] for i in range(n)]

    entry = Mixer(lambda n: n, circulant, start=lambda n, eps: torch.eye(n)[0] * 4)
    monkeypatch.setitem(MIXERS, "circulant", entry)
    eager, compiled = build("circulant", n_layer=1), build("circulant", n_layer=1)
    compile_regions(compiled, "aot_eager")
    for model in (eager, compiled):
        model(tokens, tokens)[1].backward()
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_all_that_gradients_depend_on(mixer, assign, tokens):
    usual = build(mixer)
    with torch.no_grad():
        for p in usual.parameters():
            p.add_(0.05 * torch.randn_like(p))
    with torch.device("meta"):
        loaded = build(mixer)
    if not assign:
        loaded.to_empty(device="cpu")
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.data.fill_(math.nan)
    loaded.load_state_dict(
        {name: t.clone() for name, t in usual.state_dict().items()}, assign=assign
    )
    for model in (usual, loaded):
        model(tokens, tokens)[1].backward()
    for (name, ours), theirs in zip(loaded.named_parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0, msg=name)


def test_a_model_without_memory_starts_once_it_has_some():
    with torch.device("meta"):
        model = build("tbp")
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(math.nan)
    usual = build("tbp")
    for each in (model, usual):
        torch.manual_seed(0)
        each.init_parameters()
    for ours, theirs in zip(
        (*model.parameters(), *model.buffers()),
        (*usual.parameters(), *usual.buffers()),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
