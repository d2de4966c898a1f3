"""
A run's checkpoints in its out_dir, each whole or absent, and a lock that lets one run write. Also
the questions about a checkpoint: where to start, and is it the same run?

    ckpt_0000500.pt    the newest few checkpoints, by step
    best.pt            the one with the lowest validation loss
    config.json        the knobs, and what made the run (runtime.provenance)
    metrics.jsonl      a JSON object a line (progress.py)

A checkpoint is torch.save's zip archive, which has a CRC-32 of every record; `verify` checks them.
It is loaded with weights_only=True: a file from a stranger can be wrong, but it cannot run code.
"""

import json
import math
import os
import re
import shlex
import shutil
import sys
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

from runtime import RunError, print0
from tokenizer import tokenizer_name

KEYS = {
    *("model", "optimizer", "config", "model_config", "command", "provenance"),
    *("tokenizer", "n_vocab", "shards"),
    *("step", "best_val", "evaluated", "logged_step", "tally", "scaler"),  # progress.Progress
}
# A resumed run must keep these, and model_config. The last two decide which parameters are in which
# group of the optimizer.
FIXED = ("seed", "dataset", "total_batch_tokens", "connection_lr", "decay_phi")
# Knobs that say where a run's files are, how it starts and who is told of it, and not what it
# computes. A resumed run may change them without a word.
UNREPORTED = {
    *("init_from", "eval_only", "out_dir", "data_dir", "hang_minutes"),
    *("tensorboard", "wandb_project"),
}


# ---- writing -------------------------------------------------------------------------------------


def save(out_dir, state, *, keep, best):
    """Write `state` as the checkpoint of state["step"], and delete all but the newest `keep`.

    With `best` the same checkpoint becomes best.pt as well. Raises RunError when the disk is full
    or not writable; the checkpoints there are then unchanged.
    """
    path = Path(out_dir) / f"ckpt_{state['step']:07d}.pt"
    temporary, second = path.with_suffix(".tmp"), Path(out_dir) / "best.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        # best.pt first: a run killed between the two renames repeats this step on resume.
        if best:
            _link_or_copy(temporary, second)
            os.replace(second, Path(out_dir) / "best.pt")
        os.replace(temporary, path)
        _sync_folder(out_dir)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a short archive
        raise RunError(
            f"{path}: the checkpoint could not be written ({error}). The ones before it are "
            "unchanged. Free some space, or make the folder writable. Then go on: train.py with "
            "--init_from=resume, convert.py with the same command"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
        second.unlink(missing_ok=True)

    # A later checkpoint must be damaged, or the run would have resumed from it: it does not count.
    up_to_this = [other for other in checkpoints(out_dir) if other <= path]
    for old in up_to_this[:-keep]:
        old.unlink()
    return path


def _link_or_copy(path, second):
    """Give the file a second name, which outlives the first; a copy where there are no links."""
    try:
        os.link(path, second)
    except OSError:
        with open(path, "rb") as source, open(second, "wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())


def _sync_folder(folder):
    """A rename survives a power cut only after this. Windows cannot open a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(out_dir):
    """Make out_dir, lock it for this process, and remove files that a killed run half wrote there.

    Returns a file to keep: closing it ends the lock. Raises RunError if another run writes there.
    Where files cannot be locked, a warning says so.
    """
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        file = open(Path(out_dir) / ".lock", "a")
    except OSError as error:
        raise RunError(
            f"out_dir {out_dir} is not writable ({error.strerror}); choose another: --out_dir=…"
        ) from error
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(
            f"another run is writing to {out_dir}; wait for it, or choose another --out_dir"
        ) from error
    except (OSError, ModuleNotFoundError) as error:  # a file system without locks; Windows
        print(
            f"warning: {out_dir} cannot be locked here ({getattr(error, 'strerror', error)}); "
            "see to it yourself that no other run writes there",
            file=sys.stderr,
            flush=True,
        )
    for leftover in (*Path(out_dir).glob("ckpt_*.tmp"), Path(out_dir) / "best.tmp"):
        leftover.unlink(missing_ok=True)
    return file


# ---- reading -------------------------------------------------------------------------------------


def checkpoints(out_dir):
    """The paths of a run's checkpoints, oldest first."""
    files = Path(out_dir).glob("ckpt_*.pt")
    return sorted(path for path in files if re.fullmatch(r"ckpt_\d{7,}\.pt", path.name))


def verify(path):
    """Raises RunError unless the archive is whole and every record has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises whatever the damaged bytes happen to say
        raise RunError(f"{path}: not a whole checkpoint ({error})") from error
    if damaged:
        raise RunError(f"{path}: damaged, the checksum of {damaged} is wrong")


def latest(out_dir):
    """The newest checkpoint that is whole, or None; a damaged one is skipped with a warning."""
    for path in reversed(checkpoints(out_dir)):
        try:
            verify(path)
            return path
        except RunError as error:
            print(
                f"warning: {error}; going back to the checkpoint before it",
                file=sys.stderr,
                flush=True,
            )
    return None


def find(source):
    """source: a checkpoint, or a run's folder, which means its newest whole checkpoint -> the path.

    Raises RunError for a folder that has none.
    """
    path = Path(source).expanduser()
    if path.suffix == ".pt" or path.is_file():
        return path
    if newest := latest(path):
        return newest
    raise RunError(
        f"{source} has no whole checkpoint; name a run that has, or train it first: "
        f"python train.py … --out_dir={shlex.quote(str(source))}"
    )


def load(path):
    """-> the state that `save` wrote, on the CPU. One of an older layout is brought to today's.

    Raises RunError for a file that is missing, damaged or no checkpoint.
    """
    if not Path(path).exists():
        raise RunError(
            f"{path}: no such checkpoint; train one first, for example "
            "python train.py config/tbp.py config/laptop.py"
        )
    verify(path)
    state = load_tensors(path)
    if "tallied" in state:
        _upgrade(path, state)
    state.setdefault("scaler", {})  # of float16, which came later
    if missing := KEYS - set(state):
        raise RunError(
            f"{path}: not a checkpoint of this project, it lacks {', '.join(sorted(missing))}"
        )
    return state


def _upgrade(path, state):
    """Bring a state in the layout of commit 4e260d0 to today's, in place. Raises RunError for an
    interval_map that is gone."""
    state["logged_step"] = state.pop("tallied")
    state["provenance"] = dict.fromkeys(("commit", "clean", "torch", "command"))
    model = state["model_config"]
    if model["interval_map"] != "plain" and model["mixer"] in ("tbp", "rtbp"):
        raise RunError(
            f"{path}: its interval_map is {model['interval_map']!r}, and only 'plain' is left: the "
            "other left most of a large matrix without gradients. Sample it with commit 4e260d0"
        )
    rounds = model.pop("sinkhorn_rounds")
    model["options"] = {"sinkhorn_rounds": rounds} if model["mixer"] == "sinkhorn" else {}
    for knobs in (model, state["config"]):
        knobs.pop("interval_map", None)


def load_tensors(path):
    """-> the dict of tensors and plain values in any torch file, on the CPU. Raises RunError.

    Nothing in the file is executed.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"{path}: could not be read ({error.strerror})") from error
    # torch.load raises many types on damaged bytes, and UnpicklingError for more than tensors.
    except Exception as error:
        # Of torch's lines, some of which advise to trust the file, the one that says what it found.
        found = re.search(r"GLOBAL \S+|Unsupported .*", str(error))
        reason = found[0] if found else (str(error) or repr(error)).splitlines()[0]
        raise RunError(
            f"{path}: refused, it holds more than tensors and plain values, or is no torch file "
            f"({reason})"
        ) from error
    if not isinstance(state, dict):
        raise RunError(f"{path}: a dict of tensors is wanted, not a {type(state).__name__}")
    return state


def model_config(path, state, config_class):
    """-> the config_class (model.GPTConfig) of a loaded state. Raises RunError if this class lacks
    one of its fields, or refuses a value."""
    try:
        return config_class(**state["model_config"])
    except (TypeError, ValueError) as error:
        raise RunError(
            f"{path}: its model is not that of this model.py ({error}). {_remedy(state)}"
        ) from error


def restore(path, state, model, optimizer=None):
    """Put the weights of a loaded state into model, and its moments into optimizer.

    The optimizer keeps its own settings, such as the weight decay; only the learning rate comes
    from the state. Raises RunError where the weights do not fit.
    """
    try:
        model.load_state_dict(state["model"])
        if optimizer is not None:
            before = [dict(group) for group in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizer"])
            for group, own in zip(optimizer.param_groups, before):
                own["params"], own["lr"] = group["params"], group["lr"]
                group.update(own)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunError(
            f"{path}: its weights are not those of this model.py. {_remedy(state)}, or "
            f"begin another run with --out_dir=…. {' '.join(str(error).split())}"
        ) from error


def _remedy(state):
    remedy, made_by = "Check out the commit that wrote it", state["provenance"]
    if made_by["commit"]:
        remedy += f": git checkout {made_by['commit']}"
    if made_by["clean"] is False:
        remedy += " (that was with changes that this commit lacks, and they are needed too)"
    return remedy


# ---- is it the same run? -------------------------------------------------------------------------


def check_resumable(out_dir):
    """Raises RunError where out_dir has no checkpoint, not even a damaged one, or no run."""
    if not checkpoints(out_dir):
        raise RunError(
            f"{out_dir} has no checkpoint to resume from; begin with --init_from=scratch"
        )
    if not any(Path(out_dir, name).exists() for name in ("config.json", "metrics.jsonl")):
        raise RunError(
            f"{out_dir} has weights alone, as convert.py writes them, and no run to resume; begin "
            f"one with --init_from={shlex.quote(str(out_dir))} --out_dir=…"
        )


def starting_point(out_dir, init_from):
    """The checkpoint to resume from, or None to start at step 0: from scratch, or from weights.

    Raises RunError where out_dir lacks what init_from asks for, or has a run that is not to go on.
    """
    if init_from == "resume":
        check_resumable(out_dir)
    there = checkpoints(out_dir)
    if there and init_from.partition(":")[0] in ("resume", "auto"):  # auto:gpt2, auto:PATH
        if newest := latest(out_dir):
            return newest
        raise RunError(
            f"none of the {len(there)} checkpoints in {out_dir} is whole; begin again elsewhere "
            "with --init_from=scratch --out_dir=…"
        )
    if there:
        raise RunError(
            f"{out_dir} holds a run already (the newest checkpoint is {there[-1].name}); go on "
            "with --init_from=resume, or begin another with --out_dir=…"
        )
    return None


def resume_arguments(argv, out_dir, known):
    """The command line `argv`. Where it resumes a run and names no config file, the knobs of the
    run's config.json stand before it, so that knobs which it does not name are the run's own.

    out_dir: the default, for a command line that does not name it. known: the names of all knobs.
    Raises SystemExit for a config.json that is damaged, or has a knob that is not known.
    """
    named = dict(item[2:].split("=", 1) for item in argv if item.startswith("--") and "=" in item)
    path = Path(named.get("out_dir", out_dir)).expanduser() / "config.json"
    has_file = any(not item.startswith("-") for item in argv)
    if named.get("init_from") != "resume" or has_file or not path.exists():
        return argv
    try:
        knobs = json.loads(path.read_text())
        provenance = knobs.pop("provenance", {"commit": None, "clean": None})
        knobs.pop("interval_map", None)  # of commit 4e260d0; `load` refuses what is gone
        own = [f"--{name}={value!r}" for name, value in knobs.items()]
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(
            f"RunError: {path}: damaged ({error}). Remove it, and name the run's knobs on the "
            "command line, as when it was begun"
        ) from error
    if unknown := [name for name in knobs if name not in known]:
        raise SystemExit(
            f"RunError: {path}: this train.py has no knob {', '.join(unknown)}. "
            + _remedy({"provenance": provenance})
        )
    return [*own, *argv]


def fingerprint(meta):
    """A text that identifies a data set's shards: with other shards, steps see other tokens."""
    splits = json.dumps(meta["splits"], sort_keys=True)
    count = meta["splits"]["train"]["tokens"]
    return f"{count:,} training tokens, checksum {zlib.crc32(splits.encode()):08x}"


def resume(path, config, model, optimizer, progress, meta):
    """Put the checkpoint `path` into model, optimizer and progress, and print what has changed.

    config: the knobs now. meta: that of the data set. Raises RunError.
    """
    state = load(path)
    changed = check_same_run(path, state, config, model.config, meta)
    restore(path, state, model, optimizer)
    vars(progress).update({name: state[name] for name in vars(progress)})
    print0(f"resumed from {path} at step {progress.step}")
    if changed:
        print0("changed since the checkpoint: " + ", ".join(changed))
    if state["config"]["eval_tokens"] != config["eval_tokens"]:
        # The old evaluations read other tokens.
        progress.evaluated, progress.best_val = None, math.inf


def check_same_run(path, state, config, model_config_now, meta):
    """Raises RunError unless knobs, model and data set continue the run of the checkpoint `state`.

    Returns what else changed: a list such as ["learning_rate: 0.001 -> 0.002"].
    """
    if not state["optimizer"]:
        raise RunError(
            f"{path} was converted and holds weights alone, so there is no run to resume; begin "
            f"one with --init_from={path} --out_dir=…"
        )
    saved_config = model_config(path, state, type(model_config_now))
    then = _identity(state["config"], saved_config, state["tokenizer"], state["shards"])
    now = _identity(config, model_config_now, meta["tokenizer"], fingerprint(meta))
    if forbidden := _changed_values(then, now):
        knobs = [name for name in now if name in config]
        raise RunError(
            f"the checkpoint is of another run: {', '.join(forbidden)}. Give these the "
            "checkpoint's values, or begin another run with --out_dir=…. A resumed run may "
            f"change everything but {', '.join(knobs)}, and the data set's tokenizer and shards"
        )
    free = [name for name in config if name not in now and name not in UNREPORTED]
    return _changed_values(state["config"], {name: config[name] for name in free})


def _identity(config, model_config, tokenizer, shards):
    """{name: value} of everything that a resumed run has to keep."""
    return {
        **{name: config[name] for name in FIXED if name in config},  # an older run lacks some
        **asdict(model_config),
        "tokenizer": tokenizer_name(tokenizer),
        "shards": shards,
    }


def _changed_values(then, now):
    """["name: old -> new"] for the values of `now` that differ in `then`, which may lack some."""
    return [
        f"{name}: {then[name]!r} -> {now[name]!r}"
        for name in now
        if name in then and then[name] != now[name]
    ]
