"""
A pretended H100, so that Inductor generates code for one on a machine without a GPU.

    with fake_h100(), FakeTensorMode():
        x = torch.empty(4, device="cuda:0")         # has a shape, and no memory

Three layers pretend, each in one place below:
    C++      fake_cuda.cpp: autograd accepts CUDA tensors
    PyTorch  the queries that Inductor makes of a device are answered with an H100's numbers
    Triton   a driver that knows the target, sm_90, and nothing else

Nothing can be run on it. The C++ layer stays for the rest of the process, so use a process of its
own. Needs g++ and triton, and relies on private names of torch 2.13.
"""

import contextlib
import ctypes
import os
import subprocess
import tempfile
import types
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch.utils._triton
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

# What torch.cuda.get_device_properties() says of an H100 SXM.
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    total_memory=85_029_158_912,
    L2_cache_size=50 * 2**20,
    is_integrated=0,
    gcnArchName="",
)


@contextlib.contextmanager
def fake_h100():
    """Within this context "cuda:0" is an H100 that cannot run anything."""
    pretend_cuda()
    use_flash_attention()
    with contextlib.ExitStack() as stack:
        stack.enter_context(registered_interface())
        stack.enter_context(target_only_triton())
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch(name, answer))
        yield


# ---- C++ -----------------------------------------------------------------------------------------


def pretend_cuda():
    """Compile fake_cuda.cpp, unless that was done before, and load it into this process."""
    source = Path(__file__).with_name("fake_cuda.cpp")
    name = f"fake_cuda_{os.getuid()}_{torch.__version__}.so"
    library = Path(tempfile.gettempdir()) / name
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        torch_folder = Path(torch.__file__).parent
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", source, "-o", unfinished]
        command += [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        unfinished.replace(library)  # at once, for another process may be about to load it
    if ctypes.CDLL(str(library)).pretend_cuda() == 2:
        raise RuntimeError(f"torch {torch.__version__} still sees no accelerator")


# ---- PyTorch -------------------------------------------------------------------------------------


class H100Interface(device_interface.CudaInterface):
    """What Dynamo and Inductor ask about the devices of type "cuda"."""

    class Worker(device_interface.CudaInterface.Worker):
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: H100)

    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_device_properties = staticmethod(lambda device=None: H100)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_available = staticmethod(lambda: True)
    is_bf16_supported = staticmethod(lambda including_emulation=True: True)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    get_raw_stream = staticmethod(lambda index: 0)
    synchronize = staticmethod(lambda device=None: None)


@contextlib.contextmanager
def registered_interface():
    """H100Interface in place of the real interface of CUDA devices."""
    device_interface.get_interface_for_device("cuda")  # the registry fills itself on first use
    registry = device_interface.device_interfaces
    with mock.patch.dict(registry, {"cuda": H100Interface, "cuda:0": H100Interface}):
        yield


def use_flash_attention():
    """Let F.scaled_dot_product_attention take the kernel that it takes on an H100."""
    global attention_library  # which lives as long as its registrations should
    if attention_library is None:
        attention_library = torch.library.Library("aten", "IMPL")
        name = "scaled_dot_product_attention"
        attention_library.impl(name, flash_attention, "AutogradCUDA")


attention_library = None


def flash_attention(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """What half-precision inputs without a mask are dispatched to."""
    if attn_mask is not None or enable_gqa or q.dtype not in (torch.bfloat16, torch.float16):
        raise NotImplementedError("an H100's choice is known for half precision without a mask")
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]


class OnCPU(TorchDispatchMode):
    """Makes on the CPU what would be made on the H100."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args = [torch.device("cpu") if is_cuda(arg) else arg for arg in args]
        kwargs = {
            name: torch.device("cpu") if name == "device" and is_cuda(value) else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def is_cuda(device):
    """Whether the argument of an operation names a CUDA device."""
    if isinstance(device, str):
        device = torch.device(device)
    return isinstance(device, torch.device) and device.type == "cuda"


class ConstantFolderOnCPU(joint_graph.UniformValueConstantFolder):
    """Inductor folds constants by computing one-element tensors on the graph's own device."""

    def run(self, *args, **kwargs):
        with OnCPU():
            return super().run(*args, **kwargs)


ANSWERS = {
    "torch.cuda.get_device_properties": lambda device=None: H100,
    "torch.cuda.get_device_capability": lambda device=None: (9, 0),
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    "torch._inductor.fx_passes.joint_graph.UniformValueConstantFolder": ConstantFolderOnCPU,
}


# ---- Triton --------------------------------------------------------------------------------------


class TargetOnlyDriver(DriverBase):
    """Says what to compile for, and can do nothing else."""

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_device_capability(self, *args):
        return (9, 0)

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError


@contextlib.contextmanager
def target_only_triton():
    """TargetOnlyDriver as Triton's driver. PyTorch remembers whether there is Triton, and for
    which device, in caches; they are emptied on the way in and out."""
    names = ("has_triton", "triton_backend", "triton_hash_with_backend")
    caches = [getattr(torch.utils._triton, name) for name in names]
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(TargetOnlyDriver())
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        triton.runtime.driver._active = before
        for cache in caches:
            cache.cache_clear()
