"""
All that Inductor generates for one compiled call: each graph's code, launches and bytes.

    with capturing() as graphs, FakeTensorMode():
        x = torch.empty(1000, device="cuda:0")
        torch.compile(function)(x)
    graphs[0].launches, graphs[0].bytes

A graph's code is generated and then neither loaded nor run.
"""

import contextlib
import dataclasses
import re
import tempfile
import types
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
from torch._inductor import scheduler
from torch._inductor.graph import GraphLowering

from dev.h100.fake_h100 import fake_h100


@dataclasses.dataclass
class Node:
    """A step of a graph, after fusion. Most are one kernel; nops are none."""

    kind: str  # triton, extern (a library's kernel) or nop
    operations: str  # what the step computes, in ATen's names
    reads: dict  # buffer -> bytes, at most the buffer's size
    writes: dict

    @property
    def bytes(self):
        return sum(self.reads.values()) + sum(self.writes.values())


@dataclasses.dataclass
class Graph:
    """What was generated for one graph."""

    backward: bool
    code: str  # the generated Python file, Triton kernels included
    nodes: list[Node]
    numel: dict  # buffer -> number of elements

    @property
    def kernels(self):
        """{name: source} of the Triton kernels."""
        return dict(KERNEL.findall(self.code))

    @property
    def triton_launches(self):
        return len(TRITON_LAUNCH.findall(self.body))

    @property
    def extern_launches(self):
        return len(EXTERN_LAUNCH.findall(self.body))

    @property
    def launches(self):
        return self.triton_launches + self.extern_launches

    @property
    def bytes(self):
        """What all launches read and write, each buffer counted at most once a launch."""
        return sum(node.bytes for node in self.nodes)

    @property
    def body(self):
        """The generated function that launches the kernels."""
        return self.code[self.code.index("    def call(self, args):") :]


KERNEL = re.compile(
    r"^\w+ = async_compile\.triton\('(\w+)', '''\n(.*?)^''', device_str='cuda'\)",
    re.DOTALL | re.MULTILINE,
)
TRITON_LAUNCH = re.compile(r"^\s+\w+\.run\(.*, stream=", re.MULTILINE)
EXTERN_LAUNCH = re.compile(r"(?:extern_kernels\.\w+|torch\.ops\.\w+\.\w+(?:\.\w+)?)\(")


@contextlib.contextmanager
def capturing():
    """A list, to which each graph that is compiled in this context adds a Graph."""
    graphs = []

    def compile_to_module(lowering):
        code, _ = lowering.codegen()
        graphs.append(describe(lowering, code.value))
        path = Path(folder, f"{len(graphs)}.py")
        path.write_text(code.value)  # PyTorch reads it again
        lowering.cache_key, lowering.cache_path, lowering.cache_linemap = path.stem, str(path), []
        outputs = [describe_output(output) for output in lowering.graph_outputs]
        return types.SimpleNamespace(call=partial(run_nothing, outputs), __file__=str(path))

    inductor = torch._inductor.config.patch(
        force_disable_caches=True,  # a graph from the cache would not be generated
        compile_threads=1,
        shape_padding=False,  # which is decided by timing matrix products
    )
    # The backward is usually compiled when it is first called.
    functorch = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    replaced = mock.patch.object(GraphLowering, "compile_to_module", compile_to_module)
    with tempfile.TemporaryDirectory() as folder, fake_h100(), inductor, functorch, replaced:
        yield graphs


def describe(lowering, code):
    """The Graph of a GraphLowering whose code was generated."""
    nodes = [describe_node(node) for node in lowering.scheduler.nodes]
    numel = {}
    for node in nodes:
        for buffer in (*node.reads, *node.writes):
            size = lowering.get_numel(buffer)
            numel[buffer] = int(lowering.sizevars.optimization_hint(size))
    return Graph(lowering.is_backward, code, nodes, numel)


def describe_node(node):
    """The Node of one node of Inductor's scheduler."""
    kind = "triton"
    if isinstance(node, scheduler.NopKernelSchedulerNode):
        kind = "nop"
    elif isinstance(node, scheduler.ExternKernelSchedulerNode):
        kind = "extern"
    operations = {
        str(origin.target)
        for part in node.get_nodes()
        if part.node is not None
        for origin in part.node.get_origins()
    }
    count = node.get_read_write_buffer_accesses
    reads = dict(count(include_reads=True, include_writes=False))
    writes = dict(count(include_reads=False, include_writes=True))
    return Node(kind, " ".join(sorted(operations)), reads, writes)


def describe_output(output):
    """(size, stride, dtype, device) of an output of a graph; None for one that is no tensor."""
    if not hasattr(output, "get_size") or not output.has_tensor_output():
        return None
    size, stride = output.get_size(), output.get_stride()
    return tuple(map(int, size)), tuple(map(int, stride)), output.get_dtype(), output.get_device()


def run_nothing(outputs, args):
    """Stands in for the generated function: outputs of the right shapes, without values."""
    args.clear()  # as the generated function does
    return tuple(output and empty_like(*output) for output in outputs)


def empty_like(size, stride, dtype, device):
    return torch.empty_strided(size, stride, dtype=dtype, device=device)
