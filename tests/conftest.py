"""Runs scripts as a user does, on a data set small enough for a test."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from forks import ROOT, Script
from hypothesis import settings

sys.path.insert(0, str(ROOT))

# Two threads that share the work on a small tensor spend their time in waiting for each other.
torch.set_num_threads(1)

# An example may take any time: no test fails because a machine is slow.
settings.register_profile("any time", deadline=None)
settings.load_profile("any time")

TINY = (
    "--dataset=tiny --block_size=16 --n_layer=2 --n_head=2 --n_embd=16 --n_streams=2 "
    "--batch_size=4 --total_batch_tokens=128 --eval_tokens=256 --eval_interval=4 "
    "--checkpoint_interval=2 --max_iters=6 --warmup_iters=2 --lr_decay_iters=6 "
    "--learning_rate=1e-2 --device=cpu"
).split()


# A program whose arguments are a script and the script's arguments.
PATCHED = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
{}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*command, ok=True, fresh=False, patch="", timeout=300, **env):
    """The output of a script of this project, run as if from the command line.

    ok=False: it must fail, and without a traceback. patch: statements that are executed first, and
    change torch or a module before the script uses it. fresh=True: in a Python of its own, for what
    is read from the environment when Python or torch starts. Else in a fork, see forks.py.
    """
    if fresh:
        program = ["-c", PATCHED.format(patch)] if patch else []
        done = subprocess.run(
            [sys.executable, *program, *map(str, command)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )
        status, output = done.returncode, done.stdout + done.stderr
    else:
        script = Script(command, patch, env, timeout)
        output, status = script.finish(), script.returncode
    assert (status == 0) == ok and status >= 0, output
    assert ok or "Traceback" not in output, output
    return output


def torchrun(processes, *command):
    """The command of a run under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, *command]


def rank_environment(rank, processes, port):
    """What torchrun tells a rank of a job on this machine."""
    job = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**job, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def start_ranks(processes, *command):
    """The ranks of one job in the background, without torchrun."""
    port = free_port()
    environments = [rank_environment(rank, processes, port) for rank in range(processes)]
    return [Script(command, env=env) for env in environments]


def run_ranks(processes, *command, ok=True):
    """The outputs of the ranks of one job, or of a process without ranks where there is one."""
    if processes == 1:
        return [run(*command, ok=ok)]
    ranks = start_ranks(processes, *command)
    outputs = [rank.finish() for rank in ranks]
    assert all((rank.returncode == 0) == ok and rank.returncode >= 0 for rank in ranks), outputs
    assert ok or "Traceback" not in "".join(outputs), outputs
    return outputs


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came")


@contextlib.contextmanager
def handlers_kept():
    """Scripts set handlers of signals, for a process that ends with them."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


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
