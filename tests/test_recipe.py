"""The training recipe against a plain loop, and each of its parts against its own statement."""

import json
import math

import oracle_trainer
import pytest
import torch
from conftest import free_port, load, rank_environment, records, run
from forks import Script
from torch.nn.functional import layer_norm, linear

from mixers import MIXERS
from model import GPT, GPTConfig
from passes import mean_square
from streams import Streams

STEPS = 14
# Clips at most steps; the cosine begins at step 4; an epoch ends within step 9.
RECIPE = (
    f"--max_iters={STEPS} --lr_decay_iters=30 --warmup_iters=4 --grad_clip=0.3 "
    "--learning_rate=3e-3 --min_lr=3e-4 "
    "--weight_decay=0.3 --beta1=0.8 --beta2=0.97 --bias=True --total_batch_tokens=512 "
    "--eval_interval=7 --checkpoint_interval=7"
).split()


def start_apart(arguments, folder, mixer):
    """Begin a run whose streams and gates are far from their start, where all of them are equal.

    -> its weights. They are a checkpoint of step 0, from which the run can be resumed.
    """
    still = ["--max_iters=1", "--learning_rate=0.0", "--min_lr=0.0", "--compile=False"]
    run(*arguments, *still, "--init_from=scratch")
    (folder / "best.pt").unlink(missing_ok=True)
    path = folder / "ckpt_0000001.pt"
    state = load(path)
    path.unlink()
    generator = torch.Generator().manual_seed(1)
    for name, weight in state["model"].items():
        size = 0.1 if ".hc_" in name else 0.3 if "bias" in name else 0.1
        if not name.endswith(".alpha"):
            weight += size * torch.randn(weight.shape, generator=generator)
        else:
            weight.fill_(0.5)
    state |= {"step": 0, "logged_step": 0, "evaluated": None, "best_val": math.inf}
    state["optimizer"]["state"] = {}
    torch.save(state, folder / "ckpt_0000000.pt")
    return state["model"]


def comparable(name, weight):
    """A bias of the keys changes no softmax: its gradient is rounding, and AdamW follows that."""
    if not name.endswith("c_attn.bias"):
        return weight
    query, _, value = weight.chunk(3)
    return torch.cat([query, value])


@pytest.mark.parametrize(
    "mixer, compiled",
    [
        ("residual", False),
        ("hc", False),
        ("tbp", False),
        ("residual", True),  # whose kernels are the fewest
        pytest.param("tbp", True, marks=pytest.mark.long),
        pytest.param("hc", True, marks=pytest.mark.long),
    ],
)
def test_the_run_is_that_of_a_plain_loop(mixer, compiled, tiny, tiny_data, tmp_path, report):
    n = 1 if mixer == "residual" else 3
    arguments = [*tiny, *RECIPE, f"--mixer={mixer}", f"--n_streams={n}", f"--compile={compiled}"]
    if mixer == "hc":  # in one case the connections have settings of their own
        arguments += ["--connection_lr=0.5", "--decay_phi=False"]
    weights = start_apart(arguments, tmp_path / "out", mixer)
    run(*arguments, "--init_from=resume")
    knobs = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted, after = oracle_trainer.train(weights, tiny_data / "tiny", knobs, STEPS)

    found = [line for line in records(tmp_path / "out") if "loss" in line]
    for ours, plain in zip(found, wanted, strict=True):
        for key, tolerance in (("loss", 1e-5), ("norm", 1e-4), ("lr", 1e-12)):
            assert ours[key] == pytest.approx(plain[key], rel=tolerance), (ours["step"], key)
        assert ours["clipped"] == (plain["norm"] > knobs["grad_clip"])
    assert 3 < sum(line["clipped"] for line in found), "choose a --grad_clip that clips"
    final = load(tmp_path / "out" / f"ckpt_{STEPS:07d}.pt")["model"]
    off = {
        name: (comparable(name, final[name]) - comparable(name, after[name])).abs().max().item()
        for name in final
    }
    assert max(off.values()) < 1e-5, off
    vals = {line["step"]: line["val"] for line in records(tmp_path / "out") if "val" in line}
    for step, these in ((0, weights), (STEPS, final)):
        plain = oracle_trainer.validation_loss(these, tiny_data / "tiny", knobs)
        assert vals[step] == pytest.approx(plain, rel=1e-5)
    report(
        f"{mixer}, {'compiled' if compiled else 'eager'}: losses within "
        f"{max(abs(a['loss'] - b['loss']) for a, b in zip(found, wanted)):.1e} and weights within "
        f"{max(off.values()):.1e} of the plain loop's over {STEPS} steps"
    )


# ---- each part of the recipe against its own statement ------------------------------------------
# All begin at weights far from the start, so that phi, which starts at 0, can decay too.


@pytest.fixture
def after_one_step(tiny, tmp_path):
    """-> (weights before, the checkpoint after one step with these arguments)."""
    common = [*tiny, "--mixer=hc", "--n_streams=3", "--bias=True", "--warmup_iters=0"]
    common += ["--max_iters=1", "--learning_rate=1e-3", "--min_lr=1e-3"]
    weights = start_apart(common, tmp_path / "out", "hc")

    def step(*arguments):
        (tmp_path / "out" / "ckpt_0000001.pt").unlink(missing_ok=True)
        run(*common, *arguments, "--init_from=resume")
        return load(tmp_path / "out" / "ckpt_0000001.pt")

    return weights, step


def moments(state, name):
    """The first or second moments of all parameters, as one vector."""
    found = state["optimizer"]["state"]
    return torch.cat([found[i][name].double().flatten() for i in sorted(found)])


@pytest.mark.quick
def test_what_multiplies_activations_decays_and_nothing_else(after_one_step):
    weights, step = after_one_step
    with_decay = step("--weight_decay=50.0")["model"]
    without = step("--weight_decay=0.0")["model"]
    decayed, kept = set(), set()
    for name, weight in weights.items():
        shrunk = without[name] - with_decay[name]
        if torch.allclose(shrunk, 1e-3 * 50 * weight, rtol=1e-3, atol=1e-7):
            decayed.add(name)
        elif torch.equal(shrunk, torch.zeros_like(weight)):
            kept.add(name)
    for part in ("hc_attn.phi", "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight"):
        assert f"blocks.1.{part}" in decayed, f"{part} does not decay"
    for part in ("hc_attn.alpha", "hc_attn.bias", "ln_1.weight", "ln_2.bias", "mlp.c_fc.bias"):
        assert f"blocks.1.{part}" in kept, f"{part} decays"
    assert {"embed.wte.weight", "embed.wpe.weight"} <= decayed, "an embedding does not decay"
    assert {"head.ln_f.weight", "head.ln_f.bias"} <= kept, "a norm decays"
    assert decayed | kept == set(weights), "a parameter decays by another amount"


@pytest.mark.quick
def test_the_learning_rate_of_every_step(tiny, tmp_path):
    tiny += ["--max_iters=9", "--checkpoint_interval=1", "--keep_checkpoints=9"]
    schedule = ["--warmup_iters=3", "--lr_decay_iters=7", "--learning_rate=0.08", "--min_lr=0.02"]
    run(*tiny, *schedule)
    warmup = [0.02, 0.04, 0.06]  # quarters of the peak: step 3 is the first with all of it
    # 0.02 + 0.03 * (1 + cos) of 0, 45, 90, 135, 180 degrees, and of 180 from then on.
    cosine = [0.08, 0.0712132, 0.05, 0.0287868, 0.02, 0.02]
    said = [line["lr"] for line in records(tmp_path / "out") if "lr" in line]
    assert said == pytest.approx(warmup + cosine, rel=1e-5), "the log's rate is another"
    used = [
        load(tmp_path / "out" / f"ckpt_{step:07d}.pt")["optimizer"]["param_groups"]
        for step in range(1, 10)
    ]
    for group in range(2):
        rates = [groups[group]["lr"] for groups in used]
        assert rates == pytest.approx(warmup + cosine, rel=1e-5), "the optimizer's rate is another"


@pytest.mark.quick
def test_the_gradient_is_clipped_to_its_norm(after_one_step):
    """AdamW's first moment after a step is (1 - beta1) times the gradient that it got."""
    _, step = after_one_step
    norm_of = lambda state: moments(state, "exp_avg").norm().item() / (1 - 0.9)
    whole = norm_of(step("--grad_clip=0.0"))
    assert whole > 0.1, "the gradient is too small for this test"
    clipped = norm_of(step("--grad_clip=0.01"))
    assert clipped == pytest.approx(0.01, rel=1e-3), "the gradient is not clipped"
    assert norm_of(step("--grad_clip=1e6")) == pytest.approx(whole), "clipped without need"


def test_the_betas_are_those_of_the_moments(after_one_step):
    """After a step the moments are (1 - beta1) g and (1 - beta2) g^2."""
    _, step = after_one_step
    one = step("--beta1=0.9", "--beta2=0.95", "--grad_clip=0.0")
    other = step("--beta1=0.6", "--beta2=0.99", "--grad_clip=0.0")
    for name, ratio in (("exp_avg", 0.4 / 0.1), ("exp_avg_sq", 0.01 / 0.05)):
        found = moments(other, name).norm() / moments(one, name).norm()
        assert found.item() == pytest.approx(ratio, rel=1e-4), f"{name} has another beta"
    squares = moments(one, "exp_avg_sq") / 0.05
    assert torch.allclose(squares.sqrt(), moments(one, "exp_avg").abs() / 0.1, rtol=1e-4)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_an_evaluation_drops_nothing_out(compiled, tiny, tmp_path):
    tiny += ["--max_iters=0", f"--compile={compiled}"]
    for dropout in (0.0, 0.5):
        run(*tiny, f"--out_dir={tmp_path}/{dropout}", f"--dropout={dropout}")
    none, half = (records(tmp_path / name) for name in ("0.0", "0.5"))
    assert [line["val"] for line in none] == [line["val"] for line in half]


def test_a_training_step_drops_out(tiny, tmp_path):
    for dropout in (0.0, 0.5):
        run(*tiny, "--max_iters=1", f"--out_dir={tmp_path}/{dropout}", f"--dropout={dropout}")
    none, half = (records(tmp_path / name)[1]["loss"] for name in ("0.0", "0.5"))
    assert none != half


def small_model(mixer, **changes):
    n = 1 if MIXERS[mixer].one_stream else 3
    sizes = {"block_size": 8, "vocab_size": 64, "n_layer": 4, "n_head": 2, "n_embd": 16}
    torch.manual_seed(0)
    return GPT(GPTConfig(**sizes, mixer=mixer, n_streams=n, **changes))


@pytest.mark.quick
def test_the_head_reads_the_mean_of_the_streams():
    model = small_model("tbp")
    x = torch.randn(2, 8, 3, 16)
    model.head.ln_f.weight.data.uniform_(0.5, 2)
    wte = model.embed.wte.weight
    logits, _ = model.head(Streams(x, mean_square(x)), wte)
    mean = (x[:, :, 0] + x[:, :, 1] + x[:, :, 2]) / 3
    wanted = linear(layer_norm(mean, [16], model.head.ln_f.weight, model.head.ln_f.bias), wte)
    torch.testing.assert_close(logits, wanted)


@pytest.mark.quick
@pytest.mark.parametrize("mixer", [name for name in MIXERS if not MIXERS[name].one_stream])
def test_each_sublayer_favours_the_next_stream_at_the_start(mixer):
    model = small_model(mixer, read_start=0.6)
    for sublayer, seen in enumerate(model.observe(torch.randint(64, (2, 8)))):
        wanted = torch.full((3,), 0.2)  # the other two share what 0.6 leaves
        wanted[sublayer % 3] = 0.6
        torch.testing.assert_close(seen.read, wanted.expand(2, 8, 3), msg=f"{seen.name} reads")
        torch.testing.assert_close(seen.write, torch.ones(2, 8, 3), msg=f"{seen.name} writes")


@pytest.mark.quick
@pytest.mark.parametrize("wraps, count", [("sublayer", 8), ("block", 4)])
@pytest.mark.parametrize("sees", ["streams", "input"])
def test_the_branches_take_turns_with_the_streams(wraps, count, sees):
    """Branch k reads stream k % 3 most, but for the first where reads are taken ahead: it reads the
    mean, and so does the head."""
    model = small_model("tbp", read_start=0.6, wraps=wraps, sees=sees, readout="learned")
    reads = [seen.read[0, 0] for seen in model.observe(torch.randint(64, (2, 8)))]
    wanted = [[0.6 if i == k % 3 else 0.2 for i in range(3)] for k in range(count)]
    if sees == "input":  # connection k reads for branch k + 1, and the last for the head
        wanted = [*wanted[1:], [1 / 3] * 3]
    torch.testing.assert_close(torch.stack(reads), torch.tensor(wanted))


@pytest.mark.quick
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"readout": "learned"},
        {"sees": "input", "readout": "learned"},
        {"mixer": "residual", "n_streams": 1, "mix_scale": "sublayer"},
    ],
)
def test_alpha_start_is_where_every_alpha_starts(knobs):
    sizes = {"block_size": 8, "vocab_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 8}
    model = GPT(GPTConfig(**sizes, alpha_start=0.2, **knobs))
    alphas = [p for name, p in model.named_parameters() if name.endswith("alpha")]
    assert len(alphas) == 4 + (knobs == {"readout": "learned"})
    assert all((alpha == 0.2).all() for alpha in alphas)


@pytest.mark.quick
def test_every_parameter_starts_as_gpt2_s():
    """And what is a hyper-connection's own: phi 0, alpha 0.01."""
    torch.manual_seed(0)
    sizes = {"block_size": 64, "vocab_size": 512, "n_layer": 8, "n_head": 2, "n_embd": 64}
    model = GPT(GPTConfig(**sizes, mixer="tbp", n_streams=4, bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("phi"):
            assert not parameter.any(), name
        elif name.endswith("alpha"):
            assert (parameter == 0.01).all(), name
        elif ".ln_" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("weight"):
            # 16 sublayers write to a stream; together they add as much as one of std 0.02.
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < std / 10, name
        elif ".hc_" not in name:
            assert not parameter.any(), name


@pytest.mark.quick
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_where_gpt2_has_it(training, monkeypatch):
    """After the embedding, on the attention's weights, and on what each branch returns."""
    model = small_model("residual", dropout=0.5).train(training)
    seen = {}
    for name in ("attn", "mlp"):
        module = getattr(model.blocks[1], name)
        module.register_forward_hook(lambda module, _, y, name=name: seen.update({name: y}))
    attend = torch.nn.functional.scaled_dot_product_attention

    def attend_and_tell(*arguments, dropout_p=0.0, **named):
        seen["dropout_p"] = dropout_p
        return attend(*arguments, dropout_p=dropout_p, **named)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attend_and_tell)
    idx = torch.randint(64, (8, 8))
    model(idx)
    seen["embedding"] = model.embed(idx).x
    assert seen["dropout_p"] == (0.5 if training else 0)
    for name in ("embedding", "attn", "mlp"):
        share = (seen[name] == 0).float().mean().item()
        assert share == pytest.approx(0.5 if training else 0, abs=0.1), f"dropout of the {name}"


def test_dropout_draws_anew_at_every_step_on_every_rank_and_with_every_seed(tiny, tmp_path):
    tell = """
step = torch.optim.AdamW.step
def step_and_tell(self):
    print("seed:", torch.initial_seed(), flush=True)
    return step(self)
torch.optim.AdamW.step = step_and_tell"""

    def drawn(output):
        return [line for line in output.splitlines() if line.startswith("seed:")]

    one = drawn(run(*tiny, patch=tell))
    other = drawn(run(*tiny, "--seed=7", f"--out_dir={tmp_path}/other", patch=tell))
    port, command = free_port(), [*tiny, f"--out_dir={tmp_path}/two"]
    ranks = [Script(command, tell, rank_environment(rank, 2, port)) for rank in range(2)]
    first, second = [drawn(rank.finish()) for rank in ranks]
    assert first == one and len({*one, *other, *second}) == 18, "two steps draw the same numbers"
