"""analyze.py: its numbers against numpy and other statements of them, its files and its figures."""

import importlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import curves
import plots
import run_figure
from measure import (
    effective_streams,
    gains_by_depth,
    gram_matrices,
    look_at,
    loss_changes,
    pairwise_cosine,
    replaced_mix,
    sequence_losses,
)
from mixers import composite_gain
from model import GPT, GPTConfig
from runtime import RunError

SMALL = {"block_size": 16, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": False}


def small_model(mixer, **knobs):
    """With weights that a little training could have given: no two streams alike, M far from I."""
    torch.manual_seed(1)
    n_streams = 1 if mixer == "residual" else 3
    model = GPT(GPTConfig(mixer=mixer, n_streams=n_streams, **SMALL, **knobs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hc_" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)
    return model


def small_batches(sizes=(3, 2)):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(64, (size, 17), generator=generator) for size in sizes]
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.quick
def test_composite_gains_are_those_of_numpy_products():
    generator = np.random.default_rng(0)
    matrices = list(generator.normal(size=(5, 3, 3)))  # of any sign, and not symmetric
    gains = gains_by_depth([torch.from_numpy(M) for M in matrices])
    for depth, gain in enumerate(gains):
        first, last = np.eye(3), np.eye(3)
        for M in matrices[: depth + 1]:
            first = M @ first  # what is written later acts later, from the left
        for M in matrices[depth:]:
            last = M @ last
        for product, name in ((first, "from_first"), (last, "to_last")):
            row_sum, column_sum = np.linalg.norm(product, np.inf), np.linalg.norm(product, 1)
            assert gain[f"forward_gain_{name}"] == pytest.approx(row_sum, rel=1e-12)
            assert gain[f"backward_gain_{name}"] == pytest.approx(column_sum, rel=1e-12)
    largest = max(max(gain.values()) for gain in gains)
    assert composite_gain([torch.from_numpy(M) for M in matrices]) >= largest * (1 - 1e-12)


@pytest.mark.quick
def test_effective_streams_of_made_streams():
    alike = torch.randn(1, 1, 1, 32) * torch.tensor([1.0, -2.0, 3.0, 0.5])[:, None]
    assert effective_streams(gram_matrices(alike)).item() == pytest.approx(1, abs=1e-5)
    orthogonal = torch.linalg.qr(torch.randn(32, 4)).Q.T[None, None] * 7
    assert effective_streams(gram_matrices(orthogonal)).item() == pytest.approx(4, abs=1e-4)
    x = torch.randn(2, 3, 4, 32)
    singular = np.linalg.svd(x.numpy() @ x.numpy().swapaxes(-1, -2), compute_uv=False)
    expected = singular.sum(-1) ** 2 / (singular**2).sum(-1)
    np.testing.assert_allclose(effective_streams(gram_matrices(x)), expected, rtol=1e-4)


@pytest.mark.quick
def test_cosine_is_the_mean_over_pairs():
    x = torch.randn(1, 1, 4, 8)
    streams = x[0, 0].numpy()
    pairs = [
        streams[i] @ streams[j] / np.linalg.norm(streams[i]) / np.linalg.norm(streams[j])
        for i in range(4)
        for j in range(i)
    ]
    assert pairwise_cosine(gram_matrices(x)).item() == pytest.approx(np.mean(pairs), abs=1e-6)
    assert pairwise_cosine(gram_matrices(x[:, :, :1])).isnan().all()


@pytest.mark.parametrize("mixer", ["hc", "tbp"])
def test_numbers_of_sublayers_are_those_of_numpy_over_all_tokens(mixer):
    """Two batches against one pass over all tokens of both."""
    model, batches = small_model(mixer), small_batches()
    found, count = look_at(model, batches)
    observed = model.observe(torch.cat([idx for idx, _ in batches]))
    assert count == 5 * 16 and len(found) == len(observed) == 4
    assert [sublayer["name"] for sublayer in found] == ["0 attn", "0 mlp", "1 attn", "1 mlp"]
    for sublayer, seen in zip(found, observed):
        for name in ("mix", "read", "write"):
            values = getattr(seen, name).flatten(0, 1).double().numpy()
            np.testing.assert_allclose(sublayer[name], values.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(sublayer[f"{name}_spread"], values.std(0), atol=1e-5)
        M = seen.mix.flatten(0, 1).double().numpy()
        mean = M.mean(0)
        squared = ((M - mean) ** 2).sum((1, 2)).mean()
        assert sublayer["spread"] == pytest.approx(math.sqrt(squared), rel=1e-4)
        assert sublayer["from_identity"] == pytest.approx(np.linalg.norm(mean - np.eye(3)))
        assert sublayer["from_uniform"] == pytest.approx(np.linalg.norm(mean - np.ones((3, 3)) / 3))
        np.testing.assert_allclose(
            sublayer["singular_values"], np.linalg.svd(mean, compute_uv=False), rtol=1e-5
        )
        off = max(abs(M.sum(1) - 1).max(), abs(M.sum(2) - 1).max(), (-M).max())
        assert sublayer["ds_error"] == pytest.approx(off, rel=1e-4, abs=1e-6)
        a = np.abs(seen.read.flatten(0, 1).numpy())
        dominant = a.mean(0).argmax()
        assert sublayer["dominant_stream"] == dominant
        share = (a[:, dominant] / a.sum(1)).mean()
        assert sublayer["dominant_share"] == pytest.approx(share, rel=1e-4)


# ---- the loss with one M replaced ----------------------------------------------------------------


def test_a_replaced_matrix_is_the_one_that_mixes():
    """Replacing M by A gives the loss of the model whose parameters make A, token by token the
    same, and afterwards the model is as it was."""
    model, batches = small_model("hc", dynamic=False), small_batches()
    A = torch.randn(3, 3)
    usual = sequence_losses(model, batches)
    connection = model.blocks[1].hc_attn
    with replaced_mix(connection, A):
        replaced = sequence_losses(model, batches)
    with pytest.raises(KeyboardInterrupt), replaced_mix(connection, A):
        raise KeyboardInterrupt
    assert torch.equal(sequence_losses(model, batches), usual)
    with torch.no_grad():
        connection.bias[6:15] = A.flatten()  # three reads, three writes, then M row by row
    own = sequence_losses(model, batches)
    assert (own - usual).abs().max() > 1e-3
    torch.testing.assert_close(replaced, own, rtol=0, atol=1e-5)


def test_a_replaced_factor_of_a_plain_stream_is_the_one_that_scales():
    """Of s x + F(x) M is s: in place of s 1 gives the loss of the plain residual model."""
    batches = small_batches()
    model = small_model("residual", mix_scale="sublayer")
    means = [M.double() for M in model.mixing_matrices(batches[0][0])]
    before = sequence_losses(model, batches)
    with replaced_mix(model.blocks[1].hc_attn, torch.eye(1)):
        replaced = sequence_losses(model, batches)
    _, changes = loss_changes(model, means, batches)
    assert changes[2]["identity"][0] == pytest.approx((replaced - before).mean().item())
    assert abs(changes[2]["mean"][0]) > 1e-5

    with torch.no_grad():
        model.blocks[1].hc_attn.alpha.zero_()
        model.blocks[1].hc_attn.bias.zero_()  # exp(0) = 1
    own = sequence_losses(model, batches)
    assert (own - before).abs().max() > 1e-3
    torch.testing.assert_close(replaced, own, rtol=0, atol=1e-5)


def test_sequence_losses_are_the_models_loss():
    model = small_model("tbp")
    (idx, targets), *_ = small_batches()
    found = sequence_losses(model, [(idx, targets)]).mean().item()
    assert found == pytest.approx(model(idx, targets)[1].item(), rel=1e-5)


def test_where_the_loss_cannot_change_it_does_not():
    batches = small_batches()
    for mixer in ("residual", "identity"):
        model = small_model(mixer)
        means = [M.double() for M in model.mixing_matrices(batches[0][0])]
        loss, changes = loss_changes(model, means, batches)
        assert loss == pytest.approx(sequence_losses(model, batches).mean().item())
        assert len(changes) == 4
        for change in changes:
            assert change["identity"] == pytest.approx([0, 0], abs=1e-6)
            assert change["mean"] == pytest.approx([0, 0], abs=1e-6)
    model = small_model("tbp", dynamic=False)  # one M for all tokens: its mean is itself
    means = [M.double() for M in model.mixing_matrices(batches[0][0])]
    changes = loss_changes(model, means, batches)[1]
    assert max(abs(change["mean"][0]) for change in changes) < 1e-5
    # A doubly stochastic M does nothing to equal streams, which the first sublayer has, and nothing
    # to the mean of the streams, which is all that is read after the last.
    identity = [abs(change["identity"][0]) for change in changes]
    assert max(identity[0], identity[-1]) < 1e-6 and min(identity[1:-1]) > 1e-5


def test_loss_change_and_its_error_are_of_paired_sequences():
    model, batches = small_model("hc"), small_batches()
    means = [M.double() for M in model.mixing_matrices(batches[0][0])]
    _, changes = loss_changes(model, means, batches)
    before = sequence_losses(model, batches).numpy()
    with replaced_mix(model.blocks[0].hc_mlp, torch.eye(3)):
        after = sequence_losses(model, batches).numpy()
    expected = (after - before).mean(), (after - before).std(ddof=1) / math.sqrt(5)
    assert changes[1]["identity"] == pytest.approx(expected, rel=1e-5)


# ---- many runs: from files to curves -------------------------------------------------------------


def write_run(folder, losses, *, ms=100.0, interval=10, **knobs):
    """A run's files as train.py leaves them: an evaluation every `interval` steps from step 0."""
    folder.mkdir(parents=True)
    knobs = {
        **{"mixer": "tbp", "n_streams": 4, "seed": 1, "learning_rate": 1e-3, "min_lr": 1e-4},
        **{"total_batch_tokens": 256, "max_iters": (len(losses) - 1) * interval},
        **{"out_dir": str(folder), "data_dir": "data", "dataset": "tiny", "block_size": 16},
        "max_bad_steps": 10,
        **knobs,
    }
    (folder / "config.json").write_text(json.dumps({**knobs, "provenance": {"commit": None}}))
    lines = []
    for i, loss in enumerate(losses):
        step = i * interval
        if i:
            line = {"step": step, "loss": loss, "norm": 1.0, "norm_max": 1.0 + i, "ms": ms}
            lines.append(line)
        lines.append({"step": step, "val": loss, "gain": 1.0 + i})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_of_runs(tmp_path):
    """Mean, lowest and highest seed at the steps that all have; half a line is not read yet."""
    one = write_run(tmp_path / "a", [5.0, 3.0, 2.0], seed=1)
    two = write_run(tmp_path / "b", [5.0, 4.0, 2.5, 2.0], seed=2, ms=300.0, max_iters=20)
    with open(one / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "val": 1.')
    residual = write_run(
        tmp_path / "c", [5.0, 3.5, 2.25], seed=1, mixer="residual", n_streams=1, compile=False
    )
    points = curves.points_of(curves.read_results([one, two, residual]))
    assert [(p.arm, sorted(p.runs)) for p in points] == [("tbp", [1, 2]), ("residual", [1])]
    tbp, plain = curves.by_tokens(points, "val")
    assert tbp == ("tbp", "tbp", 2, [0, 2560, 5120], [5, 3.5, 2.25], [5, 3, 2], [5, 4, 2.5])
    assert plain.x == tbp.x and plain.low == plain.high == plain.mean == [5, 3.5, 2.25]
    assert curves.by_seconds(points, "val")[0].x == [0, 10 * 0.2, 20 * 0.2]  # the median run's
    (difference,) = curves.differences(points, "residual")
    assert difference.label == "tbp" and difference.seeds == 1
    assert difference.mean == pytest.approx([0, -0.5, -0.25])
    assert curves.by_tokens(points, "norm_max")[0].x == [2560, 5120]
    assert curves.tokens_of_a_step(points) == 256


def test_diverged_seeds_are_counted_and_not_averaged(tmp_path, capsys):
    write_run(tmp_path / "a", [5.0, 3.0, 2.0], seed=1)
    write_run(tmp_path / "b", [5.0, 9.0, None], seed=2)
    points = curves.points_of(curves.read_results([tmp_path]))
    assert "tbp: 1 of 2 diverged" in capsys.readouterr().out
    (curve,) = curves.by_tokens(points, "val")
    assert curve.seeds == 1 and curve.mean == curve.high == [5, 3, 2]
    assert curves.arms_in_order(points) == [("tbp", "tbp", "1 of 2 diverged")]


def test_a_run_that_was_given_up_has_diverged(tmp_path):
    """Its last evaluation was finite; then ten steps in a row were not, and train.py ended it."""
    folder = write_run(tmp_path / "a", [5.0, 3.0, 2.0])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "loss": null, "norm_max": null, "worst": 10, "ms": 100.0}\n')
    (result,) = curves.read_results([tmp_path])
    assert result["diverged"] and result["final_loss"] is None


def test_studies_that_sweep_the_rate_and_that_do_not(capsys):
    folders = [ROOT / "results" / name for name in ("constraint-english", "lean-english")]
    points = curves.points_of(curves.read_results(folders))
    assert [point.axes for point in points if point.arm == "hc"] == [{"learning_rate": 0.008}]
    assert "hc at learning rate 0.002 is left out" in capsys.readouterr().out


def test_a_folder_with_an_equals_sign_is_not_a_study_s(tmp_path):
    folder = write_run(tmp_path / "lr=1e-3" / "seed1", [5.0, 3.0], seed=1)
    (result,) = curves.read_results([folder])
    assert result["axes"] == {}


def test_arms_are_named_by_what_differs(tmp_path):
    folders = [
        write_run(tmp_path / "a", [5.0, 3.0], mixer="hc"),
        write_run(tmp_path / "b", [5.0, 3.0], mixer="hc", n_streams=8),
        write_run(tmp_path / "c", [5.0, 3.0], mixer="residual", n_streams=1),
        write_run(tmp_path / "d", [5.0, 3.0], mixer="tbp"),
    ]
    arms = [result["arm"] for result in curves.read_results(folders)]
    assert arms == ["hc", "hc, n_streams=8", "residual", "tbp"]
    arms = [result["arm"] for result in curves.read_results(folders[2:])]
    assert arms == ["residual", "tbp"]  # of one stream and of four


def test_runs_of_a_study_keep_their_arms(tmp_path):
    """As study.py lays them out, and as it keeps them in results."""
    knobs = {"n_streams": 8, "seed": 3}
    write_run(tmp_path / "wide" / "n_streams=8" / "seed3", [5.0, 3.0], **knobs)
    (result,) = curves.read_results([tmp_path])
    assert (result["arm"], result["axes"], result["seed"]) == ("wide", {"n_streams": 8}, 3)
    kept = {key: value for key, value in result.items() if key != "folder"}
    path = tmp_path / "results" / "wide" / "seed3.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(kept))
    (again,) = curves.read_results([tmp_path / "results"])
    assert again == {**kept, "folder": None}
    assert curves.label(curves.points_of([again])[0]) == "wide, n_streams=8"


def test_a_cell_that_was_run_again_counts_once(tmp_path):
    """As study.py --cell leaves it, beside the run of the study."""
    write_run(tmp_path / "tbp" / "seed1", [5.0, 3.0])
    again = write_run(tmp_path / "tbp" / "seed1-again1", [5.0, 3.0])
    (result,) = curves.read_results([tmp_path])
    (again / "result.json").write_text(json.dumps({**result, "folder": None}))
    assert curves.read_results([tmp_path]) == [result]


def test_differences_are_taken_at_the_same_swept_knobs(tmp_path):
    """Arms tbp and residual at two sizes of batch, and the losses of the four runs."""
    for arm, at_8, at_16 in (("residual", 3.0, 2.0), ("tbp", 2.75, 1.5)):
        for rows, loss in ((8, at_8), (16, at_16)):
            folder = tmp_path / arm / f"batch_size={rows}" / "seed1"
            write_run(folder, [5.0, loss], mixer=arm, batch_size=rows)
    points = curves.points_of(curves.read_results([tmp_path]))
    found = {curve.label: curve.mean for curve in curves.differences(points, "residual")}
    assert found == {"tbp, batch_size=16": [0, -0.5], "tbp, batch_size=8": [0, -0.25]}


def test_a_sweep_of_learning_rates_is_shown_at_its_best(tmp_path, capsys):
    low, high = {"learning_rate": 1e-3, "min_lr": 1e-4}, {"learning_rate": 2e-3, "min_lr": 2e-4}
    write_run(tmp_path / "a", [5.0, 3.0], **low)
    write_run(tmp_path / "b", [5.0, 2.0], **high)
    (point,) = curves.points_of(curves.read_results([tmp_path]))
    assert curves.label(point) == "tbp" and point.axes == {"learning_rate": 2e-3}
    assert "tbp at learning rate 0.001 is left out" in capsys.readouterr().out


def test_knobs_that_spoil_a_comparison_are_named(tmp_path):
    """A swept knob is no surprise: the labels have it."""
    for arm, dataset, size in (("tbp", "tiny", 8), ("tbp", "tiny", 16), ("hc", "other", 8)):
        folder = tmp_path / arm / f"total_batch_tokens={size}" / "seed1"
        write_run(folder, [5.0, 3.0], mixer=arm, dataset=dataset, total_batch_tokens=size)
    points = curves.points_of(curves.read_results([tmp_path]))
    assert curves.differing_knobs(points) == [
        "the runs differ in dataset, and not in the arm alone: other (hc, total_batch_tokens=8); "
        "tiny (tbp, total_batch_tokens=16, tbp, total_batch_tokens=8)"
    ]
    write_run(tmp_path / "long", [5.0, 3.0, 2.0])
    write_run(tmp_path / "short", [5.0, 3.0])
    points = curves.points_of(curves.read_results([tmp_path / "long", tmp_path / "short"]))
    (line,) = curves.differing_knobs(points)
    assert line.startswith("the runs differ in max_iters") and "20 (tbp" in line and "10 (" in line


def test_why_there_are_no_differences(tmp_path):
    write_run(tmp_path / "a", [5.0, 3.0], seed=1)
    residual = {"mixer": "residual", "n_streams": 1}
    write_run(tmp_path / "b", [5.0, 3.0], seed=2, **residual)
    write_run(tmp_path / "c", [5.0, None], seed=1, mixer="identity")

    def why(points, arm):
        assert not curves.last_differences(points, arm)
        return curves.why_no_differences(points, arm)

    points = curves.points_of(curves.read_results([tmp_path]))
    assert why(points, "hc") == "no arm of this name has a finished run"
    assert why(points, "residual") == "no seed of it is also a finished one of another arm"
    assert why(points, "identity") == "all its runs diverged"
    assert why(points[:1], "tbp") == "there is no other arm whose runs are finished"
    for arm, size in (("tbp", 8), ("hc", 16)):
        folder = tmp_path / "swept" / arm / f"total_batch_tokens={size}" / "seed1"
        write_run(folder, [5.0, 3.0], mixer=arm, total_batch_tokens=size)
    points = curves.points_of(curves.read_results([tmp_path / "swept"]))
    assert why(points, "hc") == "no other arm has the same swept knobs"


def test_the_arm_with_the_lowest_loss_comes_first(tmp_path):
    """And one without any loss last."""
    for mixer, loss in (("hc", 3.0), ("identity", None), ("tbp", 2.0)):
        write_run(tmp_path / mixer, [5.0, loss], mixer=mixer)
    arms = curves.arms_in_order(curves.points_of(curves.read_results([tmp_path])))
    assert [name for name, _, _ in arms] == ["tbp", "hc", "identity"]


def test_gains_by_depth_go_forward_and_back_with_a_band_over_seeds():
    kept = [
        {"arm": "hc", "mixer": "hc", "forward_gain_from_first": f, "backward_gain_to_last": b}
        for f, b in (([1.0, 2.0], [9.0, 5.0]), ([1.0, 4.0], [7.0, 5.0]))
    ]
    (forward,), (back,) = curves.by_depth(kept)
    assert forward == ("hc", "hc", 2, [0, 1], [1, 3], [1, 2], [1, 4])
    assert back == ("hc", "hc", 2, [0, 1], [8, 5], [7, 5], [9, 5])


def test_differences_are_taken_at_the_evaluations_that_both_have(tmp_path):
    """Of the reference one was not finite, and the last is still to come."""
    write_run(tmp_path / "a", [5.0, 3.0, 2.0, 1.5])
    plain = {"mixer": "residual", "n_streams": 1, "max_iters": 30}  # of which 20 are done
    write_run(tmp_path / "b", [5.0, None, 2.25], **plain)
    points = curves.points_of(curves.read_results([tmp_path]))
    for arm, sign in (("residual", 1), ("tbp", -1)):
        (curve,) = curves.differences(points, arm)
        assert curve.x == [0, 5120] and curve.mean == pytest.approx([0, sign * -0.25])


@pytest.fixture
def script(monkeypatch):
    """analyze.py as a module, with its defaults."""
    monkeypatch.setattr("sys.argv", ["analyze.py"])
    return importlib.import_module("analyze")


@pytest.mark.quick
def test_losses_are_compared_with_the_first_reference_that_is_there(script, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(script, "references", "residual,hc,tbp")
    monkeypatch.setattr(plots, "save", lambda path, draw, *given: drawn.append(given))
    for mixer in ("tbp", "hc", "identity"):
        write_run(tmp_path / mixer, [5.0, 3.0], mixer=mixer)
    script.draw_loss(curves.points_of(curves.read_results([tmp_path])), tmp_path)
    [(_, _, differences, name, _)] = drawn
    assert name == "hc" and {curve.label for curve in differences} == {"identity", "tbp"}


@pytest.mark.quick
def test_each_column_of_the_table_shows_its_own_number(script):
    gains = {"forward_gain_from_first": 1.6, "backward_gain_to_last": 1.7}
    gains |= {"forward_gain_to_last": 9.0, "backward_gain_from_first": 9.0}
    sublayer = {"name": "0 attn", "from_identity": 0.1, "from_uniform": 0.2, "spread": 0.4}
    sublayer |= {"singular_values": [0.31, 0.32, 0.33], "ds_error": 5e-7, "cosine": 0.8}
    sublayer |= {"effective_streams": 2.9, "dominant_stream": 3, "dominant_share": 0.45}
    sublayer["loss_change"] = {"identity": [0.01, 0.002], "mean": [-0.03, None]}
    found = {"checkpoint": "a.pt", "step": 6, "mixer": "hc", "n_streams": 4, "loss": 3.0}
    found |= {"composite_gain": 2.0, "loss_tokens": 4096, "sublayers": [sublayer | gains]}
    title, _, heading, row = script.table(found).splitlines()
    assert title == "a.pt: step 6, hc, n = 4, composite gain 2.000, loss 3.0000 on 4,096 tokens"
    wanted = {"sublayer": "0 attn", "M - I": "0.100", "M - 1/n": "0.200"}
    wanted |= {"sigma 1, 2": "0.310 0.320", "spread": "0.400", "ds error": "5e-07"}
    wanted |= {"forward": "1.60", "backward": "1.70", "cosine": "0.800", "streams": "2.90"}
    wanted |= {"reads most": "3: 45%", "loss, M = I": "+0.0100 ± 0.0020"}
    wanted["loss, M = mean"] = "-0.0300 ± -"
    headings, cells = (re.split("  +", line) for line in (heading, row))
    assert dict(zip(headings, cells, strict=True)) == wanted


def test_a_damaged_run_is_left_out_with_a_word(tmp_path, capsys):
    write_run(tmp_path / "a", [5.0, 3.0])
    damaged = [write_run(tmp_path / name, [5.0, 3.0], mixer="hc") for name in "bc"]
    (damaged[0] / "metrics.jsonl").write_text("{]\n")
    (damaged[1] / "config.json").write_text("{")
    assert len(curves.read_results([tmp_path])) == 1
    output = capsys.readouterr().out
    for folder in damaged:
        assert f"left out: {folder}" in output
    assert output.count(" damaged (") == 2


def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys):
    with pytest.raises(RunError, match="no run is there"):
        curves.read_results([tmp_path])
    write_run(tmp_path / "a", [5.0, 3.0])
    write_run(tmp_path / "b", [5.0, 2.0])
    with pytest.raises(ValueError, match="the same arm and the same seed"):
        curves.points_of(curves.read_results([tmp_path]))
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    assert len(curves.read_results([tmp_path])) == 1
    assert f"{tmp_path / 'b'} is left out: it has no evaluation yet" in capsys.readouterr().out


# ---- figures -------------------------------------------------------------------------------------


@pytest.mark.quick
def test_names_are_spread_apart_and_stay_near():
    assert plots.apart([0.2, 0.9, 0.5], 0.1) == pytest.approx([0.2, 0.9, 0.5])  # far enough
    assert plots.apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])  # about the middle
    assert plots.apart([0.0, 0.0], 0.1) == pytest.approx([0.0, 0.1])
    assert plots.apart([1.0, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    generator = np.random.default_rng(0)
    for count in range(1, 20):
        wanted = generator.random(count).round(1).tolist()
        places = plots.apart(wanted, 0.05)
        order = np.argsort(wanted, kind="stable")
        assert (np.diff(np.array(places)[order]) > 0.05 - 1e-9).all()
        assert min(places) >= 0 and max(places) <= max(1, 0.05 * (count - 1)) + 1e-9


@pytest.mark.quick
def test_the_steep_start_is_out_of_focus():
    def curve(x, low, high):
        return curves.Curve("tbp", "tbp", 2, x, low, low, high)

    long = curve([0, 10, 50, 100], [9.0, 3.0, 2.0, 1.0], [9.0, 4.0, 3.0, 2.0])
    assert plots.focus([long]) == pytest.approx((0.9, 3.1))  # from x = 20 on, and 5 % around
    begun = curve([0, 30], [9.0, 2.5], [9.0, 4.0])
    assert plots.focus([long, begun]) == pytest.approx((0.85, 4.15))
    assert plots.focus([curve([0], [9.0], [9.0])]) == pytest.approx((8.99, 9.01))


def check_figure(path):
    """A picture of 1200 pixels with something drawn in each quarter, small enough for a README."""
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    picture = imread(path)[..., :3]
    height, width = picture.shape[:2]
    assert width == 1200 and path.stat().st_size < 300e3
    drawn = np.abs(picture - to_rgb(plots.BACKGROUND)).max(-1) > 0.1
    for half in (drawn[: height // 2], drawn[height // 2 :]):
        for quarter in (half[:, : width // 2], half[:, width // 2 :]):
            assert quarter.mean() > 0.001


def test_figures_of_a_run_whose_numbers_are_not_finite(tmp_path):
    """All weights of a model are NaN; no gain of the run of metrics is finite."""
    pytest.importorskip("matplotlib")
    model, batches = small_model("tbp"), small_batches()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    sublayers, _ = look_at(model, batches)
    means = [torch.tensor(sublayer["mix"]) for sublayer in sublayers]
    for sublayer, gains in zip(sublayers, gains_by_depth(means)):
        sublayer.update(gains, loss_change={"identity": [math.nan] * 2, "mean": [math.nan] * 2})
    for loss in (None, math.nan):
        found = {"mixer": "tbp", "step": 6, "loss": loss, "sublayers": sublayers}
        plots.save(tmp_path / "analysis.png", run_figure.draw, found)

    folder = write_run(tmp_path / "a", [5.0, 3.0])
    metrics = (folder / "metrics.jsonl").read_text().replace('"gain": 1.0', '"gain": null')
    (folder / "metrics.jsonl").write_text(metrics.replace('"gain": 2.0', '"gain": null'))
    points = curves.points_of(curves.read_results([folder]))
    norms, gains = (curves.by_tokens(points, key) for key in ("norm_max", "gain"))
    assert norms and not gains
    plots.save(tmp_path / "training.png", plots.training_figure, norms, gains, 256)


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A folder with two runs of 6 steps: tbp, whose streams are in bfloat16, and residual."""
    from conftest import TINY

    out = tmp_path_factory.mktemp("runs")
    for mixer, n, dtype in (("tbp", 4, "bfloat16"), ("residual", 1, "float32")):
        words = [f"--mixer={mixer}", f"--n_streams={n}", f"--out_dir={out / mixer}"]
        words += [f"--dtype={dtype}", f"--stream_dtype={dtype}"]
        run("train.py", *TINY, f"--data_dir={tiny_data}", "--compile=False", *words)
    return out


KEYS = set(
    "name mix mix_spread read read_spread write write_spread spread from_identity from_uniform "
    "singular_values ds_error forward_gain_from_first backward_gain_from_first "
    "forward_gain_to_last backward_gain_to_last cosine effective_streams dominant_stream "
    "dominant_share loss_change".split()
)


@pytest.mark.parametrize("mixer, n", [("tbp", 4), ("residual", 1)])
def test_one_run(trained, tmp_path, mixer, n):
    pytest.importorskip("matplotlib")
    output = run(
        "analyze.py", f"--out_dir={trained / mixer}", "--tokens=64", "--loss_tokens=48",
        f"--out={tmp_path}",
    )  # fmt: skip
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert (found["mixer"], found["step"], found["n_streams"]) == (mixer, 6, n)
    assert (found["tokens"], found["loss_tokens"]) == (64, 48) and found["loss"] > 0
    assert found["composite_gain"] == pytest.approx(1, abs=1e-5)
    assert found["provenance"]["command"].startswith("analyze.py")
    assert len(found["sublayers"]) == 4
    for sublayer in found["sublayers"]:
        assert sublayer.keys() == KEYS and np.shape(sublayer["mix"]) == (n, n)
        assert sublayer["ds_error"] < 1e-5
        assert (sublayer["cosine"] is None) == (n == 1)
        assert sublayer["loss_change"].keys() == {"identity", "mean"}
    rows = [line for line in output.splitlines() if " attn " in line or " mlp " in line]
    assert len(rows) == 4 and len({len(row) for row in rows}) == 1
    check_figure(tmp_path / "analysis.png")
    heading = next(line for line in output.splitlines() if line.startswith("sublayer "))
    explained = run("analyze.py", "--help")
    assert all(word in explained for word in heading.replace("M - 1/n", "").split())
    assert "M - 1/n" in explained


def test_a_run_that_is_still_going(trained, tmp_path):
    """Its newest checkpoint may be half written: the one before it is looked at."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "going"
    shutil.copytree(trained / "tbp", folder)
    newest = sorted(folder.glob("ckpt_*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    output = run("analyze.py", f"--out_dir={folder}", "--tokens=16", "--loss_tokens=0")
    assert "warning" in output and ": step 4, tbp" in output
    found = json.loads((folder / "analysis.json").read_text())
    assert found["loss"] is None and found["sublayers"][0]["loss_change"] is None


def test_a_small_split_is_read_whole(trained, tmp_path):
    """By default more tokens would be read than the data set of these tests has."""
    pytest.importorskip("matplotlib")
    output = run("analyze.py", f"--out_dir={trained / 'residual'}", f"--out={tmp_path}")
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert 0 < found["tokens"] == found["loss_tokens"] < 8192
    said = f"val has {found['tokens']:,} tokens in whole sequences; all are read, not 8,192"
    assert output.count(said) == 1


def test_a_data_set_that_is_not_there_or_not_named(trained, tmp_path, tiny_data):
    """A copy of a run, as on another machine; and a converted checkpoint, which has no data set."""
    pytest.importorskip("matplotlib")
    here = [f"--out_dir={trained / 'residual'}", f"--out={tmp_path}", "--loss_tokens=0"]
    says = run("analyze.py", *here, f"--data_dir={tmp_path}", ok=False)
    assert "meta.json: no such file; to make it: " in says and says.endswith("--data_dir=…\n")
    state = torch.load(next(trained.glob("residual/ckpt_*.pt")))
    path, words = tmp_path / "converted.pt", [f"--out={tmp_path}", "--loss_tokens=0"]
    torch.save(state | {"config": {}}, path)
    says = run("analyze.py", f"--checkpoint={path}", *words, ok=False)
    assert f"{path} was converted, and names no data set" in says and "--dataset=" in says
    dataset = [f"--data_dir={tiny_data}", f"--dataset={state['config']['dataset']}"]
    assert "written: " in run("analyze.py", f"--checkpoint={path}", *words, *dataset)
    torch.save(state | {"config": {}, "tokenizer": "gpt2"}, path)
    says = run("analyze.py", f"--checkpoint={path}", *words, *dataset, ok=False)
    assert "was trained on tokens of gpt2" in says


def test_one_run_without_data_does_not_end_the_others(trained, tmp_path):
    pytest.importorskip("matplotlib")
    for folder in trained.iterdir():
        shutil.copytree(folder, tmp_path / "runs" / folder.name)
    for path in tmp_path.glob("runs/tbp/ckpt_*.pt"):
        torch.save(torch.load(path) | {"config": {"data_dir": "gone", "dataset": "tiny"}}, path)
    words = [f"--runs={tmp_path / 'runs'}", "--figure=gain", "--tokens=32", f"--out={tmp_path}"]
    output = run("analyze.py", *words)
    assert ", seed 1337, is not in gain.png: gone/tiny/meta.json: no such file" in output
    assert [r["arm"] for r in json.loads((tmp_path / "gain.json").read_text())["runs"]] == [
        "residual"
    ]


@pytest.mark.quick
def test_its_help_names_results_that_are_there():
    text = (ROOT / "analyze.py").read_text() + (ROOT / "curves.py").read_text()
    named = set(re.findall(r"results/[\w-]+", text))
    assert named and all((ROOT / name).is_dir() for name in named)


def test_many_runs(trained, tmp_path):
    """All figures; then that of the gains again, without checkpoints, from gain.json."""
    pytest.importorskip("matplotlib")
    out = f"--out={tmp_path}"
    output = run("analyze.py", f"--runs={trained}/*", "--tokens=32", out)
    assert (
        "study.png has no differences from identity: no arm of this name has a finished run"
        in output
    )
    for name in ("loss", "training", "study", "gain"):
        assert f"written: {tmp_path / name}.png" in output
        check_figure(tmp_path / f"{name}.png")
    kept = json.loads((tmp_path / "gain.json").read_text())["runs"]
    assert [run["tokens"] for run in kept] == [32, 32]
    assert [run["mixer"] for run in kept] == ["residual", "tbp"]
    assert kept[1]["forward_gain_from_first"] == pytest.approx([1] * 4, abs=1e-5)
    first = (tmp_path / "gain.png").read_bytes()
    bare = tmp_path / "bare"
    for folder in trained.iterdir():
        shutil.copytree(folder, bare / folder.name, ignore=shutil.ignore_patterns("*.pt"))
    run("analyze.py", f"--runs={bare}", "--figure=gain", out)
    assert (tmp_path / "gain.png").read_bytes() == first
    output = run("analyze.py", f"--runs={trained}/tbp,{bare}/residual", "--figure=gain", out)
    assert "1 of 2 runs have no checkpoint for gain.png" in output


def test_what_is_missing_is_said(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "a", [5.0, 3.0, 2.0], max_iters=21)  # one step is missing
    output = run("analyze.py", f"--runs={tmp_path}", f"--out={tmp_path / 'pictures'}")
    assert "tbp is not in study.png: it has runs that are not finished" in output
    assert (
        "no study.png: no differences from residual: no arm of this name has a finished run"
        in output
    )
    assert "no gain.png: no checkpoint in the runs" in output
    assert "loss.png has no differences: no run is of --references=residual,identity" in output
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "loss.png",
        "training.png",
    ]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--tokens=0", "tokens = 0 must be at least 1"),
        ("--loss_tokens=-1", "loss_tokens = -1 at least 0"),
        ("--out_dir=nowhere", "nowhere has no whole checkpoint; name a"),
        ("--runs=nowhere/*", "--runs=nowhere/*: there is no such folder"),
        ("--runs=config,nowhere", "--runs=nowhere: there is no such folder"),
        ("--runs=config --figure=loss", "config: no run is there"),
        ("--runs=config --figure=lots", "figure must be all or one of loss, training, study, gain"),
    ],
)
def test_refuses(words, said):
    assert said in run("analyze.py", *words.split(), ok=False)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(RunError, match="pip install matplotlib"):
        plots.save(Path("loss.png"), plots.gain_figure, [], [])
