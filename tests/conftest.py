"""Runs scripts as a user does, on a data set small enough for a test."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY = ("--dataset=tiny --block_size=16 --n_layer=2 --n_head=2 --n_embd=16 --batch_size=4 --total_batch_tokens=128 "
        "--eval_tokens=256 --eval_interval=4 --checkpoint_interval=2 --max_iters=6 --warmup_iters=2 --lr_decay_iters=6 "
        "--learning_rate=1e-2 --device=cpu").split()


def run(*command, ok=True, timeout=300, **env):
    """A script of this project as a subprocess; its output. `ok=False`: it must fail, and without a traceback."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    assert ok or "Traceback" not in output, output
    return output


def torchrun(processes, *command, **kwargs):
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command, **kwargs)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run what takes minutes to an hour as well")


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
        if lines := [line for name, line in test.user_properties if name == "figure" and test.when == "call"]:
            terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data folder with `tiny`: byte tokens in a pattern that a small model learns a little of, in two train shards."""
    from data import scan, write_meta, write_shard
    folder = tmp_path_factory.mktemp("data")
    (folder / "tiny").mkdir()
    generator, splits = np.random.default_rng(0), {}
    for split, lengths in (("train", (3000, 2000)), ("val", (1000,))):
        splits[split] = {"tokens": sum(lengths), "documents": len(lengths), "shards": []}
        for i, length in enumerate(lengths):
            tokens = (np.cumsum(generator.integers(1, 4, length)) % 97).astype(np.uint16)
            write_shard(folder / "tiny" / f"{split}_{i:06d}.bin", tokens)
            splits[split]["shards"].append({"file": f"{split}_{i:06d}.bin", "tokens": length, "crc32": scan(tokens)[0]})
    write_meta(folder / "tiny", {"tokenizer": "bytes", "vocab_size": 257, "eot_token": 256, "source": {"kind": "test"},
                                 "command": "the tests", "splits": splits})
    return folder
