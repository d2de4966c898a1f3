"""
What a step keeps and moves: memory, kernels that Inductor generated, and their bytes per second.

    launches = []
    record_launches(launches)             # before the model is compiled
    step(), step()                        # compiles, and chooses each kernel's configuration
    bandwidth(step, launches, size)       # of kernels with an argument of at least `size` numbers

The bytes of a launch are those of its arguments: each counts once, and twice where the kernel both
reads and writes it. A kernel moves at least these if it uses every argument whole, as the kernels
that pass over the streams do. The seconds are the profiler's, of the same launch in the same step.
"""

import itertools
import multiprocessing
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch


def peak_memory(step, kept, device):
    """Bytes of tensors at the worst moment of `step`; None on a device that does not tell.

    On CUDA, torch's own figure. On a CPU, the bytes of `kept` (the tensors from before the step)
    and the highest running sum of what the profiler sees allocated and freed.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events]  # a free is negative
    return sum(tensor.nbytes for tensor in kept) + max(itertools.accumulate(changes))


def use_cache(folder):
    """From now on the compiler keeps its files in `folder`."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")


def in_fresh_process(work, *arguments):
    """work(*arguments) of a process that has imported torch, and done nothing else with it."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")  # imports once for all processes
        context.set_forkserver_preload(["torch", "torch._dynamo", "torch._inductor.graph"])
    else:
        context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(work, *arguments).result()


def measure_afresh(probe, case, cache, twice):
    """What probe(case, cache) finds in a fresh process.

    twice: then in another one, which finds in the folder `cache` what the first has compiled. The
    second one gives compile_warm_s and peak_memory_bytes.
    """
    found = in_fresh_process(probe, case, cache)
    if twice:
        again = in_fresh_process(probe, case, cache)
        found["compile_warm_s"] = again["compile_s"]
        found["peak_memory_bytes"] = again["peak_memory_bytes"]
    return found


def compiling(loss, wait):
    """What the first forward and backward of a compiled model cost.

    loss: () -> the loss. wait: returns when the device has done all that was queued.
    """
    from torch._inductor.graph import GraphLowering  # not for a model that runs eagerly

    programs = []
    GraphLowering.save_output_code = programs.append
    wait()
    began, began_cpu = time.perf_counter(), sum(os.times()[:4])
    value = loss()
    n_forward = len(programs)  # the backward is compiled when it first runs
    value.backward()
    wait()
    seconds, cpu_seconds = time.perf_counter() - began, sum(os.times()[:4]) - began_cpu
    kernels = [count_kernels(program) for program in programs]
    return {
        "compile_s": seconds,
        "compile_cpu_s": cpu_seconds,
        "kernels_forward": sum(kernels[:n_forward]),
        "kernels_backward": sum(kernels[n_forward:]),
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
    }


def compiled_graphs():
    """How many graphs this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def count_kernels(program):
    """Calls of generated kernels in the text of a program that Inductor generated."""
    return len(re.findall(r"^ +(?:cpp_|triton_)\w+(?:\.run)?\(", program, re.M))


# ---- bytes per second on a GPU -------------------------------------------------------------------


class Launch(NamedTuple):
    kernel: str
    bytes: int  # of all arguments
    largest: int  # numbers in the largest argument


def record_launches(launches):
    """From now on, each launch of a generated kernel adds a Launch to the list."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    run = CachingAutotuner.run

    def recorded(self, *arguments, **keywords):
        launches.append(describe(self.fn.__name__, self.fn.arg_names, arguments))
        return run(self, *arguments, **keywords)

    CachingAutotuner.run = recorded


def describe(kernel, names, arguments):
    """-> Launch. names: of the kernel's parameters, of which `arguments` are the first."""
    moved = largest = 0
    for name, argument in zip(names, arguments):
        if not isinstance(argument, torch.Tensor):
            continue
        # An expanded tensor has more numbers than memory.
        size = min(argument.nbytes, argument.untyped_storage().nbytes())
        in_place = name.startswith("in_out_ptr")  # Inductor's name for what is read and written
        moved += 2 * size if in_place else size
        largest = max(largest, size // argument.element_size())
    return Launch(kernel, moved, largest)


def bandwidth(step, launches, size):
    """Run one step on the GPU -> what `stream_traffic` says of it, and a copy's GB/s."""
    device = torch.device("cuda")
    copy = copy_gb_s(device, 2**29)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    launches.clear()
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    return {"copy_gb_s": copy} | stream_traffic(launches, generated_kernels(events), size)


def generated_kernels(events):
    """The profiler's events -> (kernel, seconds) of Inductor's, in the order in which they ran."""
    cuda = torch.autograd.DeviceType.CUDA
    found = [e for e in events if e.device_type() == cuda and e.name().startswith("triton_")]
    found.sort(key=lambda event: event.start_ns())
    return [(event.name(), event.duration_ns() / 1e9) for event in found]


def stream_traffic(launches, timed, size):
    """-> bytes, milliseconds and GB/s, summed over the launches that have an argument of at least
    `size` numbers; and `kernels`, a table of all launches.

    timed: (kernel, seconds) of the same launches in the same order. Where their kernels are not
    those of `launches`, nobody knows which bytes took which time: all figures are None.
    """
    sums = {"stream_bytes": None, "stream_ms": None, "stream_gb_s": None, "kernels": None}
    if not timed or [launch.kernel for launch in launches] != [kernel for kernel, _ in timed]:
        print(
            f"the GB/s are left out: {len(launches)} generated kernels were launched, and the "
            f"profiler saw {len(timed)}, or others"
        )
        return sums
    table = {}
    for launch, (_, seconds) in zip(launches, timed):
        row = table.setdefault(launch, {"launches": 0, "ms": 0.0})
        row["launches"] += 1
        row["ms"] += seconds * 1e3
    sums["kernels"] = [launch._asdict() | row for launch, row in table.items()]
    streams = [row for row in sums["kernels"] if row["largest"] >= size]
    if streams:
        sums["stream_bytes"] = sum(row["bytes"] * row["launches"] for row in streams)
        sums["stream_ms"] = sum(row["ms"] for row in streams)
        sums["stream_gb_s"] = sums["stream_bytes"] / sums["stream_ms"] / 1e6
    return sums


def copy_gb_s(device, size, repeats=20):
    """GB/s that a copy of `size` bytes reads and writes on the device, in the best of 3 tries."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = []
    for _ in range(4):  # the first one warms up
        getattr(torch, device.type).synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            target.copy_(source)
        getattr(torch, device.type).synchronize()
        rates.append(2 * size * repeats / (time.perf_counter() - began) / 1e9)
    return max(rates[1:])
