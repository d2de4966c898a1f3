"""Runs scripts as a user does, on a data set small enough for a test."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY = (
    "--dataset=tiny --block_size=16 --n_layer=2 --n_head=2 --n_embd=16 --batch_size=4 "
    "--total_batch_tokens=128 --eval_tokens=256 --eval_interval=4 --checkpoint_interval=2 "
    "--max_iters=6 --warmup_iters=2 --lr_decay_iters=6 --learning_rate=1e-2 --device=cpu"
).split()


# Runs each command of stdin in a fork of a process that has loaded what takes seconds to load.
FORKS = """
import json, os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
import checkpoint, configurator, data, model, tiktoken, torch._dynamo
import torch.distributed.elastic.multiprocessing.errors
for line in sys.stdin:
    command, output, timeout, env = json.loads(line)
    if not (child := os.fork()):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        os.environ.update(env)
        signal.alarm(timeout)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def forks():
    server = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    atexit.register(lambda: (server.stdin.close(), server.wait()))
    return server


def run(*command, ok=True, timeout=300, **env):
    """The output of a script of this project, run as if from the command line.

    ok=False: it must fail, and without a traceback.
    """
    if command[0] in ("train.py", "sample.py", "eval.py", "analyze.py", "bench.py"):
        server = forks()
        with tempfile.NamedTemporaryFile("r") as file:
            print(
                json.dumps([[*map(str, command)], file.name, timeout, env]),
                file=server.stdin,
                flush=True,
            )
            status, output = int(server.stdout.readline()), file.read()
    else:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )
        status, output = done.returncode, done.stdout + done.stderr
    assert (status == 0) == ok and status >= 0, output
    assert ok or "Traceback" not in output, output
    return output


def run_with(patch, *command, **kwargs):
    """run(), after the statements `patch`, which change torch before the script uses it."""
    head = (
        "import itertools, os, runpy, signal, sys, torch\n"
        "sys.path.insert(0, os.getcwd())\n"
        "calls = itertools.count(1)\n"
    )
    tail = "\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    return run("-c", head + patch + tail, *command, **kwargs)


def torchrun(processes, *command, **kwargs):
    return run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *command,
        **kwargs,
    )


def start(command, processes=1, **env):
    """The run in the background, alone or under torchrun; its output in a pipe."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, command)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        start_new_session=True,
    )


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came")


def records(out_dir):
    """metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("ms", "data_ms")}
        for line in lines
    ]


def load(path):
    return torch.load(path, weights_only=True)


def same_weights(a, b):
    """Whether two loaded checkpoints have the same weights and moments, to the bit."""
    moments, others = a["optimizer"]["state"], b["optimizer"]["state"]
    return (
        a["model"].keys() == b["model"].keys()
        and moments.keys() == others.keys()
        and all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
        and all(
            torch.equal(moments[i][name], others[i][name]) for i in moments for name in moments[i]
        )
    )


def assert_same_run(a, b):
    """Everything that the rest of the run depends on, to the bit."""
    a, b = load(a), load(b)
    for key in (
        "step",
        "best_val",
        "evaluated",
        "logged_step",
        "tally",
        "scaler",
        "model_config",
        "tokenizer",
        "n_vocab",
        "shards",
    ):
        assert a[key] == b[key], key
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"] and same_weights(a, b)


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="run what takes minutes to an hour as well"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes to an hour; runs with --long")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes to an hour; pass --long"))


@pytest.fixture
def report(record_property):
    """A line for the summary at the end: a figure that was measured."""
    return lambda line: record_property("figure", line)


def pytest_terminal_summary(terminalreporter):
    for test in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if lines := [
            line for name, line in test.user_properties if name == "figure" and test.when == "call"
        ]:
            terminalreporter.write_line("\n".join(lines))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, and a function that makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs takes root")
    disk_and_grow = (
        disk,
        lambda: subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True),
    )
    yield disk_and_grow
    subprocess.run(["umount", "-l", disk], check=True)


def write_data_set(folder, **lengths):
    """Byte tokens in a pattern that a small model learns a little of.

    lengths: of the shards of each split.
    """
    from data import scan, write_meta, write_shard

    generator, splits = np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for split, counts in lengths.items():
        splits[split] = {"tokens": sum(counts), "documents": len(counts), "shards": []}
        for i, count in enumerate(counts):
            tokens = (np.cumsum(generator.integers(1, 4, count)) % 97).astype(np.uint16)
            write_shard(folder / f"{split}_{i:06d}.bin", tokens)
            splits[split]["shards"].append(
                {"file": f"{split}_{i:06d}.bin", "tokens": count, "crc32": scan(tokens)[0]}
            )
    write_meta(
        folder,
        {
            "tokenizer": "bytes",
            "vocab_size": 257,
            "eot_token": 256,
            "source": {"kind": "test"},
            "command": "the tests",
            "splits": splits,
        },
    )


def write_checkpoint(folder, model, tokenizer="bytes", n_vocab=257, step=1):
    """The checkpoint of a run in `folder` whose model is `model`. -> its path."""
    import checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    state = dict.fromkeys(checkpoint.KEYS) | {
        "model": model.state_dict(),
        "model_config": asdict(model.config),
        "tokenizer": tokenizer,
        "n_vocab": n_vocab,
        "step": step,
        "provenance": {"commit": "c0ffee", "clean": True, "torch": "2", "command": "train.py"},
    }
    return checkpoint.save(folder, state, keep=1, best=False)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data folder with `tiny`, in two train shards."""
    folder = tmp_path_factory.mktemp("data")
    write_data_set(folder / "tiny", train=(3000, 2000), val=(1000,))
    return folder


@pytest.fixture
def tiny(tiny_data, tmp_path):
    """Arguments of a tiny run of 6 steps; out_dir is tmp_path / 'out'."""
    return [
        "train.py",
        *TINY,
        f"--data_dir={tiny_data}",
        f"--out_dir={tmp_path}/out",
        "--compile=False",
    ]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def library(here, monkeypatch):
    """A standard library of 120 texts, and files that do not belong to it."""
    from prepared import TEXTS

    folder = here / "library"
    for i, text in enumerate(TEXTS[:120]):
        file = folder / f"package_{i % 7}" / f"module_{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for skipped in (
        "test/a.py",
        "package_1/tests/a.py",
        "site-packages/a.py",
        "_sysconfigdata_linux.py",
    ):
        (folder / skipped).parent.mkdir(exist_ok=True)
        (folder / skipped).write_text("SKIPPED")
    (folder / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(folder))
    return folder


@pytest.fixture
def gpt2_forgotten():
    """tiktoken and get_tokenizer keep what they have loaded."""
    import tiktoken.registry

    import tokenizer

    tokenizer._named_tokenizer.cache_clear()
    tiktoken.registry.ENCODINGS.pop("gpt2", None)


@pytest.fixture
def gpt2_cache(tmp_path, monkeypatch, gpt2_forgotten):
    """A copy, since tiktoken deletes files whose hash is wrong."""
    files = ROOT.parent / "shared" / "tiktoken_cache"
    if not files.is_dir():
        pytest.skip(f"GPT-2's tokenizer files are not in {files}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shutil.copytree(files, tmp_path / "cache")))
