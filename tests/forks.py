"""Scripts in forks of one process that has imported torch, which takes seconds, before they run.

run() and run_ranks() of conftest.py go through here. The server is this file as a program: it forks
once for each script, and tells how the forks ended.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What a patch may use without importing it.
PATCH_NAMES = "import itertools, os, signal, sys, torch\ncalls = itertools.count(1)\n"


class Script:
    """A script that runs in the background; its output comes through the pipe `stdout`.

    command: as after `python`, a file or -m and a module. patch: statements that are executed
    before it. env: what is added to the environment. A script that takes longer than `timeout`
    seconds is stopped, with all that it started, and finish() fails.
    """

    grace = 40  # seconds to end after SIGTERM; torchrun gives its workers 30

    def __init__(self, command, patch="", env=None, timeout=300):
        read, write = os.pipe()
        self.stdout = open(read, errors="replace")
        self.returncode = None
        self.timeout, self.late, self.finished = timeout, False, threading.Event()
        env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self.pid = ask({"command": [*map(str, command)], "patch": patch, "env": env}, write)
        os.close(write)
        threading.Thread(target=self.stop_when_late, daemon=True).start()

    def poll(self):
        """The exit status, or None while the script runs."""
        if self.returncode is None:
            self.returncode = ask({"status_of": self.pid, "wait": False})
        return self.returncode

    def finish(self):
        """Wait for the end. -> the rest of the output."""
        with self.stdout:
            output = self.stdout.read()
        if self.returncode is None:
            self.returncode = ask({"status_of": self.pid, "wait": True})
        self.finished.set()
        assert not self.late, f"stopped, since it took longer than {self.timeout} s: {output}"
        return output

    def stop_when_late(self):
        """Else a process that the script started could hold the pipe open for ever.

        torchrun's workers are not in its process group, and it ends them after a SIGTERM.
        """
        if self.finished.wait(self.timeout):
            return
        self.late = True
        os.killpg(self.pid, signal.SIGTERM)
        if not self.finished.wait(self.grace):
            os.killpg(self.pid, signal.SIGKILL)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


# ---- the side of the tests -----------------------------------------------------------------------


@functools.cache
def server():
    """The connection to the server, which is started by the first call."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        cwd=ROOT,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def ask(request, *descriptors):
    """Send a request, and open files with it. -> the server's answer."""
    connection = server()
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], descriptors)
    return json.loads(receive(connection)[0])


# ---- the server ----------------------------------------------------------------------------------


def receive(connection):
    """-> a line, and the open files that came with it; an empty line at the end."""
    line, descriptors = b"", []
    while not line.endswith(b"\n"):
        part, more, _, _ = socket.recv_fds(connection, 1 << 16, maxfds=1)
        if not part:
            return b"", []  # the other side has ended
        line, descriptors = line + part, [*descriptors, *more]
    return line, descriptors


def serve(connection):
    """Answer requests until the tests end, and then end the scripts that still run."""
    running = set()
    while True:
        line, descriptors = receive(connection)
        if not line:
            break
        request = json.loads(line)
        if "command" in request:
            answer = os.fork()
            if answer == 0:
                connection.close()
                become(request, *descriptors)
            running.add(answer)
            os.close(*descriptors)
        else:
            answer = status_of(request["status_of"], request["wait"])
            if answer is not None:
                running.remove(request["status_of"])
        connection.sendall(json.dumps(answer).encode() + b"\n")
    for pid in running:
        os.killpg(pid, signal.SIGKILL)


def status_of(pid, wait):
    """The exit status of a fork, negative after a signal; None while it runs."""
    found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def become(job, output):
    """In the fork: run the script as Python would have been started with it, and end."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(job["env"])
    sys.stdout = open(1, "w", encoding=job["env"].get("PYTHONIOENCODING"))
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")
    status = 0
    try:
        if job["patch"]:
            exec(PATCH_NAMES + job["patch"], {})
        run_as_main(*job["command"])
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    # All that Python does at its end but to free what was imported, which takes 0.3 s.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


class Worker:
    """A worker of torchrun in a fork of it, and not in a Python of its own, by subprocess.Popen."""

    def __init__(self, args, env, **_):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            atexit._clear()  # torchrun's
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _python, _unbuffered, *command = args
            become({"command": command, "patch": "", "env": env}, 1)

    def poll(self):
        if self.returncode is None:
            self.returncode = status_of(self.pid, wait=False)
        return self.returncode

    def wait(self, timeout):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a worker", timeout)
            time.sleep(0.01)


def run_as_main(name, *arguments):
    """A file, or -m and the name of a module, with its arguments."""
    if name == "-m":
        name, *arguments = arguments
        sys.argv = [name, *arguments]
        if name == "torch.distributed.run":
            from torch.distributed.elastic.multiprocessing.subprocess_handler import (
                subprocess_handler,
            )

            subprocess_handler.Popen = Worker
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [name, *arguments]
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as for a script there
    for name in ("torch._dynamo", "torch.distributed.run", "tiktoken", "checkpoint", "model"):
        importlib.import_module(name)
    gc.freeze()  # else each fork looks through all of it once more
    serve(socket.socket(fileno=int(sys.argv[1])))
