"""
The files of a run in its out_dir: checkpoints that are whole or absent, the metrics, and a lock for one writer.

    out_dir/ckpt_0000500.pt     the last `keep` checkpoints, by step     out_dir/config.json     the resolved knobs
    out_dir/best.pt             the one with the lowest validation loss  out_dir/metrics.jsonl   a line a step

A checkpoint is torch.save's zip archive, whose CRC-32 of every record `verify` checks. It is loaded with
weights_only=True: one from a stranger can be wrong, but cannot run code.
"""
import errno
import fcntl
import json
import math
import os
import re
import sys
import zipfile
from pathlib import Path

import torch

from data import write_atomic


KEYS = {"model", "optimizer", "step", "best_val", "evaluated", "tallied", "tally", "config", "model_config", "command",
        "tokenizer", "n_vocab", "shards"}


class RunError(RuntimeError):
    """What a user can put right about a run; the message says how."""


def save(out_dir, state, *, keep, best):
    """Write `state` as the checkpoint of state['step'], keep the newest `keep`, and point best.pt at it if `best`.

    Raises RunError when the disk is full or not writable; the checkpoints there are as they were.
    """
    path = Path(out_dir) / f"ckpt_{state['step']:07d}.pt"
    temporary, second = path.with_suffix(".tmp"), Path(out_dir) / "best.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if best:                                    # a second name for the same bytes, which outlives the first; before
            os.link(temporary, second)              # it, for a run that is killed in between comes by here again
            os.replace(second, Path(out_dir) / "best.pt")
        os.replace(temporary, path)
        _sync_folder(out_dir)
    except (OSError, RuntimeError) as error:        # torch raises RuntimeError when its archive comes out short
        raise RunError(f"{path}: the checkpoint could not be written ({error}). The ones before it are unchanged. "
                       f"Free some space, then go on with --init_from=resume") from error
    finally:
        temporary.unlink(missing_ok=True)
        second.unlink(missing_ok=True)
    whole = [there for there in steps(out_dir) if there <= path]        # later ones are damaged: the run resumed before them
    for old in whole[:-keep]:
        old.unlink()
    return path


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)                        # the rename itself survives a power cut only after this
    finally:
        os.close(descriptor)


def steps(out_dir):
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in Path(out_dir).glob("ckpt_*.pt") if re.fullmatch(r"ckpt_\d{7,}\.pt", path.name))


def verify(path):
    """Raises RunError unless the archive is whole and every record has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:                      # zipfile raises whatever the damaged bytes happen to say
        raise RunError(f"{path}: not a whole checkpoint ({error})") from error
    if damaged:
        raise RunError(f"{path}: damaged, the checksum of {damaged} is wrong")


def latest(out_dir):
    """The newest checkpoint that is whole, or None; a damaged one is skipped with a warning."""
    for path in reversed(steps(out_dir)):
        try:
            verify(path)
            return path
        except RunError as error:
            print(f"warning: {error}; going back to the checkpoint before it", file=sys.stderr, flush=True)
    return None


def load(path):
    """-> the state that `save` wrote, on the CPU. Raises RunError for what is missing, damaged or no checkpoint."""
    if not Path(path).exists():
        raise RunError(f"{path}: no such checkpoint; train one first, for example "
                       "python train.py config/tbp.py config/laptop.py")
    verify(path)
    state = load_tensors(path)
    if missing := KEYS - set(state):
        raise RunError(f"{path}: not a checkpoint of this project, it lacks {', '.join(sorted(missing))}")
    return state


def restore(path, state, model, optimizer=None):
    """Put the weights of a `load`ed state into model, and its moments into optimizer. Raises RunError if they do not fit."""
    try:
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path}: its weights are not those of this model.py. Check out the commit that wrote it, or begin "
                       f"another run with --out_dir=…. {reason}") from error


def load_tensors(path):
    """-> the dict of tensors and plain values in any torch file, on the CPU; nothing in it is executed. Raises RunError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"{path}: could not be read ({error.strerror})") from error
    except Exception as error:                      # as above; an UnpicklingError if it asks for more than tensors
        raise RunError(f"{path}: refused, it holds more than tensors and plain values, or is no torch file "
                       f"({(str(error) or repr(error)).splitlines()[0]})") from error
    if not isinstance(state, dict):
        raise RunError(f"{path}: a dict of tensors is wanted, not a {type(state).__name__}")
    return state


def lock(out_dir):
    """Make out_dir, hold it for this process until it ends, and remove what a killed one had half written there.
    Raises RunError if another run writes there."""
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        file = open(Path(out_dir) / ".lock", "a")
    except OSError as error:
        raise RunError(f"out_dir {out_dir} is not writable ({error.strerror}); choose another with --out_dir=…") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunError(f"another run is writing to {out_dir}; wait for it, or choose another --out_dir") from error
    for leftover in (*Path(out_dir).glob("ckpt_*.tmp"), Path(out_dir) / "best.tmp"):
        leftover.unlink(missing_ok=True)
    return file                                     # the lock lasts as long as this object


class Metrics:
    """metrics.jsonl: a JSON object a line. Opened at `step`, it first drops what a killed run wrote beyond it; opened at
    None, all that is there. Raises RunError when the disk is full or not writable."""

    def __init__(self, out_dir, step):
        self.path = Path(out_dir) / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            write_atomic(self.path, *[line for line in lines if step is not None and _step(line) <= step])
        self.file = open(self.path, "ab", buffering=0)          # a line at a time: a kill loses none

    def write(self, **record):
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        line = json.dumps(finite).encode() + b"\n"              # NaN is no JSON
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RunError(f"{self.path}: could not be written ({error.strerror}). Free some space, then go on with "
                           "--init_from=resume") from error


def _step(line):
    """The step of a line of metrics; infinite where a kill or a full disk left half of one."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
