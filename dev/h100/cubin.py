"""
Registers and spills of Triton kernels, compiled for sm_90 by the ptxas that comes with triton.

    for use in resource_usage(graph.kernels):       # see capture.py
        print(use.kernel, use.registers, use.local_bytes)

Inductor would time several launch configurations of a kernel on the GPU and keep the fastest. Which
that is cannot be known here: the first one is compiled.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import triton.backends.nvidia
from torch._inductor.codecache import PyCodeCache

from dev.h100.fake_h100 import fake_h100

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


class Usage(NamedTuple):
    """What one kernel takes of a multiprocessor."""

    kernel: str
    registers: int  # of a thread
    local_bytes: int  # of a thread, in local memory: spilled registers, and arrays as sin() has
    shared_bytes: int  # of a block
    warps: int


def resource_usage(kernels):
    """{name: source} of Triton kernels -> a Usage of each."""
    # Inductor would activate the GPU's driver, and try to launch without Triton's launcher.
    on_gpu = "torch._inductor.runtime.triton_helpers.set_driver_to_gpu"
    static = (
        "torch._inductor.runtime.triton_heuristics.StaticTritonCompileResult.can_statically_launch"
    )
    with (
        fake_h100(),
        mock.patch(on_gpu, lambda: None),
        mock.patch(static, lambda *args, **kwargs: None),
    ):
        return [compile_kernel(name, source) for name, source in kernels.items()]


def compile_kernel(name, source):
    autotuner = getattr(PyCodeCache.load(source), name)
    compiled = autotuner._precompile_config(autotuner.configs[0]).kernel
    counts = cuobjdump(compiled.asm["cubin"])
    local = counts.get("LOCAL", 0) + counts.get("STACK", 0)
    metadata = compiled.metadata
    return Usage(name, counts["REG"], local, metadata.shared, metadata.num_warps)


def cuobjdump(cubin):
    """{"REG": ..., "STACK": ..., "SHARED": ..., "LOCAL": ...} of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
