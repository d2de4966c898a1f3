"""compiler.py: machines that cannot compile, and versions of torch that compile wrongly."""

import runpy

import filelock
import pytest
import torch
from conftest import ROOT, TINY, run, write_checkpoint

import compiler
from model import GPT, GPTConfig


@pytest.mark.quick
def test_differences_are_told_from_rounding():
    wanted = {"loss": torch.tensor(5.0), "a": torch.ones(4), "rounding": torch.full((4,), 1e-9)}
    assert not compiler.differences(wanted, wanted, tolerance=1e-3)
    near = {"loss": torch.tensor(5.001), "a": torch.ones(4) + 1e-4, "rounding": torch.zeros(4)}
    assert not compiler.differences(wanted, near, tolerance=1e-3)
    far = {"loss": torch.tensor(5.1), "a": torch.zeros(4), "rounding": torch.zeros(4)}
    assert compiler.differences(wanted, far, tolerance=1e-3) == ["a", "loss"]
    # In 16 bits a gradient of a thousandth of the largest norm is mostly rounding, one of a tenth
    # is not.
    small = {"loss": torch.tensor(5.0), "a": torch.tensor(0.005), "b": torch.tensor(0.5)}
    none = {"loss": torch.tensor(5.0), "a": torch.tensor(0.0), "b": torch.tensor(0.0)}
    assert compiler.differences(small, none, tolerance=0.2) == ["b"]
    nan = {**near, "loss": torch.tensor(float("nan"))}
    assert compiler.differences(wanted, nan, tolerance=1e-3) == ["loss"]


# The compiled model gets no gradient in its first block, as torch 2.11 once made of it.
BREAK = """
import model, compiler
compiler.TESTED_TORCH = ("1.0",)
def compile_wrongly(self, **_):
    forward = self.blocks[0].mlp.forward
    self.blocks[0].mlp.forward = lambda x: forward(x).detach()
model.GPT.compile_regions = compile_wrongly
"""


def test_an_untested_torch_must_compile_the_gradients_that_eager_mode_has(tiny, tmp_path):
    tiny += ["--compile=True", "--n_layer=1", "--mixer=hc", "--n_streams=2"]
    output = run(*tiny, ok=False, patch=BREAK)
    assert "compiles this model wrongly: blocks.0.mlp.c_" in output, output
    assert "--compile=False" in output and compiler.TESTED_TORCH[-1] in output
    assert not list((tmp_path / "out").glob("*.pt"))


UNTESTED = "import compiler\ncompiler.TESTED_TORCH = ()\n"
# Traced, and run by eager kernels: the comparison is the same, and generating code takes long.
TRACE = """
import functools
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
"""


@pytest.mark.parametrize(
    "dtype, patch",
    [
        ("float32", UNTESTED + TRACE),
        pytest.param("float32", UNTESTED, marks=pytest.mark.long),
        pytest.param("bfloat16", UNTESTED, marks=pytest.mark.long),
    ],
)
def test_an_untested_torch_that_compiles_well_trains(dtype, patch, tiny):
    tiny += ["--compile=True", "--n_layer=1", "--mixer=hc", "--n_streams=2", "--max_iters=0"]
    output = run(*tiny, f"--dtype={dtype}", patch=patch)
    assert "is untested; compiled, it computes what eager code does" in output


@pytest.mark.quick
def test_the_tested_versions_hold_the_one_here():
    assert compiler.torch_is_tested(), f"{torch.__version__} is not in compiler.TESTED_TORCH"


# ---- what is compiled without training -----------------------------------------------------------

# The step of a token, and the model, compute something else when they are compiled.
BREAK_OUTPUTS = """
import model, compiler, generate
compiler.TESTED_TORCH = ("1.0",)
def compile_step_wrongly(self):
    self.run_head = lambda *arguments: 1.1 * generate.run_head(*arguments)
generate.Decoder.compile = compile_step_wrongly
def compile_wrongly(self):
    forward = self.blocks[0].mlp.forward
    self.blocks[0].mlp.forward = lambda x: 2 * forward(x)
model.GPT.compile_regions = compile_wrongly
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory, tiny_data):
    """By the name of a script: a command that compiles, as small as can be."""
    torch.manual_seed(0)
    sizes = dict(block_size=16, vocab_size=320, n_layer=1, n_head=2, n_embd=16)
    network = GPT(GPTConfig(**sizes, mixer="residual", n_streams=1))
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder, network)
    device = ["--device=cpu", "--batch_size=2"]
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16"]
    train = [*TINY, *shape, "--mixer=residual", "--n_streams=1", f"--data_dir={tiny_data}"]
    few = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=128", "--vocab_size=64"]
    few += ["--mixers=residual", "--prompt_tokens=4", "--new_tokens=4"]
    return {
        "cpu_generate": ["dev/cpu_generate.py", *few, "--places=1", "--top_k=9"],
        "gpu_generate": ["dev/gpu_generate.py", *few, "--rounds=1", f"--folder={folder}"],
        "train": ["train.py", *train, "--max_iters=1"],
        "sample": ["sample.py", f"--out_dir={folder}", *device, "--max_new_tokens=3"],
        "eval": ["eval.py", f"--out_dir={folder}", *device, f"--data={tiny_data}/tiny"],
        "bench": [
            *("bench.py", *shape, *device, "--vocab_size=64", "--mixers=residual"),
            *("--rounds=1", "--steps=1", "--warmup=1"),
        ],
    }


@pytest.mark.parametrize("script", ["sample", "eval", "cpu_generate", "gpu_generate"])
def test_an_untested_torch_must_compile_the_outputs_that_eager_mode_has(script, commands):
    output = run(*commands[script], ok=False, patch=BREAK_OUTPUTS)
    assert "compiles this model wrongly: logits (and" in output and "--compile=False" in output


@pytest.mark.long
@pytest.mark.parametrize("script", ["sample", "eval"])
def test_an_untested_torch_that_compiles_well_is_used(script, commands):
    assert "it computes what eager code does" in run(*commands[script], patch=UNTESTED)


# ---- machines that cannot compile ----------------------------------------------------------------

# What Windows lacks. filelock, which asks for fcntl, came with torch.
NO_MODULES = """
import importlib.abc
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Missing())
for name in list(sys.modules):
    if name.partition(".")[0] in ("fcntl", "resource", "filelock"):
        sys.modules.pop(name)
"""


def machine_that_lacks(what, folder):
    """-> what `run` takes to be on a machine without a compiler, without file locks, or whose
    compiler cache cannot be written."""
    (folder / "file").touch()
    return {
        "compiler": {"CXX": "/no/such", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"},
        "locks": {"patch": NO_MODULES},
        "cache": {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/file"},
    }[what]


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("sample", "eval", "bench")]


def command_in(folder, command):
    """It writes to the folder."""
    key = {"train.py": "out_dir", "bench.py": "out"}.get(command[0])
    return [*command, f"--{key}={folder}/out"] if key else command


@pytest.mark.quick
@pytest.mark.parametrize("script", ["train", "sample", "eval", "bench"])
def test_without_file_locks_a_script_refuses_at_once(script, commands, tmp_path, monkeypatch):
    """The compiler would wait for ever. In this process, which saves importing torch."""
    monkeypatch.setattr(filelock, "FileLock", filelock.SoftFileLock)
    monkeypatch.setattr("sys.argv", command_in(tmp_path, commands[script]))
    with pytest.raises(SystemExit, match="this Python cannot lock files .*--compile=False"):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["compiler", "cache"])
@pytest.mark.parametrize("script", ["train", *LONG])
def test_a_machine_that_cannot_compile_is_told_what_to_do(script, what, commands, tmp_path):
    lacks = machine_that_lacks(what, tmp_path)
    output = run(*command_in(tmp_path, commands[script]), ok=False, fresh=True, **lacks)
    said = output.splitlines()[-1]
    assert "torch.compile does not work here" in said and "TORCHINDUCTOR_CACHE_DIR" in said, output
    assert "--compile=False" in said


@pytest.mark.parametrize("what", ["locks", "cache"])
@pytest.mark.parametrize("script", ["train", *LONG])
def test_and_does_without(script, what, commands, tmp_path):
    """What the refusal proposes helps."""
    lacks = machine_that_lacks(what, tmp_path)
    command = [*command_in(tmp_path, commands[script]), "--compile=False"]
    output = run(*command, fresh=True, **lacks)
    if script == "train" and what == "locks":
        assert "cannot be locked here (No module named 'fcntl'); see to it yourself" in output
