"""What a training run must survive.

Kills, signals, damage, full disks, numbers that are not finite, and a long run.
"""

import os
import random
import shutil
import signal
import socket
import statistics
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    assert_same_run,
    load,
    rank_environment,
    records,
    run,
    run_ranks,
    same_weights,
    start_ranks,
    torchrun,
    wait_for,
    write_data_set,
)
from forks import Script

from checkpoint import latest

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def workers(process):
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


# ---- killed --------------------------------------------------------------------------------------


def wait_for_a_write(process, out_dir):
    """Returns while a checkpoint is being written, or when the process has ended."""
    while not any(name.endswith(".tmp") for name in os.listdir(out_dir)):
        if process.poll() is not None:
            return


@linux
@pytest.mark.parametrize(
    "n, processes, compiled, kills",
    [
        (2, 1, False, 5),
        *(
            pytest.param(*case, 20, marks=pytest.mark.long)
            for case in [(2, 1, False), (2, 2, False), (2, 1, True), (2, 2, True), (8, 1, True)]
        ),
    ],
)
def test_killed_at_any_moment(n, processes, compiled, kills, tiny, tmp_path, report):
    """SIGKILL at random moments, some while a checkpoint is written, until the run is through.

    It ends with the bits of a run that was never killed.
    """
    steps = 15 * kills
    tiny += [
        f"--max_iters={steps}",
        "--checkpoint_interval=1",
        "--eval_interval=20",
        f"--lr_decay_iters={steps}",
        "--init_from=auto",
        "--n_layer=1",
        f"--n_streams={n}",
        f"--compile={compiled}",
    ]
    command = torchrun(2, *tiny) if processes == 2 else tiny
    assert "finished" in run(*command)
    out_dir = tmp_path / "out"
    shutil.move(out_dir, tmp_path / "reference")
    generator, killed, writing = random.Random(0), 0, 0
    while killed < kills or writing < kills // 4:
        process = Script(command)
        starting = killed % 5 == 0
        for _ in range(generator.randrange(6)):
            wait_for(process, "" if starting else "step ")  # six lines come before the first step
        time.sleep(generator.uniform(0, 0.03))
        if killed % 2 and not starting:
            wait_for_a_write(process, out_dir)
        for pid in (process.pid, *workers(process)):
            os.kill(pid, signal.SIGKILL)
        output = process.finish()
        assert "finished" not in output, (
            f"too fast for {kills} kills: after {killed} it was through; take more steps"
        )
        killed += 1
        writing += any(out_dir.glob("*.tmp"))
    output = run(*command)
    assert "resumed" in output and "finished" in output and "another run" not in output, output
    report(
        f"killed {killed} times, {writing} of them while a checkpoint was being written: "
        "the same bits "
        f"({processes} process{'es' * (processes > 1)}, {'compiled' if compiled else 'eager'}, "
        f"{n} streams)"
    )
    for name in (f"ckpt_{steps:07d}.pt", "best.pt"):
        assert_same_run(tmp_path / "reference" / name, out_dir / name)
    assert records(out_dir) == records(tmp_path / "reference")
    assert not list(out_dir.glob("*.tmp"))


@linux
@pytest.mark.parametrize(
    "deaths", [[(25, 1)], pytest.param([(25, 1), (45, 0)], marks=pytest.mark.long)]
)
def test_torchrun_recovers_from_a_worker_that_dies(deaths, tiny, tmp_path):
    """deaths: (step, rank) of each."""
    tiny += [
        "--max_iters=60",
        "--checkpoint_interval=10",
        "--eval_interval=50",
        "--lr_decay_iters=60",
        "--init_from=auto",
    ]
    process = Script(torchrun(2, "--max-restarts=2", *tiny))
    for step, rank in deaths:
        wait_for(process, f"step {step}/")
        os.kill(workers(process)[rank], signal.SIGKILL)
    output = process.finish()
    assert (
        process.returncode == 0 and "resumed from" in output and "finished: 60 steps" in output
    ), output
    run_ranks(2, *tiny, f"--out_dir={tmp_path}/reference")
    assert_same_run(
        tmp_path / "reference" / "ckpt_0000060.pt", tmp_path / "out" / "ckpt_0000060.pt"
    )


# ---- stopped -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, processes",
    [
        (signal.SIGTERM, 1),
        (signal.SIGINT, 1),
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.long),
    ],
)
def test_a_signal_finishes_the_step_and_saves(number, processes, tiny, tmp_path):
    tiny += ["--max_iters=100000", "--checkpoint_interval=100000", "--eval_interval=100000"]
    process = Script(torchrun(2, *tiny) if processes == 2 else tiny)
    wait_for(process, "step 20/")
    process.send_signal(number)
    output = process.finish()
    assert (
        "by a signal; go on with --init_from=resume" in output
        and "Error" not in output.split("SignalException")[0]
    )
    assert processes > 1 or process.returncode == 0
    (newest,) = (tmp_path / "out").glob("ckpt_*.pt")
    assert load(newest)["step"] == records(tmp_path / "out")[-1]["step"] >= 20


def test_stops_between_log_lines_and_evaluations_change_nothing(tiny, tmp_path):
    tiny += [
        "--max_iters=12",
        "--lr_decay_iters=12",
        "--eval_interval=4",
        "--checkpoint_interval=100",
        "--log_interval=5",
        "--grad_clip=0.7",  # some of the steps
    ]
    run(*tiny, f"--out_dir={tmp_path}/reference")
    for calls in (4, 2, 1, 1):  # steps 4, an evaluation's, 6, 7 and 8
        stop = f"""
step = torch.optim.AdamW.step
def step_and_stop(self):
    if next(calls) == {calls}:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self)
torch.optim.AdamW.step = step_and_stop"""
        assert "by a signal" in run(*tiny, "--init_from=auto", patch=stop)
    run(*tiny, "--init_from=resume")
    for name in ("best.pt", "ckpt_0000012.pt"):
        assert_same_run(tmp_path / "reference" / name, tmp_path / "out" / name)
    assert records(tmp_path / "out") == records(tmp_path / "reference")


def test_an_evaluation_that_a_stop_forestalled_can_be_the_best(tiny, tmp_path):
    """A run stopped at step 4 evaluates it first when it is resumed, and it was the best."""
    stop = """
step = torch.optim.AdamW.step
def step_and_stop(self):
    if next(calls) == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self)
torch.optim.AdamW.step = step_and_stop"""
    tiny += ["--checkpoint_interval=100", "--warmup_iters=0"]
    assert "stopped at step 4" in run(*tiny, patch=stop)
    assert [line["step"] for line in records(tmp_path / "out") if "val" in line] == [0]
    run(*tiny, "--max_iters=8", "--learning_rate=1.0", "--min_lr=1.0", "--init_from=resume")
    vals = {line["step"]: line["val"] for line in records(tmp_path / "out") if "val" in line}
    assert sorted(vals) == [0, 4, 8] and min(vals, key=vals.get) == 4
    assert load(tmp_path / "out" / "best.pt")["step"] == 4


def test_a_signal_to_one_rank_stops_all_cleanly(tiny, tmp_path):
    ranks = start_ranks(2, *tiny, "--max_iters=100000", "--eval_interval=100000")
    wait_for(ranks[0], "step 20/")
    ranks[1].send_signal(signal.SIGTERM)
    outputs = [rank.finish() for rank in ranks]
    assert (
        [rank.returncode for rank in ranks] == [0, 0]
        and "by a signal" in outputs[0]
        and outputs[1] == ""
    ), outputs
    assert load(latest(tmp_path / "out"))["step"] == records(tmp_path / "out")[-1]["step"]


# ---- damaged, full -------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tiny, tmp_path):
    run(*tiny)
    reference = tmp_path / "reference.pt"
    newest = tmp_path / "out" / "ckpt_0000006.pt"
    shutil.copy(newest, reference)
    whole = bytearray(newest.read_bytes())
    for damage in ("truncated", "one bit"):
        if damage == "truncated":
            newest.write_bytes(whole[: len(whole) // 2])
        else:
            with zipfile.ZipFile(reference) as archive:  # in the middle of the largest tensor
                largest = max(archive.infolist(), key=lambda i: i.file_size)
            flipped = bytearray(whole)
            flipped[largest.header_offset + largest.file_size // 2 + 200] ^= 4
            newest.write_bytes(flipped)
        output = run(*tiny, "--init_from=resume")
        assert "warning" in output and "ckpt_0000006.pt" in output and "at step 4" in output
        assert_same_run(newest, reference)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_stops_the_run_and_space_lets_it_go_on(processes, tiny, small_disk, tmp_path):
    disk, grow = small_disk
    run_ranks(processes, *tiny)
    tiny += [
        f"--out_dir={disk}/out",
        "--init_from=auto",
        "--keep_checkpoints=9",
        "--checkpoint_interval=1",
    ]
    # The other rank ends as well, at once: none waits for another.
    first, *others = run_ranks(processes, *tiny, ok=False)
    assert "could not be written" in first and not any(others)
    assert latest(disk / "out") and not list(disk.glob("out/*.tmp"))
    grow()
    run_ranks(processes, *tiny)
    assert_same_run(disk / "out" / "ckpt_0000006.pt", tmp_path / "out" / "ckpt_0000006.pt")


# ---- not finite ----------------------------------------------------------------------------------


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(tiny, tmp_path):
    output = run(
        *tiny,
        "--learning_rate=1e38",
        "--min_lr=1e38",
        "--grad_clip=0.0",
        "--warmup_iters=0",
        "--max_bad_steps=3",
        "--max_iters=50",
        "--eval_interval=1000",
        "--checkpoint_interval=1",
        ok=False,
    )
    assert "1 not finite, skipped (3 in a row)" in output
    assert (
        "3 steps in a row" in output
        and f"newest checkpoint is {tmp_path}/out/ckpt_0000003.pt" in output
        and "Lower --learning_rate" in output
    )
    last = records(tmp_path / "out")[-1]
    assert last["bad"] == last["worst"] == 3
    assert last["skipped"] == 1 and last["loss"] is None


def test_a_row_of_bad_steps_between_two_log_lines_ends_the_run(tiny):
    bad = """
clip = torch.nn.utils.clip_grad_norm_
def clip_or_nan(*arguments):
    return clip(*arguments) * (float("nan") if next(calls) in (3, 4, 5) else 1)
torch.nn.utils.clip_grad_norm_ = clip_or_nan"""
    tiny += ["--max_iters=10", "--log_interval=10", "--eval_interval=1000"]
    assert "3 steps in a row had a loss" in run(*tiny, "--max_bad_steps=3", patch=bad, ok=False)
    assert "3 not finite, skipped (0 in a row)" in run(
        *tiny, "--max_bad_steps=4", "--init_from=auto", patch=bad
    )


# train.py, but the loss that the last rank computes in its third step is not a number. At the end
# each rank tells its weights.
POISON = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import model
forward, steps = model.GPT.forward, []
def poisoned(self, idx, targets=None):
    logits, loss = forward(self, idx, targets)
    if self.training:
        steps.append(self)
        last_rank = int(os.environ.get("WORLD_SIZE", 1)) - 1
        if len(steps) == 3 and int(os.environ.get("RANK", 0)) == last_rank:
            loss = loss * float("nan")
    return logits, loss
model.GPT.forward = poisoned
runpy.run_path("train.py", run_name="__main__")
weights = [parameter.double().sum().item() for parameter in steps[0].parameters()]
print("weights:", weights)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_one_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(processes, tiny, tmp_path):
    (tmp_path / "poison.py").write_text(POISON.format(root=str(ROOT)))
    tiny += ["--checkpoint_interval=1", "--keep_checkpoints=9"]
    tiny += [f"--total_batch_tokens={64 * processes}"]
    output = "".join(run_ranks(processes, tmp_path / "poison.py", *tiny[1:]))
    assert (
        "step 3/6 | loss nan" in output
        and "1 not finite, skipped (1 in a row)" in output
        and "finished: 6 steps" in output
    )
    found = {r["step"]: (r["skipped"], r["bad"]) for r in records(tmp_path / "out") if "loss" in r}
    assert found == {step: (1, 1) if step == 3 else (0, 0) for step in range(1, 7)}
    before, bad, after = (load(tmp_path / "out" / f"ckpt_000000{step}.pt") for step in (2, 3, 4))
    assert same_weights(before, bad) and not same_weights(bad, after)
    told = [line for line in output.splitlines() if line.startswith("weights:")]
    assert len(told) == processes and len(set(told)) == 1


def test_a_log_line_tells_of_all_the_steps_since_the_one_before(tiny, tmp_path):
    tiny += ["--max_iters=21", "--eval_interval=7", "--grad_clip=0.7"]
    run(*tiny)
    run(*tiny, f"--out_dir={tmp_path}/seldom", "--log_interval=6")
    often, seldom = (
        [r for r in records(tmp_path / out) if "loss" in r] for out in ("out", "seldom")
    )
    assert [r["step"] for r in seldom] == [1, 6, 12, 18]
    norms = [r["norm"] for r in often]
    assert all(
        r["clipped"] == (norm > 0.7) and r["norm_max"] == norm for r, norm in zip(often, norms)
    )
    for first, record in zip((0, 1, 6, 12), seldom):
        since = norms[first : record["step"]]
        assert record["norm_max"] == max(since)
        assert record["clipped"] == pytest.approx(statistics.mean(norm > 0.7 for norm in since))
    assert any(0 < r["clipped"] < 1 for r in seldom), "choose a --grad_clip that clips some"
    assert [r["step"] for r in records(tmp_path / "seldom") if "gain" in r] == [0, 7, 14, 21]


def test_float16_scales_the_loss_and_an_overflow_lowers_the_scale(tiny, tmp_path):
    tiny += ["--checkpoint_interval=1", "--keep_checkpoints=9"]
    run(*tiny)
    half = [*tiny, "--dtype=float16", f"--out_dir={tmp_path}/half"]
    overflow = """
unscale = torch.amp.GradScaler.unscale_
def overflow(self, optimizer):
    if next(calls) == 3:
        next(optimizer.param_groups[0]["params"][i] for i in (2,)).grad.fill_(float("inf"))
    unscale(self, optimizer)
torch.amp.GradScaler.unscale_ = overflow"""
    output = run(*half, patch=overflow)
    assert "1 not finite, skipped (1 in a row)" in output and "finished: 6 steps" in output
    states = [load(tmp_path / "half" / f"ckpt_{step:07d}.pt") for step in range(1, 7)]
    assert [state["scaler"]["scale"] for state in states] == [65536.0] * 2 + [32768.0] * 4
    assert same_weights(states[1], states[2]) and not same_weights(states[2], states[3])

    # The gradients are those of float32, whatever the scale.
    for a, b in zip(records(tmp_path / "out")[:3], records(tmp_path / "half")[:3]):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["norm"] == pytest.approx(b["norm"], rel=1e-2)

    newest = tmp_path / "half" / "ckpt_0000006.pt"
    shutil.move(newest, tmp_path / "wanted.pt")
    run(*half, "--init_from=resume")
    assert_same_run(newest, tmp_path / "wanted.pt")


# ---- two runs, two processes ---------------------------------------------------------------------


def test_two_runs_cannot_share_a_folder(tiny, tmp_path):
    process = Script([*tiny, "--max_iters=100000", "--eval_interval=100000"])
    try:
        wait_for(process, "step 3/")
        assert "another run is writing to" in run(*tiny, ok=False)
        with socket.socket() as taken:  # and the port of a run of several processes
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            output = run(*tiny, ok=False, **rank_environment(0, 2, port))
            assert (
                f"could not meet at 127.0.0.1:{port}" in output
                and "choose another: torchrun --standalone" in output
            )
    finally:
        process.kill()
        process.finish()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            ["--init_from=resume"],
            "RunError: {out} has no checkpoint to resume from",
        ),  # found by rank 0 alone
        ([], "train_000001.bin: checksum"),  # by the rank that reads this shard
        (
            ["--total_batch_tokens=64"],
            "batch_size 4 * block_size 16 * 2 processes = 128; nearest: 128",
        ),
    ],
)
def test_a_refusal_on_one_rank_is_one_on_all_and_said_once(
    arguments, says, tiny, tiny_data, tmp_path
):
    shutil.copytree(tiny_data, tmp_path / "data")
    with open(tmp_path / "data" / "tiny" / "train_000001.bin", "r+b") as shard:
        shard.seek(2000)
        shard.write(b"\1")
    outputs = run_ranks(2, *tiny, f"--data_dir={tmp_path}/data", *arguments, ok=False)
    assert "".join(outputs).count(says.format(out=tmp_path / "out")) == 1, outputs
    assert {path.name for path in tmp_path.glob("out/*")} <= {".lock"}
    if arguments == ["--init_from=resume"]:
        assert not (tmp_path / "out").exists()


# ---- long ----------------------------------------------------------------------------------------


@linux
@pytest.mark.long
@pytest.mark.parametrize("compiled", [False, True])
def test_20000_steps_leave_memory_and_file_handles_as_they_were(compiled, tiny, tmp_path, report):
    """Over 200 shards, with 50 epochs of them, 40 evaluations and 40 checkpoints."""
    write_data_set(tmp_path / "data" / "tiny", train=[260] * 200, val=[260] * 3)
    tiny += [f"--data_dir={tmp_path}/data", "--max_iters=20000", "--lr_decay_iters=20000"]
    tiny += ["--log_interval=100", "--eval_interval=500", "--checkpoint_interval=500"]
    process = Script([*tiny, f"--compile={compiled}"], timeout=3600)
    sizes, handles = {}, {}
    for line in process.stdout:
        if " | loss " in line:
            step = int(line.split("/")[0].removeprefix("step "))
            status = Path(f"/proc/{process.pid}/status").read_text().split()
            sizes[step] = int(status[status.index("VmRSS:") + 1]) / 1024
            handles[step] = len(os.listdir(f"/proc/{process.pid}/fd"))
    process.finish()
    assert process.returncode == 0
    growth = sizes[20000] / sizes[1000] - 1
    report(
        f"20,000 steps, {'compiled' if compiled else 'eager'}: {sizes[1000]:.1f} MB at step 1,000, "
        f"{sizes[20000]:.1f} MB at the end ({growth:+.2%}), largest {max(sizes.values()):.1f} MB; "
        f"file handles {handles[1000]}, {handles[20000]}"
    )
    assert growth < 0.02 and handles[20000] <= handles[1000]
