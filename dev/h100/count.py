"""
What one compiled training step of a GPT launches and moves on an H100: one capture, as JSON.

    python -m dev.h100.count '{"config": {"mixer": "tbp", "n_layer": 1}, "batch_size": 16}'

report.py runs this module in a process of its own for each model, since a pretended H100 stays for
the rest of a process. The JSON may also hold "cubin" (count registers and spills) and "verbose"
(print each step that touches a tensor of the streams' size to stderr).
"""

import json
import os
import sys
import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from compile_options import compiler_options
from dev.h100.capture import capturing
from model import GPT, GPTConfig


def main():
    settings = json.loads(sys.argv[1])
    config = GPTConfig(**settings["config"])
    forward, backward = capture_step(config, settings["batch_size"])
    counts = {"forward": count(forward), "backward": count(backward)}

    if settings.get("verbose"):
        elements = settings["batch_size"] * config.block_size * config.n_streams * config.n_embd
        for graph in (forward, backward):
            print_steps(graph, elements)
    if settings.get("cubin"):
        from dev.h100.cubin import resource_usage

        for name, graph in (("forward", forward), ("backward", backward)):
            usage = resource_usage(graph.kernels)
            counts[name]["registers"] = max(use.registers for use in usage)
            counts[name]["local_memory"] = sum(use.local_bytes > 0 for use in usage)

    print(json.dumps(counts), flush=True)
    os._exit(0)  # the interpreter's own way out would release CUDA tensors that never were


def capture_step(config, batch_size):
    """The forward and the backward Graph of a training step under bfloat16 autocast."""
    shape = batch_size, config.block_size
    with capturing() as graphs, FakeTensorMode():
        with torch.device("cuda:0"):
            model = GPT(config)
            idx, targets = (torch.empty(shape, dtype=torch.long) for _ in range(2))
        options = compiler_options(config.n_streams)
        model.compile(fullgraph=True, dynamic=False, options=options)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(idx, targets)[1]
        loss.backward()
    if [graph.backward for graph in graphs] != [False, True]:
        raise RuntimeError(f"expected a forward and a backward graph, got {len(graphs)} graphs")
    return graphs


def count(graph):
    return {
        "triton": graph.triton_launches,
        "extern": graph.extern_launches,
        "bytes": graph.bytes,
    }


def print_steps(graph, elements):
    """The steps that read or write a tensor of at least `elements` elements."""
    for node in graph.nodes:
        buffers = (*node.reads, *node.writes)
        if any(graph.numel.get(buffer, 0) >= elements for buffer in buffers):
            read, written = (sum(part.values()) / 1e6 for part in (node.reads, node.writes))
            direction = "backward" if graph.backward else "forward"
            print(
                f"{direction:8}  {node.kind:6}  reads {read:6.0f} MB  writes {written:6.0f} MB  "
                f"{node.operations[:120]}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*CUDA")  # torch looks for the GPU now and then
    main()
