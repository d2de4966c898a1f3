"""forks.py: a script that does not end, and what it started."""

import time

import pytest
from conftest import torchrun
from forks import Script

# It and a process of its own hold the pipe of the output open; "deaf" to SIGTERM, both of them.
SLOW = """
import os, signal, subprocess, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = subprocess.Popen(["sleep", "60"])
print("pid:", sleep.pid, os.getpid(), flush=True)
time.sleep(60)
"""


def ended(pid):
    """Whether the process is gone, or dead and not yet collected."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("kind", ["usual", "deaf", "torchrun"])
def test_a_script_that_takes_too_long_is_stopped_with_all_that_it_started(
    kind, tmp_path, monkeypatch
):
    (tmp_path / "slow.py").write_text(SLOW)
    command = [tmp_path / "slow.py", kind]
    if kind == "deaf":
        monkeypatch.setattr(Script, "grace", 1)
    if kind == "torchrun":
        command = torchrun(1, *command)
    script, began = Script(command, timeout=4), time.monotonic()
    with pytest.raises(AssertionError, match="took longer than 4 s: (?s:.*)pid: ") as error:
        script.finish()
    assert time.monotonic() - began < 30
    pids = str(error.value).split("pid: ")[1].split()[:2]
    assert all(map(ended, pids))
