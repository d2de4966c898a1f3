import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_same_run, load, run

import checkpoint
from checkpoint import RunError
from progress import Metrics


def state(step, size=1000):
    return {
        **dict.fromkeys(checkpoint.KEYS),
        "step": step,
        "model": {"w": torch.full((size,), float(step))},
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.quick
def test_the_newest_are_kept_and_the_best(tmp_path):
    for step, best in ((1, True), (2, True), (3, False), (4, False), (5, False)):
        path = checkpoint.save(tmp_path, state(step), keep=2, best=best)
        assert (tmp_path / "best.pt").samefile(path) == best, "one file, not two, on the disk"
    assert names(tmp_path) == ["best.pt", "ckpt_0000004.pt", "ckpt_0000005.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 2
    assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == 5


@pytest.mark.quick
@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "torch.save"])
def test_a_failure_while_writing_leaves_what_was_there(call, tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1), keep=1, best=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, fail)
    with pytest.raises(RunError, match="ones before it are unchanged.*--init_from=resume"):
        checkpoint.save(tmp_path, state(2), keep=1, best=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_what_was_there(small_disk):
    disk, grow = small_disk
    checkpoint.save(disk, state(1, 100_000), keep=2, best=True)
    checkpoint.save(disk, state(2, 100_000), keep=2, best=False)
    with pytest.raises(RunError, match="could not be written"):
        checkpoint.save(disk, state(3, 100_000), keep=2, best=False)
    assert names(disk) == ["best.pt", "ckpt_0000001.pt", "ckpt_0000002.pt"]
    assert checkpoint.load(checkpoint.latest(disk))["step"] == 2
    grow()
    checkpoint.save(disk, state(3, 100_000), keep=2, best=False)
    assert names(disk) == ["best.pt", "ckpt_0000002.pt", "ckpt_0000003.pt"]


@pytest.mark.quick
@pytest.mark.parametrize(
    "call, count",
    [("torch.save", 1), ("os.fsync", 1), ("os.link", 1), ("os.replace", 1), ("os.replace", 2)],
)
def test_killed_between_any_two_calls_no_checkpoint_is_lost(call, count, tmp_path, monkeypatch):
    """The process is gone before its `count`-th call: what is there is whole.

    And best.pt is no older than the newest.
    """
    checkpoint.save(tmp_path, state(1), keep=1, best=True)
    if not (child := os.fork()):
        calls = iter(range(count - 1))
        real = {"torch": torch, "os": os}[call.split(".")[0]].__dict__[call.split(".")[1]]
        monkeypatch.setattr(
            call, lambda *arguments: os._exit(9) if next(calls, None) is None else real(*arguments)
        )
        checkpoint.save(tmp_path, state(2), keep=1, best=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    newest = checkpoint.load(checkpoint.latest(tmp_path))["step"]
    assert newest <= checkpoint.load(tmp_path / "best.pt")["step"]
    checkpoint.lock(tmp_path).close()
    assert not list(tmp_path.glob("*.tmp"))
    checkpoint.save(tmp_path, state(3), keep=1, best=True)
    assert names(tmp_path) == [".lock", "best.pt", "ckpt_0000003.pt"]


@pytest.mark.quick
@pytest.mark.parametrize("init_from", ["auto", "auto:gpt2", "resume"])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(init_from, tmp_path):
    (tmp_path / "config.json").touch()
    for step in (2, 4):
        (tmp_path / f"ckpt_{step:07d}.pt").write_bytes(b"")
    with pytest.raises(RunError, match="none of the 2 checkpoints in .* is whole; begin again"):
        checkpoint.starting_point(tmp_path, init_from)


@pytest.mark.quick
def test_later_ones_that_are_damaged_do_not_count_as_the_newest(tmp_path):
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, state(step), keep=3, best=False)
    for step in (4, 6):
        (tmp_path / f"ckpt_{step:07d}.pt").write_bytes(b"")
    checkpoint.save(tmp_path, state(3), keep=1, best=False)
    assert (
        checkpoint.load(checkpoint.latest(tmp_path))["step"] == 3
        and not (tmp_path / "ckpt_0000002.pt").exists()
    )


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    """Records carry a checksum. What none covers (padding, timestamps) may change.

    What is loaded may not.
    """
    path = checkpoint.save(tmp_path, state(1, 300), keep=1, best=False)
    whole, wanted = path.read_bytes(), torch.full((300,), 1.0)
    noticed = 0
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            assert torch.equal(checkpoint.load(path)["model"]["w"], wanted), at
        except RunError:
            noticed += 1
    assert noticed > len(whole) / 7 / 3


@pytest.mark.quick
@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "not a whole checkpoint"),
        (b"PK\x03\x04nonsense", "not a whole checkpoint"),
        (None, "no such checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content, says, tmp_path):
    if content is not None:
        (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(RunError, match=says):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.quick
def test_a_folder_means_its_newest_whole_checkpoint(tmp_path, capsys):
    folder = tmp_path / "learning_rate=0.008"
    with pytest.raises(RunError, match="--out_dir=.*learning_rate=0.008"):
        checkpoint.find(folder)
    folder.mkdir()
    with pytest.raises(RunError, match="has no whole checkpoint; name a run that has, or train"):
        checkpoint.find(folder)
    for step in (1, 2):
        checkpoint.save(folder, state(step), keep=2, best=step == 1)
    first, second = folder / "ckpt_0000001.pt", folder / "ckpt_0000002.pt"
    assert checkpoint.find(str(folder)) == second
    second.write_bytes(b"")
    assert checkpoint.find(folder) == first and "ckpt_0000002.pt: not a" in capsys.readouterr().err
    assert checkpoint.find(second) == second, "a checkpoint that is named is not another one"
    assert checkpoint.find(folder / "best.pt") == folder / "best.pt"
    assert checkpoint.find(folder / "no.pt") == folder / "no.pt", "`load` says what is wrong"


@pytest.mark.quick
def test_another_kind_of_torch_file_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "x.pt")
    with pytest.raises(RunError, match="lacks best_val, command, config, .*, tokenizer"):
        checkpoint.load(tmp_path / "x.pt")
    torch.save(torch.zeros(3), tmp_path / "x.pt")
    with pytest.raises(RunError, match="a dict of tensors is wanted, not a Tensor"):
        checkpoint.load(tmp_path / "x.pt")


def test_the_lock_is_held_by_one_process_and_freed_by_its_death(tmp_path):
    code = (
        "import checkpoint, sys, time; held = checkpoint.lock(sys.argv[1]); "
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="another run is writing to"):
        checkpoint.lock(tmp_path)
    holder.kill()
    holder.wait()
    checkpoint.lock(tmp_path).close()


@pytest.mark.quick
def test_metrics_drop_what_lies_beyond_the_step_and_half_a_line(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 6):
        metrics.write(step=step, loss=float("nan") if step == 2 else 1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    Metrics(tmp_path, 3).write(step=4, loss=2.0)
    Metrics(tmp_path, 4)
    lines = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (1, 1.0),
        (2, None),
        (3, 1.0),
        (4, 2.0),
    ]
    Metrics(tmp_path, None)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_full_disk_is_no_traceback_for_metrics(small_disk):
    disk, grow = small_disk
    metrics = Metrics(disk, None)
    with pytest.raises(
        RunError, match="metrics.jsonl: could not be written .No space left.*--init_from=resume"
    ):
        for step in range(100_000):
            metrics.write(step=step, loss=1.0)
    metrics.file.close()
    grow()
    metrics = Metrics(disk, step)
    metrics.write(step=step, loss=1.0)
    metrics.file.close()
    assert len((disk / "metrics.jsonl").read_text().splitlines()) == step + 1


def fail_with(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.quick
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EMLINK])
def test_without_hard_links_the_best_is_a_copy(number, tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", fail_with(number))
    for step, best in ((1, True), (2, True), (3, False)):
        checkpoint.save(tmp_path, state(step), keep=1, best=best)
    assert names(tmp_path) == ["best.pt", "ckpt_0000003.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 2
    assert checkpoint.load(tmp_path / "ckpt_0000003.pt")["step"] == 3


@pytest.mark.quick
def test_a_copy_that_finds_the_disk_full_leaves_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", fail_with(errno.EPERM))
    checkpoint.save(tmp_path, state(1), keep=1, best=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("shutil.copyfileobj", fail_with(errno.ENOSPC))
    with pytest.raises(RunError, match="No space left on device.*ones before it are unchanged"):
        checkpoint.save(tmp_path, state(2), keep=1, best=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.quick
def test_without_file_locks_a_run_is_warned_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.flock", fail_with(errno.ENOLCK))
    (tmp_path / "best.tmp").write_bytes(b"half")
    checkpoint.lock(tmp_path).close()
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "another run" not in said
    assert f"{tmp_path} cannot be locked here (No locks available)" in said
    assert not (tmp_path / "best.tmp").exists()


# ---- checkpoints of commit 4e260d0, the first ones that others have -----------------------------

OLD_KEYS = "model optimizer step best_val evaluated tallied tally config model_config command "
OLD_KEYS += "tokenizer n_vocab shards"


def as_4e260d0_wrote_it(state, interval_map="plain"):
    """The same run's checkpoint in that commit's layout."""
    names = "block_size vocab_size n_layer n_head n_embd dropout bias mixer n_streams dynamic "
    names += "mix_start read_start stream_dtype"
    model_config = {name: state["model_config"][name] for name in names.split()}
    rounds = {"interval_map": interval_map, "sinkhorn_rounds": state["config"]["sinkhorn_rounds"]}
    config = {name: value for name, value in state["config"].items() if name != "eval_only"}
    old = {
        **{name: state[name] for name in OLD_KEYS.split() if name != "tallied"},
        "tallied": state["logged_step"],
        "config": config | {"interval_map": interval_map},
        "model_config": model_config | rounds,
    }
    return old


@pytest.mark.parametrize("mixer", ["sinkhorn", "tbp"])
def test_a_checkpoint_of_the_first_layout_resumes_and_samples(mixer, tiny, tmp_path):
    tiny += [f"--mixer={mixer}"] + ["--sinkhorn_rounds=7"] * (mixer == "sinkhorn")
    run(*tiny, "--checkpoint_interval=3", "--eval_interval=3")
    folder = tmp_path / "out"
    shutil.copy(folder / "ckpt_0000006.pt", tmp_path / "wanted.pt")
    (folder / "ckpt_0000006.pt").unlink()
    path = folder / "ckpt_0000003.pt"
    torch.save(as_4e260d0_wrote_it(load(path)), path)
    sample = ["sample.py", f"--checkpoint={path}", "--max_new_tokens=3", "--compile=False"]
    sample.append("--compile=False")
    assert "--- sample 3 ---" in run(*sample)
    config = json.loads((folder / "config.json").read_text())
    del config["provenance"], config["eval_only"]
    (folder / "config.json").write_text(json.dumps(config | {"interval_map": "plain"}))
    output = run("train.py", f"--out_dir={folder}", "--init_from=resume")
    assert "at step 3" in output and "changed since" not in output
    assert_same_run(folder / "ckpt_0000006.pt", tmp_path / "wanted.pt")


def test_the_interval_map_that_is_gone_is_refused(tiny, tmp_path):
    run(*tiny, "--max_iters=1")
    path = tmp_path / "out" / "ckpt_0000001.pt"
    torch.save(as_4e260d0_wrote_it(load(path), "scaled"), path)
    says = f"{path}: its interval_map is 'scaled', and only 'plain' is left"
    assert says in run("sample.py", f"--checkpoint={path}", ok=False)
    assert says in run(*tiny, "--init_from=resume", ok=False)


@pytest.mark.quick
@pytest.mark.parametrize("commit, clean", [("4e260d0", True), ("4e260d0", False), (None, None)])
def test_the_remedy_for_another_model_names_the_commit_and_its_changes(commit, clean):
    class OneField:
        def __init__(self, width):
            pass

    other = {"model_config": {"depth": 2}, "provenance": {"commit": commit, "clean": clean}}
    with pytest.raises(RunError) as raised:
        checkpoint.model_config("a.pt", other, OneField)
    message = str(raised.value)
    assert "Check out the commit that wrote it" in message
    assert ("git checkout 4e260d0" in message) == bool(commit)
    assert ("with changes that this commit lacks" in message) == (clean is False)


def test_metrics_that_cannot_be_opened_are_a_run_error(tmp_path):
    """Other ranks wait for this one: on_all_ranks passes a RunError on, and no OSError."""
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match="metrics.jsonl: could not be opened .*--out_dir"):
        Metrics(tmp_path, None)
