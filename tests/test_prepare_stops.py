"""prepare_data.py stopped, killed, out of disk space, and run again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from prepared import ROOT, TEXTS, content, run

import prepare_data
import workers
from data import verify

# A small standard library, and a kill -9 just before the `at`-th rename.
RUN = """
import os, pathlib, signal, sys, sysconfig
sys.path.insert(0, {root!r})
import prepare_data, workers
real, seen = os.replace, 0
def replace(*names):
    global seen
    seen += 1
    if seen == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
if __name__ == "__main__":
    os.replace = replace
    sysconfig.get_path = lambda name: {library!r}
    workers.CHUNK_CHARACTERS = 2000
    prepare_data.main({argv!r})
"""


# ---- stopping, continuing, finding it made -------------------------------------------------------


def in_a_process(cwd, library, at):
    """prepare_data.py with tiny shards, killed before its `at`-th rename. -> exit status"""
    cwd.mkdir(exist_ok=True)
    argv = ["--shard-tokens", "700", "--workers", "2", "--val-share", "0.3"]
    code = RUN.format(root=str(ROOT), at=at, library=str(library), argv=argv)
    (cwd / "run.py").write_text(code)  # a file, for where workers are not forked they load it again
    return subprocess.run(
        [sys.executable, "run.py"], cwd=cwd, capture_output=True, timeout=60
    ).returncode


def test_killed_anywhere_it_ends_with_the_same_bytes(library, here):
    assert in_a_process(here / "whole", library, at=0) == 0
    expected = content(here / "whole/data/stdlib")
    assert len(expected) > 8
    for at in 1, 2, 4, 9:
        cwd = here / f"killed_{at}"
        assert in_a_process(cwd, library, at) == -9
        assert "meta.json" not in content(cwd / "data/stdlib")
        assert in_a_process(cwd, library, at=0) == 0
        assert content(cwd / "data/stdlib") == expected
    cwd, kills = here / "killed_often", 0
    while in_a_process(
        cwd, library, at=6
    ):  # just enough for the shards of a chunk and their progress
        kills += 1
        assert kills < 12
    assert kills > 1 and content(cwd / "data/stdlib") == expected


def test_killed_workers_do_not_stay(library, here):
    in_a_process(here / "killed", library, at=3)
    time.sleep(0.5)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert os.readlink(process / "cwd") != str(here / "killed"), (
                process / "cmdline"
            ).read_bytes()
        except OSError:
            pass  # ended meanwhile, or another user's


def test_streaming_sources_continue_where_they_were(here, monkeypatch):
    for i in range(2):
        (here / f"{i}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in TEXTS[i::2])
        )
    monkeypatch.setattr(workers, "CHUNK_DOCUMENTS", 32)
    argv = ["--files", "?.jsonl", "--tokenizer", "bytes", "--shard-tokens", "5000", "--out", "out"]
    run(*argv)
    expected = content(here / "out")
    (here / "out").rename(here / "expected")
    saves, real = [], prepare_data.save_progress

    def stop(out, options, position, splits):
        real(out, options, position, splits)
        saves.append(position["documents"])
        if len(saves) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "save_progress", stop)
    run(*argv, fails="stopped; the same command continues")
    assert 0 < saves[-1] < 600 and "progress.npz" in content(here / "out")
    run(*argv)
    assert content(here / "out") == expected


def test_a_finished_data_set_is_reused_and_a_damaged_one_refused(library, capsys):
    run()
    path = Path("data/stdlib/train_000000.bin")
    before = path.stat().st_mtime_ns
    run()
    assert "already prepared" in capsys.readouterr().out and path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:-2] + b"\1\0")
    run(
        fails="train_000000.bin: checksum .* start over: rm -rf data/stdlib; python prepare_data.py"
    )


def test_files_that_changed_are_another_data_set(here):
    (here / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    argv = "--files", "a.jsonl", "--tokenizer", "bytes", "--out", "out"
    run(*argv)
    run(*argv)
    with open("a.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    run(*argv, fails="digest: the files are not the same ones, or were changed.*rm -rf out")


def test_a_run_that_stopped_at_a_bad_row_goes_on_without_it(here, monkeypatch, capsys):
    lines = [json.dumps({"text": text * 10}) for text in TEXTS]
    lines.insert(500, "{broken")
    (here / "a.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(workers, "CHUNK_DOCUMENTS", 32)
    argv = ["--files", "a.jsonl", "--tokenizer", "bytes", "--shard-tokens", "5000", "--out", "out"]
    run(*argv, "--val-share", 0.5, fails="a.jsonl, row 501: no JSON")
    assert any((here / "out").glob("*.bin"))
    run(*argv, "--val-share", 0.5, "--skip-unusable")
    assert "continuing after" in capsys.readouterr().out
    run(*argv[:-1], "whole", "--val-share", 0.5, "--skip-unusable")
    stopped, whole = content(here / "out"), content(here / "whole")
    assert {**stopped, "meta.json": 0} == {**whole, "meta.json": 0}


def test_other_options_are_refused_and_named(library, monkeypatch):
    run("--shard-tokens", 1000)
    run(
        "--shard-tokens",
        2000,
        fails="shard_tokens: 1000 there, 2000 asked.*rm -rf data/stdlib; python prepare_data.py",
    )
    real = prepare_data.Split.write

    def fail(split):
        real(split)
        if len(split.shards) == 2:
            prepare_data.save_progress(split.out, {"tokenizer": "gpt2"}, {}, [])
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data.Split, "write", fail)
    run("--shard-tokens", 1000, "--out", "b", fails="stopped")
    run("--shard-tokens", 1000, "--out", "b", fails="tokenizer: gpt2 there, bytes asked")


def test_a_first_attempt_that_wrote_nothing_binds_to_nothing(here):
    (here / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    argv = ["--files", "a.jsonl", "--tokenizer", "bytes", "--out", "a"]
    run(*argv, fails="no text in column 'text'.*--text-key, one of body")
    run(*argv, "--text-key", "body")
    assert verify(here / "a")


# ---- full disks ----------------------------------------------------------------------------------


def test_a_full_disk_is_survived(library):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); "
        f"sys.path.insert(0, {str(ROOT)!r}); import prepare_data, sysconfig; "
        f"sysconfig.get_path = lambda name: {str(library)!r}; "
        "prepare_data.main(['--shard-tokens', '100000', '--workers', '1'])"
    )
    full = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (
        full.returncode == 1
        and "train_000000.bin: could not be written (File too large)" in full.stderr
    )
    assert "Traceback" not in full.stderr and set(content(Path("data/stdlib"))) == {"progress.npz"}


def test_a_full_disk_is_survived_and_space_lets_it_go_on(small_disk, here, monkeypatch):
    """A real one: the shards that are whole stay, the one that is not goes, and in the end nothing
    differs."""
    disk, grow = small_disk
    (here / "a.jsonl").write_text("".join(json.dumps({"text": text * 40}) + "\n" for text in TEXTS))
    monkeypatch.setattr(workers, "CHUNK_DOCUMENTS", 32)
    argv = [
        "--files",
        "a.jsonl",
        "--tokenizer",
        "bytes",
        "--shard-tokens",
        100_000,
        "--val-share",
        0.2,
    ]
    run(*argv, "--out", here / "whole")
    run(
        *argv,
        "--out",
        disk / "out",
        fails="could not be written .No space left on device.*Free .* bytes and run this again",
    )
    left = content(disk / "out")
    assert (
        "progress.npz" in left and not any(name.endswith(".tmp") for name in left) and len(left) > 2
    )
    assert all(
        left[name] == (here / "whole" / name).read_bytes() for name in left if name.endswith(".bin")
    )
    grow()
    run(*argv, "--out", disk / "out")
    whole, there = content(here / "whole"), content(disk / "out")
    assert {**whole, "meta.json": 0} == {
        **there,
        "meta.json": 0,
    }  # which names the command, and so --out
