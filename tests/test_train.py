"""train.py and sample.py as subprocesses, as a user runs them."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import ROOT, assert_same_run, load, records, run, run_ranks, same_weights, torchrun

from data import read_meta, write_meta, write_shard
from mixers import MIXERS
from model import GPT, GPTConfig


@pytest.mark.parametrize(
    "mixer, n, knobs",
    [
        *((mixer, 1 if mixer == "residual" else 3, []) for mixer in MIXERS),
        ("tbp", 8, []),
        ("tbp", 8, ["--sees=input", "--readout=learned"]),
    ],
)
def test_trains_resumes_to_the_bit_and_samples(mixer, n, knobs, tiny, tmp_path):
    """Also with 8 streams, whose coefficients are tensors."""
    tiny += [f"--mixer={mixer}", f"--n_streams={n}", "--dropout=0.1", *knobs]
    output = run(*tiny)
    assert "step 6/6 | loss" in output and "finished: 6 steps" in output
    assert sorted(p.name for p in (tmp_path / "out").glob("*.pt")) == [
        "best.pt",
        "ckpt_0000004.pt",
        "ckpt_0000006.pt",
    ]

    shutil.copytree(tmp_path / "out", tmp_path / "killed")  # as if it had been killed after step 4
    (tmp_path / "killed" / "ckpt_0000006.pt").unlink()
    output = run(*tiny, f"--out_dir={tmp_path}/killed", "--init_from=resume")
    assert "at step 4" in output and "step 5/6" in output and "step 4/6 | loss" not in output
    assert_same_run(tmp_path / "out" / "ckpt_0000006.pt", tmp_path / "killed" / "ckpt_0000006.pt")
    assert records(tmp_path / "out") == records(tmp_path / "killed")
    assert [r["step"] for r in records(tmp_path / "out") if "loss" in r] == [1, 2, 3, 4, 5, 6]

    text = run(
        "sample.py",
        f"--out_dir={tmp_path}/killed",
        "--start=abc",
        "--num_samples=2",
        "--max_new_tokens=30",
        "--device=cpu",
        "--compile=False",
    )
    assert "--- sample 2 ---\nabc" in text


@pytest.mark.quick
def test_learns_and_writes_what_it_did(tiny, tmp_path):
    run(
        *tiny,
        "--max_iters=60",
        "--lr_decay_iters=60",
        "--eval_interval=20",
        "--checkpoint_interval=50",
        "--log_interval=10",
    )
    evaluations = [r["val"] for r in records(tmp_path / "out") if "val" in r]
    assert evaluations[0] > 5 and evaluations[-1] < 3.5
    assert all(abs(r["gain"] - 1) < 1e-5 for r in records(tmp_path / "out") if "val" in r)
    assert [r["step"] for r in records(tmp_path / "out") if "loss" in r] == [
        1,
        10,
        20,
        30,
        40,
        50,
        60,
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    state = load(tmp_path / "out" / "ckpt_0000060.pt")
    assert config.pop("provenance") == state["provenance"]
    assert (
        config["max_iters"] == 60
        and state["config"] == config
        and state["command"][0].endswith("train.py")
    )
    assert load(tmp_path / "out" / "best.pt")["best_val"] == min(evaluations)


def test_python_and_torchrun_of_one_process_are_the_same_run(tiny, tmp_path):
    run(*tiny)
    run(*torchrun(1, *tiny, f"--out_dir={tmp_path}/torchrun"), fresh=True)
    assert_same_run(tmp_path / "out" / "ckpt_0000006.pt", tmp_path / "torchrun" / "ckpt_0000006.pt")


def test_two_processes_are_one_and_a_run_may_change_their_number(tiny, tmp_path):
    """And so may the number of micro-steps: 1 process takes two, 2 processes take one each.

    An epoch is 39 steps.
    """
    tiny += ["--max_iters=45", "--lr_decay_iters=45", "--eval_interval=9"]
    run(*tiny)
    run_ranks(2, *tiny, f"--out_dir={tmp_path}/two", "--max_iters=27")
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    run(*tiny, f"--out_dir={tmp_path}/one", "--init_from=resume")
    run_ranks(2, *tiny, f"--out_dir={tmp_path}/two", "--init_from=resume")
    expected = records(tmp_path / "out")
    for other in (records(tmp_path / "one"), records(tmp_path / "two")):
        assert len(other) == len(expected) == 45 + 6
        for a, b in zip(expected, other):
            assert a["step"] == b["step"] and abs(a.get("loss", 0) - b.get("loss", 0)) < 1e-4
            assert abs(a.get("val", 0) - b.get("val", 0)) < 1e-4


def test_auto_begins_then_resumes_then_has_nothing_to_do(tiny, tmp_path):
    tiny.append("--init_from=auto")
    assert "resumed" not in run(*tiny, "--max_iters=3")
    assert "resumed" in run(*tiny)
    before = (tmp_path / "out" / "ckpt_0000006.pt").stat().st_mtime_ns
    assert "finished: 6 steps" in run(*tiny)
    assert (tmp_path / "out" / "ckpt_0000006.pt").stat().st_mtime_ns == before


def test_gpt2_weights_start_a_run(tiny, tmp_path):
    from model import GPT, GPTConfig

    model = GPT(
        GPTConfig(
            block_size=16,
            vocab_size=257,
            n_layer=2,
            n_head=2,
            n_embd=16,
            bias=False,
            mixer="residual",
            n_streams=1,
        )
    )
    names = {
        name: name.replace("embed.", "").replace("blocks.", "h.").replace("head.", "")
        for name in model.state_dict()
    }
    torch.save(
        {
            names[k]: v.t().contiguous() if v.ndim == 2 and "blocks" in k else v
            for k, v in model.state_dict().items()
        },
        tmp_path / "gpt2.bin",
    )
    run(
        *tiny,
        f"--init_from=gpt2:{tmp_path}/gpt2.bin",
        "--max_iters=1",
        "--learning_rate=0.0",
        "--min_lr=0.0",
    )
    mine = load(tmp_path / "out" / "ckpt_0000001.pt")["model"]
    assert all(
        torch.equal(tensor, mine[name][: len(tensor)])
        for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--mixer=tpb"], "unknown mixer 'tpb'"),
        (["--n_embd=15"], "n_embd 15 is not divisible by n_head 2"),
        (["--n_streams=1"], "n_streams must be at least 2, not 1"),
        (["--dataset=nothing"], "prepare_data.py"),
        (["--total_batch_tokens=100"], "nearest: 128"),
        (["--batch_size=3"], "is no multiple of batch_size 3"),
        (["--batch_size=5"], "nearest: 160; or keep it, with --batch_size=4"),
        (["--block_size=5000", "--total_batch_tokens=20000"], "block_size=5000"),
        (["--eval_tokens=1"], "choose --eval_tokens of at least 64"),
        (["--init_from=resume"], "no checkpoint to resume from"),
        (["--init_from=latest"], "must be scratch, resume, auto, gpt2"),
        (["--init_from=gpt2:nowhere.bin"], "nowhere.bin"),
        (["--device=cuda:99"], "device = cuda:99, but this torch"),
        (["--device=tpu"], "tpu"),
        (["--sinkhorn_rounds=5"], "tbp takes no option 'sinkhorn_rounds'; leave it at 20"),
        (["--dtype=float8"], "not 'float8'"),
        (["--out_dir=/proc/out"], "not writable"),
        (["--out_dir=README.txt/out"], "not writable (Not a directory)"),
        (
            ["--block_size=1500", "--total_batch_tokens=6000"],
            "longest shard of split 'val' has 1,000 tokens",
        ),
        (["--log_interval=0"], "log_interval must be at least 1, not 0"),
        (["--block_size=0"], "block_size must be at least 1, not 0"),
        (["--grad_clip=-1"], "grad_clip must be at least 0, not -1.0"),
        (["--connection_lr=-1"], "connection_lr must be at least 0, not -1.0"),
        (["--max_iters=-1"], "max_iters must be at least 0, not -1"),
        (["--warmup_iters=-1"], "warmup_iters must be at least 0, not -1"),
        (["--seed=-1"], "seed must be at least 0, not -1"),
        (["--learning_rate=3e-5"], "learning_rate = 3e-05 falls to min_lr = 6e-05"),
        (["--min_lr=-1e-5"], "min_lr must be at least 0, not -1e-05"),
        (["--learning_rate=1e999"], "learning_rate = inf"),
        (["--beta2=1"], "beta2 must be at least 0 and below 1, not 1.0"),
        (["--init_from="], "init_from is empty"),
        (["--dynamic=False", "--decay_phi=False"], "decay_phi is False, and this model has no phi"),
        (["--activation_memory_budget=2"], "must lie between 0 and 1, not 2.0"),
        (
            ["--stream_dtype=bfloat16", "--dtype=float32"],
            "streams in bfloat16 need branches in bfloat16",
        ),
        (["syntax_error.py"], "syntax_error.py:2: SyntaxError"),
        (["--learning_rat=1"], "did you mean --learning_rate?"),
        (["--max_iters=many"], "wanted int"),
        (["config/tpb.py"], "no such file; there are: config/tbp.py"),
    ],
)
def test_bad_input_is_refused_at_once(arguments, says, tiny, tmp_path):
    (tmp_path / "syntax_error.py").write_text("n_layer = 2\nn_head = = 2\n")
    (tmp_path / "README.txt").write_text("a file, not a folder")
    arguments = [
        argument.replace("syntax_error", f"{tmp_path}/syntax_error").replace(
            "README", f"{tmp_path}/README"
        )
        for argument in arguments
    ]
    output = run(*tiny, *arguments, ok=False)
    assert says in output, output
    assert not list(tmp_path.glob("out/*.pt")) and not (tmp_path / "out" / "metrics.jsonl").exists()


SHARD = "train_000000.bin"


def other_meta(folder, **changes):
    write_meta(folder, {**read_meta(folder), **changes})


def flip_a_bit(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)


def header(path, at, value):
    whole = bytearray(path.read_bytes())
    whole[4 * at : 4 * at + 4] = value.to_bytes(4, "little")
    path.write_bytes(whole)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: No such file"),
        (lambda folder: (folder / SHARD).write_bytes(b""), f"{SHARD}: 0 bytes"),
        (
            lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100]),
            f"{SHARD}: truncated",
        ),
        (lambda folder: flip_a_bit(folder / SHARD), f"{SHARD}: checksum"),
        (
            lambda folder: header(folder / SHARD, 0, 20240801),
            "magic 20240801 marks llm.c's Llama-3 shards of uint32",
        ),
        (
            lambda folder: header(folder / SHARD, 0, 20240326),
            "magic 20240326 marks another kind of llm.c file",
        ),
        (
            lambda folder: header(folder / SHARD, 0, 0x12345678),
            f"{SHARD}: 3,512 tokens, but meta.json says 3,000",
        ),  # raw uint16
        (lambda folder: header(folder / SHARD, 1, 2), "shard version 2, only version 1"),
        (
            lambda folder: (folder / SHARD).write_bytes(b"\1\0\0\0" * 3000),
            "these look like 32-bit tokens",
        ),
        (
            lambda folder: write_shard(folder / SHARD, [1] * 2999),
            "2,999 tokens, but meta.json says 3,000",
        ),
        (
            lambda folder: other_meta(folder, vocab_size=90),
            "token id 96 is outside the vocabulary of 90",
        ),
        (
            lambda folder: (folder / "meta.json").unlink(),
            "meta.json: no such file; to make it: python prepare_data.py",
        ),
        (lambda folder: (folder / "meta.json").write_text("{"), "meta.json: damaged"),
    ],
)
def test_a_damaged_data_set_is_refused_at_once(damage, says, tiny, tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    damage(tmp_path / "data" / "tiny")
    output = run(*tiny, f"--data_dir={tmp_path}/data", ok=False)
    assert says in output, output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}


def test_a_run_is_not_continued_on_other_data(tiny, tiny_data, tmp_path):
    """Neither with another tokenizer's ids nor with another order of the same tokens."""
    run(*tiny, "--max_iters=2")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    shutil.copytree(tiny_data, tmp_path / "data")
    folder = tmp_path / "data" / "tiny"
    other = [*tiny, f"--data_dir={tmp_path}/data", "--init_from=resume"]
    other_meta(folder, tokenizer="gpt2", vocab_size=50257)
    output = run(*other, ok=False)
    assert "tokenizer: 'bytes' -> 'gpt2'" in output and "vocab_size: 320 -> 50304" in output
    shutil.copy(tiny_data / "tiny" / "meta.json", folder)
    meta = read_meta(folder)
    meta["splits"]["train"]["shards"].reverse()
    write_meta(folder, meta)
    assert "shards: '5,000 training tokens, checksum " in run(*other, ok=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    shutil.copy(tiny_data / "tiny" / "meta.json", folder)
    assert "finished: 6 steps" in run(*other)  # the same data elsewhere is the same data


def test_a_run_is_not_written_over_nor_continued_as_another(tiny, tmp_path):
    run(*tiny, "--max_iters=2")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert "holds a run already" in run(*tiny, ok=False)
    changed = "--n_layer=3 --seed=7 --block_size=32 --connection_lr=2.0 --decay_phi=False".split()
    output = run(*tiny, "--init_from=resume", *changed, ok=False)
    for says in (
        "n_layer: 2 -> 3",
        "block_size: 16 -> 32",
        "seed: 1337 -> 7",
        "connection_lr: 1.0 -> 2.0",
        "decay_phi: True -> False",
        "may change everything but",
    ):
        assert says in output
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert "learning_rate: 0.01 -> 0.02" in run(*tiny, "--init_from=resume", "--learning_rate=0.02")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_knob_that_a_resumed_run_may_change_has_its_effect(tiny, tmp_path):
    run(*tiny, "--max_iters=4")
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    run(*tiny, "--init_from=resume")
    changes = ["--weight_decay=0.0", "--beta1=0.8", "--beta2=0.99"]
    other = [*tiny, f"--out_dir={tmp_path}/other", "--init_from=resume"]
    output = run(*other, *changes)
    for says in ("weight_decay: 0.1 -> 0.0", "beta1: 0.9 -> 0.8", "beta2: 0.95 -> 0.99"):
        assert says in output
    same, changed = (load(tmp_path / name / "ckpt_0000006.pt") for name in ("out", "other"))
    assert {group["weight_decay"] for group in same["optimizer"]["param_groups"]} == {0.1, 0}
    for group in changed["optimizer"]["param_groups"]:
        assert group["weight_decay"] == 0 and group["betas"] == (0.8, 0.99)
    assert not same_weights(same, changed)
    for start_only in ("--mix_start=0.5", "--alpha_start=0.1", "--read_start=0.5"):
        assert "the checkpoint is of another run" in run(*other, *changes, start_only, ok=False)


def test_changed_is_said_only_of_what_changes_the_run(tiny, tmp_path):
    run(*tiny, "--max_iters=2")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    moved = [*tiny, f"--out_dir={tmp_path}/moved", "--init_from=auto"]
    assert "changed since" not in run(*moved, "--max_iters=2")
    output = run(*moved, "--max_iters=4")
    assert "changed since the checkpoint: max_iters: 2 -> 4\n" in output


@pytest.mark.quick
def test_a_tilde_that_the_shell_left_is_the_home_folder(tiny, tmp_path):
    run(*tiny, "--out_dir=~/run", "--max_iters=2", HOME=str(tmp_path))
    bare = ["train.py", "--out_dir=~/run", "--init_from=resume", "--max_iters=4"]
    assert "finished: 4 steps" in run(*bare, HOME=str(tmp_path))
    assert load(tmp_path / "run" / "ckpt_0000004.pt")["config"]["out_dir"] == f"{tmp_path}/run"
    short = ["--device=cpu", "--compile=False", "--max_new_tokens=2", "--num_samples=1"]
    assert "step 4" in run("sample.py", "--out_dir=~/run", *short, HOME=str(tmp_path))
    run("analyze.py", "--out_dir=~/run", "--out=~/figures", "--device=cpu", HOME=str(tmp_path))
    assert (tmp_path / "figures" / "analysis.json").exists()
    assert not (ROOT / "~").exists()


@pytest.mark.quick
def test_a_bare_resume_has_the_knobs_of_the_run(tiny, tmp_path):
    tiny += ["--mixer=hc", "--n_streams=3", "--dropout=0.1", "--weight_decay=0.3"]
    run(*tiny)
    shutil.copy(tmp_path / "out" / "ckpt_0000006.pt", tmp_path / "wanted.pt")
    (tmp_path / "out" / "ckpt_0000006.pt").unlink()
    bare = ["train.py", "--init_from=resume", f"--out_dir={tmp_path}/out"]
    output = run(*bare)
    assert "at step 4" in output and "changed since" not in output and "out/config.json" in output
    assert_same_run(tmp_path / "out" / "ckpt_0000006.pt", tmp_path / "wanted.pt")
    knobs = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(knobs | {"n_experts": 2}))
    says = run(*bare, ok=False)
    assert f"{tmp_path}/out/config.json: this train.py has no knob n_experts" in says
    assert f"git checkout {knobs['provenance']['commit']}" in says
    (tmp_path / "out" / "config.json").write_text(json.dumps(knobs))
    output = run(*bare, "--max_iters=8", "--learning_rate=0.02")
    assert "changed since the checkpoint: max_iters: 6 -> 8, learning_rate: 0.01 -> 0.02" in output
    assert "finished: 8 steps" in output

    assert "no checkpoint to resume from" in run(*bare[:2], f"--out_dir={tmp_path}/none", ok=False)
    (tmp_path / "out" / "config.json").write_text('{"n_layer"')
    assert "config.json: damaged" in run(*bare, ok=False)
    (tmp_path / "out" / "config.json").unlink()
    assert "finished: 8 steps" in run(*tiny, "--init_from=resume", "--max_iters=8")


def test_evaluates_again_at_the_last_step_with_other_tokens(tiny, tmp_path):
    run(*tiny)
    before = records(tmp_path / "out")
    again = [*tiny, "--init_from=resume", "--eval_tokens=512"]
    assert "step 6/6 | val" in run(*again)
    *kept, last = records(tmp_path / "out")
    assert kept == before and last["step"] == 6 and last["val"] != before[-1]["val"]
    assert "step 6/6 | val" not in run(*again), "evaluated twice on the same tokens"
    state = load(tmp_path / "out" / "best.pt")
    assert state["step"] == 6 and state["best_val"] == last["val"]  # the old one is of other tokens


def test_the_best_is_the_one_with_the_lowest_loss(tiny, tmp_path):
    tiny += ["--eval_interval=2", "--warmup_iters=0"]
    run(*tiny, "--max_iters=6")
    worse = ["--learning_rate=1.0", "--min_lr=1.0", "--checkpoint_interval=100"]
    run(*tiny, "--max_iters=10", *worse, "--init_from=resume")
    vals = {line["step"]: line["val"] for line in records(tmp_path / "out") if "val" in line}
    best = min(vals, key=vals.get)
    assert 0 < best < 10, "choose rates with which it gets better and then worse"
    state = load(tmp_path / "out" / "best.pt")
    assert state["step"] == best and state["best_val"] == vals[best]
    end = load(tmp_path / "out" / "ckpt_0000010.pt")
    assert end["step"] == 10 and end["best_val"] == vals[best]


NAN_AT_FIRST = """
import batches
own, calls = batches.evaluate, []
def evaluate(*arguments):
    calls.append(arguments)
    val, gain = own(*arguments)
    return (val if len(calls) > 1 else float("nan")), gain
batches.evaluate = evaluate
"""


def test_a_loss_that_is_not_a_number_is_not_the_best(tiny, tmp_path):
    run(*tiny, "--eval_interval=2", patch=NAN_AT_FIRST)
    vals = {line["step"]: line["val"] for line in records(tmp_path / "out") if "val" in line}
    assert vals.pop(0) is None and len(vals) == 3
    best = min(vals, key=vals.get)
    state = load(tmp_path / "out" / "best.pt")
    assert state["step"] == best and state["best_val"] == vals[best]


def test_eval_only_evaluates_and_writes_nothing(tiny, tmp_path):
    output = run(*tiny)
    said = [line for line in output.splitlines() if line.startswith("step 6/6 | val")]
    before = contents(tmp_path / "out")
    for command in ([*tiny], ["train.py", f"--out_dir={tmp_path}/out"]):
        output = run(*command, "--init_from=resume", "--eval_only=True")
        assert output.splitlines()[-1] == said[0].replace("6/6", "6")
        assert contents(tmp_path / "out") == before
    assert "step 0 | val" in run(*tiny, f"--out_dir={tmp_path}/new", "--eval_only=True")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("knobs", ["--checkpoint_interval=2", "--learning_rate=0 --min_lr=0"])
def test_log_lines_time_steps_alone(knobs, tiny, tmp_path):
    """Neither evaluations nor checkpoints, each of which takes 1000 s here. At a rate of 0 no
    evaluation is better than the first, and none is followed by a checkpoint."""
    slow = """
import time, mixers, checkpoint
now, extra = time.perf_counter, []
time.perf_counter = lambda: now() + 1000 * len(extra)
gain, save = mixers.composite_gain, checkpoint.save
mixers.composite_gain = lambda *arguments: extra.append(1) or gain(*arguments)
checkpoint.save = lambda *arguments, **named: extra.append(1) or save(*arguments, **named)"""
    tiny += ["--log_interval=5", "--max_iters=10", "--checkpoint_interval=100"]
    run(*tiny, *knobs.split(), patch=slow)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    times = [line["ms"] for line in map(json.loads, lines) if "ms" in line]
    assert len(times) == 3 and max(times) < 100_000


def test_a_log_line_tells_the_time_left(tiny):
    output = run(*tiny, "--max_iters=4")
    lines = [line for line in output.splitlines() if " | loss " in line]
    assert [line.endswith(" left") for line in lines] == [False, True, True, False]


def test_mfu_is_a_share_of_the_peak_of_all_processes(tiny, tmp_path):
    for processes in (1, 2):
        out_dir = tmp_path / str(processes)
        output = run_ranks(processes, *tiny, "--peak_flops=1e9", f"--out_dir={out_dir}")[0]
        model = GPT(GPTConfig(**load(out_dir / "best.pt")["model_config"]))
        ideal_ms = model.flops_per_token() * 128 / (1e9 * processes) * 1e3
        for ms, share in re.findall(r"\| (\d+) ms .*\| mfu ([\d.]+)%", output)[1:]:
            assert float(share) / 100 * int(ms) == pytest.approx(ideal_ms, rel=0.2)


def test_a_refused_resume_makes_no_folder(tiny, tmp_path):
    folder = tmp_path / "nowhere" / "at" / "all"
    says = run(*tiny, f"--out_dir={folder}", "--init_from=resume", ok=False)
    assert f"{folder} has no checkpoint to resume from" in says
    assert not (tmp_path / "nowhere").exists()


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_checkpoint_cannot_run_code(script, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    torch.save({"model": RunsCode()}, tmp_path / "out" / "ckpt_0000001.pt")
    (tmp_path / "out" / "metrics.jsonl").write_text("")  # as if a run had written the checkpoint
    command = (
        [*tiny, "--init_from=resume"]
        if script == "train.py"
        else ["sample.py", f"--out_dir={tmp_path}/out"]
    )
    says = run(*command, ok=False)
    assert "refused, it holds more than tensors and plain values" in says
    assert "GLOBAL posix.mkdir" in says and "trust" not in says  # torch's advice is to trust it
    assert not (ROOT / "owned").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_checkpoint_of_another_model_is_refused(script, tiny, tmp_path):
    run(*tiny, "--max_iters=1")
    path = tmp_path / "out" / "ckpt_0000001.pt"
    state = torch.load(path)
    del state["model"]["embed.wpe.weight"]
    torch.save(state, path)
    command = (
        [*tiny, "--init_from=resume"]
        if script == "train.py"
        else ["sample.py", f"--out_dir={tmp_path}/out"]
    )
    assert (
        "not those of this model.py" in (says := run(*command, ok=False))
        and "embed.wpe.weight" in says
    )


def test_a_checkpoint_with_another_config_is_refused(tiny, tmp_path):
    run(*tiny, "--max_iters=1")
    state = torch.load(tmp_path / "out" / "ckpt_0000001.pt")
    for change in ({"n_kv_head": 2}, {"sees": "mean"}):
        fork = {**state, "model_config": state["model_config"] | change}
        torch.save(fork, tmp_path / "fork.pt")
        says = run("sample.py", f"--checkpoint={tmp_path}/fork.pt", ok=False)
        assert "RunError" in says and str(*change) in says and "Traceback" not in says
