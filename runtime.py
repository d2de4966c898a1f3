"""
The machine that a script runs on: device, dtype, peak flops and memory, processes, the stop signal;
what made a file (`provenance`), and how a script ends (`run_script`).

    device = pick_device("auto")
    group = init_distributed(device, 600)       # None without torchrun
    print0("said once, by rank 0")

One process without torchrun is rank 0 of 1, and every function here works for it as well.
"""

import contextlib
import ctypes
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import watchdog

# Dense flops per second in bfloat16 (float16 where a GPU has no bfloat16), from the data sheets.
# The first key that the GPU's own name contains counts, so "GB200" stands before "B200".
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "T4": 65e12,
    "V100": 125e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


class RunError(RuntimeError):
    """What a user can put right about a run; the message says how."""


# ---- device, dtype, speed, memory ----------------------------------------------------------------


def pick_device(name, local_rank=0):
    """The torch.device that a script's knob means.

    "auto" is cuda, else mps, else cpu. Under torchrun "cuda" is the GPU of this process. Raises
    ValueError for a device that is not there.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if has_mps else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, not {name!r}")
    device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    count = {"cpu": 1, "mps": int(has_mps), "cuda": torch.cuda.device_count()}[device.type]
    if (device.index or 0) >= count:
        raise ValueError(
            f"device = {device}, but this torch ({torch.__version__}) sees {count} {device.type} "
            "devices here; use --device=cpu, or fewer processes"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device, streams="auto"):
    """The torch.dtype of activations that a script's knob means.

    "auto" is bfloat16 on a GPU that computes with it (not one that emulates it), else float32.
    streams: the model's stream_dtype. Raises ValueError for an unknown name, and where streams are
    in bfloat16 and activations are not.
    """
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, not {name!r}")
    chosen = torch.float32
    if name != "auto":
        chosen = getattr(torch, name)
    elif device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        chosen = torch.bfloat16
    if streams == "bfloat16" and chosen != torch.bfloat16:
        raise ValueError(
            "streams in bfloat16 need branches in bfloat16, and dtype is "
            f"{str(chosen).removeprefix('torch.')}: say --dtype=bfloat16"
        )
    return chosen


def pick_autocast(dtype, device):
    """The context in which a model computes with activations of this dtype."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def peak_flops(device, dtype):
    """Dense flops per second that the data sheet of this device promises; 0 if unknown, as for
    another dtype of activations than bfloat16 and float16."""
    if device.type != "cuda" or dtype == torch.float32:
        return 0.0
    own_name = torch.cuda.get_device_name(device)
    return next((flops for name, flops in PEAK_FLOPS.items() if name in own_name), 0.0)


def peak_memory(device):
    """Bytes at the worst moment so far: of the GPU, else of this process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux ru_maxrss of a process begins at the peak of the one that started it.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # the line is in kB
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def describe_machine(device):
    """What a number was measured on: {"processor", "threads", "torch"}, and for a GPU also "gpu"
    (its name), "driver" and "cuda" (the version that torch was built for)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    found = {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        found["gpu"] = torch.cuda.get_device_name(device)
        found["driver"] = driver.read_text().splitlines()[0] if driver.exists() else None
        found["cuda"] = torch.version.cuda
    return found


def keep_freed_memory():
    """On a CPU, have glibc keep freed memory for the next step, as CUDA's allocator does.

    Otherwise glibc gives large blocks back to the system, and the page faults of taking them
    again are up to a third of what the streams cost. Without glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    # An older glibc refuses 1 GiB; 32 MiB is the most that it takes.
    if not libc.mallopt(M_MMAP_THRESHOLD, 1 << 30):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


# ---- a script from start to end ------------------------------------------------------------------


class Machine(NamedTuple):
    """What this process computes on, and with which others."""

    device: torch.device
    dtype: torch.dtype  # of activations
    autocast: contextlib.AbstractContextManager  # in which a model computes
    group: dist.ProcessGroup | None  # gloo, for errors and flags; None without torchrun
    stop: "StopSignal"


def set_up(device, dtype, deterministic, patience):
    """For training: set what torch keeps for the whole process, and meet the other processes.

    dtype: of activations. patience: see init_distributed. -> a Machine. Raises RunError.
    """
    torch.use_deterministic_algorithms(deterministic)
    # Filling takes time, and no script reads memory that was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False
    keep_freed_memory()
    group = init_distributed(device, patience)
    return Machine(device, dtype, pick_autocast(dtype, device), group, StopSignal(group))


def why_not_compiled(error):
    """A line for a user whose machine lacks what torch.compile needs: a compiler, or a folder to
    write to. None where `error` is something else."""
    if isinstance(error, OSError):
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or "torchinductor_"  # torch's own name
        failed = cache in str(error.filename)
    else:
        failed = "BackendCompilerFailed" in [kind.__name__ for kind in type(error).__mro__]
    if not failed:
        return None
    reason = str(error).splitlines()[0]
    return (
        f"torch.compile does not work here ({reason}). It needs a C++ compiler (CXX names one) and "
        "a folder where it can write and lock files (TORCHINDUCTOR_CACHE_DIR names one); or do "
        "without: --compile=False"
    )


def output_is_unread(end=""):
    """Whether the program that read the output has ended, as in `study.py --list | head`. `end` is
    written to find out. What is left goes nowhere then; else Python would complain at its end."""
    try:
        print(end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def run_script(main, expected=(RunError, ValueError)):
    """Call main(), and end the process where it fails.

    expected: errors that a user can put right. Each is told in a line, by one process of each
    machine; so is the reason why a machine cannot compile. Any other error is raised, with its
    traceback.
    """
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        if not output_is_unread():
            return
        status = 141
    except KeyboardInterrupt:
        status = 130  # what a shell takes for Ctrl-C
    except BrokenPipeError:
        if not output_is_unread("\n"):
            raise
        status = 141  # what a shell takes for a broken pipe
    except expected as error:
        status = f"{type(error).__name__}: {error}"  # sys.exit prints a text, and ends with 1
    except Exception as error:
        status = why_not_compiled(error)
        if not status:
            raise
    sys.exit(status if ranks()[1] == 0 else 1)


# ---- where a result comes from -------------------------------------------------------------------


def provenance():
    """What made a result: {"commit", "clean", "torch", "command"}.

    commit is checked out in the repository that tracks this file. clean: whether every file there
    is as in the commit, except those in results/, where a study writes while its runs go on. Both
    are None without git or such a repository.
    """
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = _git("rev-parse", "HEAD") if tracked else None
    changes = _git("status", "--porcelain", "--", ":/", ":(exclude,top)results") if commit else None
    return {
        "commit": commit,
        "clean": None if changes is None else changes == "",
        "torch": str(torch.__version__),  # a plain string for what reads it back
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }


def _git(*arguments):
    """What git says about this file's folder, or None where it cannot say anything."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ---- processes -----------------------------------------------------------------------------------


def ranks():
    """(rank, local_rank, world_size) of this process; (0, 0, 1) without torchrun."""
    return tuple(
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )


def print0(*text):
    """print() on rank 0, at once; nothing on the others."""
    if ranks()[0] == 0:
        print(*text, flush=True)


def init_distributed(device, patience):
    """Under torchrun, start the group of all processes; without it, do nothing.

    patience: in seconds. The job ends if a rank has not come by then, or later hangs for so long.
    Returns a gloo group, for errors and flags, which lie in the memory of the host and not of a
    device; None without torchrun. Raises RunError where the processes cannot meet.
    """
    if "RANK" not in os.environ:
        return None
    try:
        store, rank, world_size = next(
            dist.rendezvous("env://", timeout=timedelta(seconds=patience))
        )
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(
            f"the processes could not meet at {address} ({str(error).splitlines()[0]}). If another "
            "run has the port, choose another: torchrun --standalone takes a free one, "
            "--master_port=… on several nodes"
        ) from error

    # torchrun keeps its store when it restarts the workers, with the addresses of the dead ones.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    if missing := watchdog.missing_ranks(store, rank, world_size, patience):
        raise RunError(
            f"of {world_size} processes, rank {', '.join(map(str, missing))} did not come within "
            f"{patience:.0f} s; the logs of their machines tell why"
        )
    # Twice the watchdog's time, so that the watchdog ends the job first: it names the rank that the
    # others wait for, and torch does not.
    longest = timedelta(seconds=2 * patience)
    dist.init_process_group(
        pick_backend(device), store=store, rank=rank, world_size=world_size, timeout=longest
    )
    group = dist.new_group(backend="gloo", timeout=longest)
    watchdog.watch(store, rank, world_size, (dist.group.WORLD, group), patience)
    return group


def pick_backend(device):
    """nccl, which needs a GPU for each process, where this machine has that many; else gloo."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda" and processes <= torch.cuda.device_count():
        return "nccl"
    return "gloo"


def on_all_ranks(group, work, *arguments):
    """Every process calls work(*arguments) and waits for the others -> its own result.

    A RunError or ValueError of one process (a shard is damaged, the disk is full) is raised in all
    of them, so that none is left waiting for another.
    """
    result = error = None
    try:
        result = work(*arguments)
    except (RunError, ValueError) as raised:
        error = raised
    errors = [error]
    if group is not None:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=group)
    for error in filter(None, errors):
        raise error
    return result


def on_rank_0(group, work, *arguments):
    """Rank 0 calls work(*arguments) -> its result there, None elsewhere. Its errors: on all."""
    return on_all_ranks(group, work if ranks()[0] == 0 else _nothing, *arguments)


def _nothing(*_):
    return None


def from_rank_0(group, value):
    """The value of rank 0, on all ranks. It must be something that pickle takes."""
    values = [value]
    if group is not None:
        dist.broadcast_object_list(values, group=group)
    return values[0]


class StopSignal:
    """Remembers SIGTERM or Ctrl-C, so that the loop can finish its step, write a checkpoint, and
    leave on all ranks together.

    Without torchrun a second Ctrl-C leaves at once. Under torchrun it changes nothing: torchrun
    itself repeats the signal, and kills the workers after its own timeout.
    """

    def __init__(self, group):
        self.received, self.group = False, group
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.received = True
        if self.group is None:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """True on all ranks or on none. The flag is on the host, so no device waits for it."""
        if self.group is None:
            return self.received
        flag = torch.tensor(float(self.received))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return flag.item() > 0
