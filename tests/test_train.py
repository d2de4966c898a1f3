"""train.py and sample.py as subprocesses, as a user runs them."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import ROOT, TINY, run, torchrun
from mixers import MIXERS


@pytest.fixture
def tiny(tiny_data, tmp_path):
    """Arguments of a tiny run of 6 steps; out_dir is tmp_path / 'out'."""
    return ["train.py", *TINY, f"--data_dir={tiny_data}", f"--out_dir={tmp_path}/out", "--compile=False"]


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_run(a, b):
    """Everything that the rest of the run depends on, to the bit."""
    a, b = load(a), load(b)
    for key in ("step", "best_val", "evaluated", "model_config", "tokenizer", "n_vocab"):
        assert a[key] == b[key], key
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for i, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(moments[name], b["optimizer"]["state"][i][name]) for name in moments)


def records(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mixer", MIXERS)
def test_trains_resumes_to_the_bit_and_samples(mixer, tiny, tmp_path):
    tiny += [f"--mixer={mixer}", f"--n_streams={1 if mixer == 'residual' else 3}", "--dropout=0.1"]
    output = run(*tiny)
    assert "step 6/6 | loss" in output and "finished: 6 steps" in output
    assert sorted(p.name for p in (tmp_path / "out").glob("*.pt")) == ["best.pt", "ckpt_0000004.pt", "ckpt_0000006.pt"]

    shutil.copytree(tmp_path / "out", tmp_path / "killed")              # as if it had been killed after step 4
    (tmp_path / "killed" / "ckpt_0000006.pt").unlink()
    output = run(*tiny, f"--out_dir={tmp_path}/killed", "--init_from=resume")
    assert "at step 4" in output and "step 5/6" in output and "step 4/6 | loss" not in output
    assert_same_run(tmp_path / "out" / "ckpt_0000006.pt", tmp_path / "killed" / "ckpt_0000006.pt")
    strip = lambda out: [{k: v for k, v in r.items() if k not in ("ms", "data_ms")} for r in records(tmp_path / out)]
    assert strip("out") == strip("killed") and [r["step"] for r in strip("out") if "loss" in r] == [1, 2, 3, 4, 5, 6]

    text = run("sample.py", f"--out_dir={tmp_path}/killed", "--start=abc", "--num_samples=2", "--max_new_tokens=30", "--device=cpu")
    assert "--- sample 2 ---\nabc" in text


def test_learns_and_writes_what_it_did(tiny, tmp_path):
    run(*tiny, "--max_iters=60", "--lr_decay_iters=60", "--eval_interval=20", "--checkpoint_interval=50", "--log_interval=10")
    evaluations = [r["val"] for r in records(tmp_path / "out") if "val" in r]
    assert evaluations[0] > 5 and evaluations[-1] < 3.5
    assert all(abs(r["gain"] - 1) < 1e-5 for r in records(tmp_path / "out") if "val" in r)
    assert [r["step"] for r in records(tmp_path / "out") if "loss" in r] == [1, 10, 20, 30, 40, 50, 60]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    state = load(tmp_path / "out" / "ckpt_0000060.pt")
    assert config["max_iters"] == 60 and state["config"] == config and state["command"][0].endswith("train.py")
    assert load(tmp_path / "out" / "best.pt")["best_val"] == min(evaluations)


def test_python_and_torchrun_of_one_process_are_the_same_run(tiny, tmp_path):
    run(*tiny)
    torchrun(1, *tiny, f"--out_dir={tmp_path}/torchrun")
    assert_same_run(tmp_path / "out" / "ckpt_0000006.pt", tmp_path / "torchrun" / "ckpt_0000006.pt")


def test_two_processes_are_one_and_a_run_may_change_their_number(tiny, tmp_path):
    """And so may the number of micro-steps: 1 process takes two, 2 processes take one each."""
    run(*tiny)
    torchrun(2, *tiny, f"--out_dir={tmp_path}/two")
    torchrun(2, *tiny, f"--out_dir={tmp_path}/changed", "--max_iters=4")
    run(*tiny, f"--out_dir={tmp_path}/changed", "--init_from=resume")
    one = [r for r in records(tmp_path / "out")]
    for other in ("two", "changed"):
        if other == "changed":                  # its last evaluation fell on step 4 in any case
            assert len(records(tmp_path / other)) == len(one)
        for a, b in zip(one, records(tmp_path / other)):
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
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16, bias=False, mixer="residual", n_streams=1))
    names = {name: name.replace("embed.", "").replace("blocks.", "h.").replace("head.", "") for name in model.state_dict()}
    torch.save({names[k]: v.t().contiguous() if v.ndim == 2 and "blocks" in k else v for k, v in model.state_dict().items()},
               tmp_path / "gpt2.bin")
    run(*tiny, f"--init_from=gpt2:{tmp_path}/gpt2.bin", "--max_iters=1", "--learning_rate=0.0", "--min_lr=0.0")
    mine = load(tmp_path / "out" / "ckpt_0000001.pt")["model"]
    assert all(torch.equal(tensor, mine[name][:len(tensor)]) for name, tensor in model.state_dict().items())


def start(command, processes=1):
    """The run in the background; its output in a pipe."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *launcher, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_finishes_the_step_and_saves(number, processes, tiny, tmp_path):
    process = start([*tiny, "--max_iters=100000", "--checkpoint_interval=100000", "--eval_interval=100000"], processes)
    wait_for(process, "step 20/")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert "by a signal; go on with --init_from=resume" in output and "Error" not in output.split("SignalException")[0]
    assert processes > 1 or process.returncode == 0
    newest, = (tmp_path / "out").glob("ckpt_*.pt")
    assert load(newest)["step"] == records(tmp_path / "out")[-1]["step"] >= 20


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(tiny, tmp_path):
    output = run(*tiny, "--learning_rate=1e38", "--min_lr=1e38", "--grad_clip=0.0", "--warmup_iters=0", "--max_bad_steps=3",
                 "--max_iters=50", "--eval_interval=1000", "--checkpoint_interval=1", ok=False)
    assert "not finite, skipped (3 in a row)" in output
    assert "3 steps in a row" in output and "last good checkpoint is" in output and "Lower --learning_rate" in output
    last = records(tmp_path / "out")[-1]
    assert last["bad"] == 3 and last["loss"] is None


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tiny, tmp_path):
    run(*tiny)
    reference = tmp_path / "reference.pt"
    newest = tmp_path / "out" / "ckpt_0000006.pt"
    shutil.copy(newest, reference)
    whole = bytearray(newest.read_bytes())
    for damage in ("truncated", "one bit"):
        if damage == "truncated":
            newest.write_bytes(whole[:len(whole) // 2])
        else:
            with zipfile.ZipFile(reference) as archive:         # in the middle of the largest tensor
                largest = max(archive.infolist(), key=lambda i: i.file_size)
            flipped = bytearray(whole)
            flipped[largest.header_offset + largest.file_size // 2 + 200] ^= 4
            newest.write_bytes(flipped)
        output = run(*tiny, "--init_from=resume")
        assert "warning" in output and "ckpt_0000006.pt" in output and "at step 4" in output
        assert_same_run(newest, reference)


@pytest.mark.parametrize("arguments, says", [
    (["--mixer=tpb"], "unknown mixer 'tpb'"),
    (["--n_embd=15"], "n_embd 15 is not divisible by n_head 2"),
    (["--n_streams=1"], "n_streams must be at least 2, not 1"),
    (["--dataset=nothing"], "prepare_data.py"),
    (["--total_batch_tokens=100"], "nearest: 128"),
    (["--batch_size=3"], "is no multiple of batch_size 3"),
    (["--block_size=5000", "--total_batch_tokens=20000"], "block_size=5000"),
    (["--eval_tokens=100000"], "choose --eval_tokens from"),
    (["--eval_tokens=1"], "choose --eval_tokens from 64"),
    (["--init_from=resume"], "no checkpoint to resume from"),
    (["--init_from=latest"], "must be scratch, resume, auto or gpt2:FILE, not 'latest'"),
    (["--init_from=gpt2:nowhere.bin"], "nowhere.bin"),
    (["--device=cuda"], "has no CUDA"),
    (["--device=tpu"], "tpu"),
    (["--dtype=float8"], "not 'float8'"),
    (["--out_dir=/proc/out"], "not writable"),
    (["--learning_rat=1"], "did you mean --learning_rate?"),
    (["--max_iters=many"], "wanted int"),
    (["config/tpb.py"], "no such config file"),
])
def test_bad_input_is_refused_at_once(arguments, says, tiny, tmp_path):
    if "cuda" in arguments[0] and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    output = run(*tiny, *arguments, ok=False)
    assert says in output, output
    assert not list(tmp_path.glob("out/*.pt")) and not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_run_is_not_written_over_nor_continued_as_another(tiny, tmp_path):
    run(*tiny, "--max_iters=2")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert "holds a run already" in run(*tiny, ok=False)
    output = run(*tiny, "--init_from=resume", "--n_layer=3", "--seed=7", ok=False)
    assert "n_layer: 2 -> 3" in output and "seed: 1337 -> 7" in output and "may change everything but" in output
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert "learning_rate: 0.01 -> 0.02" in run(*tiny, "--init_from=resume", "--learning_rate=0.02")


def test_two_runs_cannot_share_a_folder(tiny, tmp_path):
    process = start([*tiny, "--max_iters=100000", "--eval_interval=100000"])
    try:
        wait_for(process, "step 3/")
        assert "another run is writing to" in run(*tiny, ok=False)
    finally:
        process.kill()
        process.wait()


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_checkpoint_cannot_run_code(script, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    torch.save({"model": RunsCode()}, tmp_path / "out" / "ckpt_0000001.pt")
    command = [*tiny, "--init_from=resume"] if script == "train.py" else ["sample.py", f"--out_dir={tmp_path}/out"]
    assert "refused, it holds more than tensors and plain values" in run(*command, ok=False)
    assert not (ROOT / "owned").exists()


@pytest.mark.parametrize("arguments, says", [
    (["--out_dir=nowhere"], "nowhere has no checkpoint"), (["--checkpoint=no.pt"], "no.pt: no such checkpoint"),
    (["--checkpoint=README.md"], "not a whole checkpoint"), (["--temperature=-1"], "temperature -1"),
])
def test_sample_refuses(arguments, says):
    assert says in run("sample.py", *arguments, ok=False)


def test_samples_from_a_file_and_repeats_with_a_seed(tiny, tmp_path):
    run(*tiny, "--max_iters=1")
    (tmp_path / "prompt.txt").write_text("from a file")
    command = ["sample.py", f"--out_dir={tmp_path}/out", f"--start=FILE:{tmp_path}/prompt.txt", "--top_p=0.9", "--top_k=0", "--device=cpu"]
    text = run(*command)
    assert "from a file" in text and text == run(*command) and text != run(*command, "--seed=2")
    assert "prompt2" in run(*command, f"--start=FILE:{tmp_path}/prompt2.txt", ok=False)


def workers(process):
    return [int(pid) for pid in (Path("/proc") / f"{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds a launcher's workers in /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment(processes, tiny, tmp_path):
    """SIGKILL at random moments until the run is through; its end is that of a run that was never killed."""
    tiny += ["--max_iters=150", "--checkpoint_interval=1", "--eval_interval=50", "--lr_decay_iters=150", "--init_from=auto"]
    output, _ = start(tiny, processes).communicate(timeout=300)
    assert "finished" in output, output
    shutil.move(tmp_path / "out", tmp_path / "reference")
    generator = random.Random(0)
    for _ in range(20 if processes == 1 else 5):
        process = start(tiny, processes)
        if generator.random() < 0.8:                # else while it is still starting
            wait_for(process, "step ")
        time.sleep(generator.uniform(0, 0.5))
        for pid in (process.pid, *workers(process)):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    output, _ = start(tiny, processes).communicate(timeout=300)
    assert "finished" in output and "another run" not in output, output
    assert_same_run(tmp_path / "reference" / "ckpt_0000150.pt", tmp_path / "out" / "ckpt_0000150.pt")
    assert [r["step"] for r in records(tmp_path / "out") if "loss" in r] == list(range(1, 151))


@pytest.mark.skipif(sys.platform != "linux", reason="finds a launcher's workers in /proc")
def test_torchrun_recovers_from_a_worker_that_dies(tiny, tmp_path):
    tiny += ["--max_iters=150", "--checkpoint_interval=10", "--eval_interval=50", "--lr_decay_iters=150", "--init_from=auto"]
    process = start(["--max-restarts=3", *tiny], processes=2)
    wait_for(process, "step 25/")
    os.kill(workers(process)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "finished: 150 steps" in output, output
    torchrun(2, *tiny, f"--out_dir={tmp_path}/reference")
    assert_same_run(tmp_path / "reference" / "ckpt_0000150.pt", tmp_path / "out" / "ckpt_0000150.pt")
