"""
What a training step costs on a GPU with each mixer, beside a plain GPT-2 and the residual model.

    python -m dev.gpu_speed --folder=out-gpu                # 12 layers x 768, 16 x 1024 tokens
    python -m dev.gpu_speed --folder=out-gpu --n_layer=24 --n_embd=1024 --n_head=16
    python -m dev.gpu_speed --folder=out-gpu                # again: what is not measured yet

Each group of mixers is a run of bench.py, whose file FOLDER/speed_LxC_MIXERS.json has all figures:
tokens per second in turns with `plain` and `residual` (median, slowest and fastest round); MFU;
GB/s of the kernels that touch the streams, and of a copy; peak memory; seconds to compile, with an
empty cache and a full one. The first group also runs with deterministic = False.

A call ends after `seconds`. A group that was stopped then is measured again in the next call. The
last table has all groups so far. The table before it has the kernels of a step of the first mixer,
with bytes and time, to compare with dev.h100.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import runtime
from configurator import configure
from dev.table import print_table

folder = "out-gpu"  # everything is written here
groups = "tbp,identity,hc sinkhorn,kronecker rtbp,permutation"  # mixers that run side by side
seconds = 570  # the call ends after this time
n_layer = 12
n_embd = 768
n_head = 12
block_size = 1024
batch_size = 16
vocab_size = 50304
rounds = 10
steps = 3  # in a round, of each model
device = "auto"
config = configure(globals())

ROOT = Path(__file__).resolve().parent.parent
OF_BENCH = ("n_layer", "n_embd", "n_head", "block_size", "batch_size", "vocab_size")
OF_BENCH += ("rounds", "steps", "device")
COLUMNS = {
    "mixer": "mixer",
    "n": "n_streams",
    "deterministic": "deterministic",
    "tok/s": "tok_s",
    "of plain": "ratio_to_plain",
    "slowest": "plain_min",
    "fastest": "plain_max",
    "of residual": "ratio_to_residual",
    "mfu": "mfu",
    "stream GB/s": "stream_gb_s",
    "copy GB/s": "copy_gb_s",
    "peak GB": "peak_gb",
    "compile s": "compile_s",
    "warm s": "compile_warm_s",
}
KERNELS = {"kernel": "kernel", "launches": "launches", "MB": "mb", "us": "us", "GB/s": "gb_s"}


def result_path(group):
    return Path(folder).resolve() / f"speed_{n_layer}x{n_embd}_{group.replace(',', '+')}.json"


def bench_command(group, first):
    knobs = {name: config[name] for name in OF_BENCH}
    knobs |= {"mixers": group, "both_deterministic": first, "out": result_path(group)}
    return [sys.executable, "bench.py", *(f"--{name}={value}" for name, value in knobs.items())]


def run_until(command, deadline):
    """Run the command; kill its processes at the deadline. Raises RunError where it fails."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(timeout=max(0.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return
    if status:
        raise runtime.RunError(
            f"bench.py ended with status {status}; its message is above. Leave its mixers out with "
            "--groups, or take a smaller --batch_size. The command was: " + shlex.join(command)
        )


def measured(group, commit):
    """The report of a group if all of it is measured, else None.

    ValueError if it was measured at another commit, or with other knobs.
    """
    path = result_path(group)
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    if report["provenance"]["commit"] != commit:
        raise ValueError(
            f"{path} was measured at commit {report['provenance']['commit']}, and this is {commit};"
            " change --folder"
        )
    other = [name for name in OF_BENCH if report["config"][name] != config[name]]
    if other:
        then = ", ".join(f"{name} = {report['config'][name]!r}" for name in other)
        now = ", ".join(f"{name} = {config[name]!r}" for name in other)
        raise ValueError(f"{path} was measured with {then}, and now {now}; change --folder")
    names = {row["mixer"] for row in report["rows"] if "tok_s" in row}
    return report if names >= set(group.split(",")) else None


def kernel_rows(row):
    """The kernels of one step of a row, the slowest first."""
    kernels = sorted(row.get("kernels") or [], key=lambda kernel: -kernel["ms"])
    return [
        {
            "kernel": kernel["kernel"][:60],
            "launches": kernel["launches"],
            "mb": kernel["bytes"] / 1e6,
            "us": kernel["ms"] * 1e3 / kernel["launches"],
            "gb_s": kernel["bytes"] * kernel["launches"] / kernel["ms"] / 1e6,
        }
        for kernel in kernels
    ]


def table_rows(reports):
    """The rows of all groups. Each group has the yardsticks again, so their throughput shows how
    steady the machine was."""
    rows = [row for report in reports for row in report["rows"]]
    for row in rows:
        if row.get("peak_memory_bytes"):
            row["peak_gb"] = row["peak_memory_bytes"] / 1e9
    return rows


def main():
    deadline = time.time() + seconds
    Path(folder).mkdir(parents=True, exist_ok=True)
    commit = runtime.provenance()["commit"]
    reports, left, failed = [], [], []
    for group in groups.split():
        report = measured(group, commit)
        if report is None:
            try:
                run_until(bench_command(group, first=group == groups.split()[0]), deadline)
            except runtime.RunError as error:  # the other groups can still be measured
                failed.append(str(error))
                continue
            report = measured(group, commit)
        if report is None:
            left.append(group)
        else:
            reports.append(report)

    for report in reports[:1]:
        print("machine: " + json.dumps(report["machine"]) + f", commit {commit}")
        first = groups.replace(",", " ").split()[0]
        rows = [row for row in report["rows"] if row["mixer"] == first and row.get("kernels")]
        if rows:
            print_table(kernel_rows(rows[0])[:20], KERNELS)
    if reports:
        print_table(table_rows(reports), COLUMNS)
    if left:
        print(f"not measured yet: {' '.join(left)}; run the same command again")
    if failed:
        raise runtime.RunError("\n".join(failed))


if __name__ == "__main__":
    runtime.run_script(main)
