"""
Is the compiled model right on this GPU (or CPU)? Every mixer, and runs that are killed or shared.

    python -m dev.gpu_right --folder=out-gpu        # give it again for what is not checked yet
    python -m dev.gpu_right --folder=out-gpu --mixers=identity,tbp --streams=4

Two questions, in this order:

1. Runs of train.py on a small data set: is one that was killed and resumed, with deterministic =
   True, the same to the bit as one that was not? Do two processes that share one device (gloo)
   have the losses of one?
2. For every mixer, dynamic and static, each number of streams, and activations in float32 and in
   bfloat16 (autocast): are loss and gradients of the compiled model those of the same model in
   float64? The compiled model may be off by twice as much as the eager one, which only rounds.

Question 2 ends after `seconds`, counted from the start of the call; the runs of question 1 have no
limit. Results go line by line to FOLDER/right.jsonl; its first line says what made them. The exit
status is 1 if a check failed.
"""

import contextlib
import copy
import itertools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic; read when CUDA starts
import numpy as np
import torch

import runtime
from compiler import loss_and_gradients
from configurator import configure
from data import scan, write_meta, write_shard
from dev.table import print_table
from mixers import MIXERS, n_logits
from model import GPT, GPTConfig

folder = "out-gpu"  # everything is written here
mixers = "all"  # names of mixers.MIXERS with commas between, or all
streams = "2,4,8"  # numbers of streams
dtypes = "float32,bfloat16"  # of activations
seconds = 540  # question 2 ends so long after the call began
jobs = 0  # checks at a time; 0: on a GPU one for each CPU core, else 1
device = "auto"  # auto, cpu, cuda, cuda:1
n_layer = 2
n_embd = 256
n_head = 4
block_size = 128
batch_size = 4
compile_runs = True  # whether the runs of train.py compile
max_iters = 20  # steps of a run; one run is killed at half of them
config = configure(globals())

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 257  # bytes and an end-of-text token
# How far the compiled model may be from float64, beside twice the eager model's distance.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
COLUMNS = {
    "check": "check",
    "mixer": "mixer",
    "dynamic": "dynamic",
    "n": "n",
    "dtype": "dtype",
    "right": "ok",
    "eager off": "eager",
    "compiled off": "compiled",
    "from eager": "to_eager",
    "most in": "worst",
}


# ---- 1: runs -------------------------------------------------------------------------------------


def write_data(data):
    """A data set of bytes in a pattern that a small model learns a little of."""
    data.mkdir(parents=True, exist_ok=True)
    generator, splits = np.random.default_rng(0), {}
    for split, count in (("train", 200_000), ("val", 20_000)):
        tokens = (np.cumsum(generator.integers(1, 4, count)) % 97).astype(np.uint16)
        write_shard(data / f"{split}.bin", tokens)
        shard = {"file": f"{split}.bin", "tokens": count, "crc32": scan(tokens)[0]}
        splits[split] = {"tokens": count, "documents": 1, "shards": [shard]}
    meta = {"tokenizer": "bytes", "vocab_size": VOCABULARY, "eot_token": VOCABULARY - 1}
    write_meta(data, meta | {"source": {"kind": "pattern"}, "command": "", "splits": splits})


def train_command(out_dir, processes=1, **knobs):
    """The command of a run of 2 * batch_size sequences a step."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    where = runtime.pick_device(device)
    knobs = {
        "device": "cuda:0" if where.type == "cuda" else where.type,  # the same for all processes
        "data_dir": Path(folder).resolve() / "data",
        "dataset": "pattern",
        "out_dir": out_dir,
        "mixer": "tbp",
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "block_size": block_size,
        "batch_size": 2 * batch_size // processes,
        "total_batch_tokens": 2 * batch_size * block_size,
        "eval_tokens": 2 * batch_size * block_size,
        "eval_interval": max_iters,
        "max_iters": max_iters,
        "lr_decay_iters": max_iters,
        "warmup_iters": 2,
        "learning_rate": 1e-2,
        "checkpoint_interval": max(1, max_iters // 4),
        "keep_checkpoints": 100,
        "compile": compile_runs,
        **knobs,
    }
    return [*launcher, "train.py", *(f"--{name}={value}" for name, value in knobs.items())]


def with_one_gpu(environment, index):
    """An environment in which a process sees one GPU, the `index`-th: then two processes take gloo,
    since nccl cannot share a GPU."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    chosen = visible.split(",")[index] if visible else str(index)
    return {**environment, "CUDA_VISIBLE_DEVICES": chosen}


def environment_of_runs():
    """Of the runs of question 1: their cuda:0 is the GPU of the knob `device`."""
    return with_one_gpu(os.environ, runtime.pick_device(device).index or 0)


def train(out_dir, processes=1, **knobs):
    """Run train.py to its end -> what it printed. RuntimeError where it fails."""
    command = train_command(out_dir, processes, **knobs)
    environment = environment_of_runs()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def kill_at_half(out_dir):
    """Begin a run and kill it (SIGKILL) once the checkpoint at half of its steps is there.

    RuntimeError where the run ends without this checkpoint.
    """
    half = out_dir / f"ckpt_{max(1, max_iters // 4) * 2:07d}.pt"
    process = subprocess.Popen(
        train_command(out_dir), cwd=ROOT, stdout=subprocess.DEVNULL, env=environment_of_runs()
    )
    while not half.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    if not half.exists():
        raise RuntimeError(f"the run that was to be killed ended without {half}")
    # A fast run gets further before the signal reaches it.
    for checkpoint in out_dir.glob("ckpt_*.pt"):
        if checkpoint > half:
            checkpoint.unlink()


def losses(out_dir):
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


def same_bits(a, b):
    """Whether two nested values of a checkpoint are the same, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def check_resume(runs):
    """-> a result: is a killed and resumed run the same as one that was not?"""
    train(runs / "whole")
    kill_at_half(runs / "killed")
    output = train(runs / "killed", init_from="resume")
    last = f"ckpt_{max_iters:07d}.pt"
    whole, killed = (torch.load(runs / name / last) for name in ("whole", "killed"))
    same = all(same_bits(whole[key], killed[key]) for key in ("model", "optimizer"))
    resumed = "resumed from" in output
    return {"ok": same and resumed}


def check_two_processes(runs):
    """-> a result: do two processes on one device have the losses of one?"""
    for processes in (1, 2):
        train(runs / f"of_{processes}", processes, dtype="float32")
    one, two = losses(runs / "of_1"), losses(runs / "of_2")
    off = ((one - two).abs() / one).max().item() if len(one) == len(two) else float("inf")
    return {"ok": off < 1e-3, "compiled": off}


RUNS = {
    "killed and resumed, to the bit": check_resume,
    "two processes on one device": check_two_processes,
}


# ---- 2: loss and gradients -----------------------------------------------------------------------


def all_cases():
    """[(mixer, dynamic, n, dtype)]. ValueError for an unknown name."""
    names = list(MIXERS) if mixers == "all" else mixers.split(",")
    numbers = [int(word) for word in streams.split(",")]
    cases = {}  # in order, without repetition
    everything = itertools.product(numbers, names, (True, False), dtypes.split(","))
    for n, name, dynamic, kind in everything:
        if kind not in TOLERANCE:
            raise ValueError(f"dtypes are {', '.join(TOLERANCE)}, not {kind!r}")
        if name not in MIXERS:
            raise ValueError(f"there is no mixer {name!r}; there are {', '.join(MIXERS)}, or all")
        one_stream = MIXERS[name].one_stream
        try:
            n_logits(name, 1 if one_stream else n)
        except ValueError:
            continue  # not defined for n streams
        cases[name, dynamic or one_stream, 1 if one_stream else n, kind] = None
    return list(cases)


def build(mixer, dynamic, n):
    """A model whose parameters are not those of the start, where many gradients are 0."""
    torch.manual_seed(0)
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "block_size": block_size}
    model = GPT(
        GPTConfig(**sizes, vocab_size=VOCABULARY, mixer=mixer, n_streams=n, dynamic=dynamic)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def distance(found, wanted):
    """The largest relative error of a tensor, and its name. An error is divided by the tensor's
    norm, or by 1e-3 of the largest gradient's norm where that is more."""
    found, wanted = ({name: t.double() for name, t in some.items()} for some in (found, wanted))
    norms = {name: tensor.norm().item() for name, tensor in wanted.items()}
    floor = 1e-3 * max(norm for name, norm in norms.items() if name != "loss")
    errors = {
        name: (found[name] - tensor).norm().item() / max(norms[name], floor)
        for name, tensor in wanted.items()
    }
    if bad := [name for name, error in errors.items() if math.isnan(error)]:
        return math.inf, bad[0]
    worst = max(errors, key=errors.get)
    return errors[worst], worst


def check_case(case):
    """-> a result. Runs in a process of the pool."""
    mixer, dynamic, n, kind = case
    torch.set_num_threads(1)
    torch.compiler.reset()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    where = runtime.pick_device(device)
    began = time.time()
    model = build(mixer, dynamic, n).to(where)
    batch = torch.randint(VOCABULARY, (2, batch_size, block_size), device=where)
    wanted = loss_and_gradients(copy.deepcopy(model).double(), batch, contextlib.nullcontext())
    autocast = torch.autocast(where.type, torch.bfloat16, enabled=kind == "bfloat16")
    eager = loss_and_gradients(model, batch, autocast)
    model.compile_regions()
    compiled = loss_and_gradients(model, batch, autocast)

    rounding, _ = distance(eager, wanted)
    off, where_most = distance(compiled, wanted)
    to_eager, _ = distance(compiled, eager)
    return {
        "check": "gradients",
        "case": list(case),
        "ok": off <= 2 * rounding + TOLERANCE[kind],
        "eager": rounding,
        "compiled": off,
        "to_eager": to_eager,
        "worst": where_most,
        "seconds": time.time() - began,
    }


# ---- the call ------------------------------------------------------------------------------------


def open_results(path):
    """-> the results of earlier calls. ValueError if another commit or machine made them."""
    provenance = runtime.provenance() | {"command": None}
    machine = runtime.describe_machine(runtime.pick_device(device)) | {"threads": None}
    about = {"provenance": provenance, "machine": machine}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about) + "\n")
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if lines[0] != about:
        raise ValueError(f"{path} has results of {lines[0]}, and this is {about}; change --folder")
    return lines[1:]


def add(path, results, result):
    results.append(result)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")
    named = " ".join(map(str, result.get("case", [])))
    print(f"{result['check']} {named}: {'right' if result['ok'] else 'WRONG'}", flush=True)


def run_cases(path, results, deadline):
    """Check the cases that have no result yet, several at a time -> how many are left."""
    done = [result["case"] for result in results if "case" in result]
    cases = [case for case in all_cases() if list(case) not in done]
    at_a_time = jobs
    if not jobs:
        at_a_time = os.cpu_count() if runtime.pick_device(device).type == "cuda" else 1
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    left = len(cases)
    with multiprocessing.get_context("spawn").Pool(min(at_a_time, max(1, left))) as pool:
        found = pool.imap_unordered(check_case, cases)
        try:
            while left:
                add(path, results, found.next(timeout=max(0.0, deadline - time.time())))
                left -= 1
        except multiprocessing.TimeoutError:
            pass  # leaving the pool ends its processes
    return left


def main():
    deadline = time.time() + seconds
    home = Path(folder).resolve()
    path = home / "right.jsonl"
    all_cases()  # refuses unknown names at once
    results = open_results(path)
    for check, work in RUNS.items():
        if check not in {result["check"] for result in results}:
            shutil.rmtree(home / "runs", ignore_errors=True)
            write_data(home / "data" / "pattern")
            add(path, results, {"check": check} | work(home / "runs"))
    left = run_cases(path, results, deadline)
    wrong = [result for result in results if not result["ok"]]
    for result in results:
        result |= zip(("mixer", "dynamic", "n", "dtype"), result.get("case", []))
    print_table(results, COLUMNS)
    print(f"{len(results) - len(wrong)} right, {len(wrong)} wrong, {left} left; see {path}")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    runtime.run_script(main, expected=(RuntimeError, ValueError))
