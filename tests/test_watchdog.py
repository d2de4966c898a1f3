"""watchdog.py, and a job of several machines: who is waited for, and what the job computes."""

import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist
from conftest import ROOT, free_port, records, run, start_ranks, wait_for
from forks import Script

from watchdog import BEATS, Peer, given_up, missing_ranks

# ---- who is given up -----------------------------------------------------------------------------


def peers(*histories):
    """Ranks 1, 2, … after their (beat, entered), one for each beat of ours."""
    found = {}
    for rank, history in enumerate(histories, 1):
        found[rank] = Peer()
        for beat, entered in history:
            found[rank].hear(beat, entered)
    return found


@pytest.mark.quick
def test_who_is_given_up_and_when():
    limit = range(BEATS + 1)
    well = [(beat, 3 * beat) for beat in limit]
    waits = [(beat, 60) for beat in limit]  # in a collective
    hangs = [(beat, 59) for beat in limit]  # has not come to it
    silent = [(7, 60)] * len(limit)
    assert given_up({}, 60) is None
    assert given_up(peers(well, well), 3 * BEATS) is None
    assert given_up(peers(waits, waits), 60) is None, "all wait in the same one: nobody is behind"
    assert given_up(peers(waits, hangs), 60) == ([2], "did not come to where the others wait, for")
    assert given_up(peers(hangs, hangs), 60)[0] == [1, 2]
    assert given_up(peers(waits, waits), 59) is None, "who is behind itself gives up nobody"
    assert given_up(peers(waits, silent), 60) == ([2], "gave no sign of life for")
    assert given_up(peers(hangs, silent), 60)[0] == [2], "it may be why the other hangs"
    for history in (hangs, silent):
        assert given_up(peers(waits[1:], history[1:]), 60) is None, "a beat too early"
        assert given_up(peers(waits, [*history[1:], (99, 61)]), 60) is None, "it came back"


@pytest.mark.quick
def test_ranks_that_do_not_come_are_named():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    store.set("beat/1", "0 0")
    assert missing_ranks(store, 0, 2, seconds=0.2) == []
    assert missing_ranks(store, 0, 4, seconds=0.2) == [2, 3]


# ---- jobs ----------------------------------------------------------------------------------------


ENDLESS = ["--max_iters=100000", "--eval_interval=100000", "--hang_minutes=0.1"]


def test_a_stopped_process_ends_the_job_and_is_named(tiny):
    waiting, stopped = start_ranks(2, *tiny, *ENDLESS)
    try:
        wait_for(waiting, "step 20/")
        os.kill(stopped.pid, signal.SIGSTOP)
        output = waiting.finish()
        assert waiting.returncode == 1
        named = f"rank 1 ({socket.gethostname()}, process {stopped.pid}) gave no sign of life for 6"
        assert named in output and "--init_from=resume" in output, output
    finally:
        stopped.kill()
        stopped.finish()


# train.py, but rank 1 waits for ever for the data of some step, as for a disk that does not answer.
HANGS = """
import os, runpy, sys, threading
sys.path.insert(0, os.getcwd())
import data
batch = data.TokenBlocks.batch
def hang(self, step, *arguments):
    if step == 5 and os.environ["RANK"] == "1":
        threading.Event().wait()
    return batch(self, step, *arguments)
data.TokenBlocks.batch = hang
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_process_that_hangs_while_it_lives_is_named(tiny, tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    waiting, hanging = start_ranks(2, tmp_path / "hangs.py", *tiny[1:], *ENDLESS)
    try:
        output = waiting.finish()
        assert waiting.returncode == 1 and "step 4/" in output and "step 6/" not in output
        named = f"rank 1 ({socket.gethostname()}, process {hanging.pid}) did not come to where"
        assert named in output, output
    finally:
        hanging.kill()
        hanging.finish()


def test_two_nodes_compute_what_one_process_does(tiny, tmp_path):
    """Two agents on this machine, each with one process, that meet through c10d's rendezvous."""
    run(*tiny)
    node = "-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d".split()
    node += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=7", "--local_addr=127.0.0.1"]
    nodes = [Script([*node, *tiny, f"--out_dir={tmp_path}/two"]) for _ in range(2)]
    outputs = [process.finish() for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], outputs
    assert sum("finished: 6 steps" in output for output in outputs) == 1, "rank 0 alone prints"
    assert any("micro-steps * 2 processes" in output for output in outputs)
    one, two = records(tmp_path / "out"), records(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-4)
        assert a.get("val", 0) == pytest.approx(b.get("val", 0), abs=1e-4)


ENDS_AT_ONCE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
import watchdog

store = dist.TCPStore("127.0.0.1", 0, 1, True)
store.set("process/1", "another")
store.set("beat/1", "0 0")
watchdog.watch(store, 0, 2, (), seconds=2e-3)
for beat in range(5):
    store.set("beat/1", f"{beat} 0")
"""


def test_a_process_ends_cleanly_while_its_thread_beats():
    """Ten beats a millisecond, so that Python ends while the thread is inside the store."""
    for _ in range(3):
        command = [sys.executable, "-c", ENDS_AT_ONCE, str(ROOT)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
