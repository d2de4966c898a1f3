"""runtime.py: devices, provenance, and what it says where a system lacks something."""

import contextlib
import importlib.util
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, handlers_kept, run

import runtime

CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")


@pytest.mark.quick
@pytest.mark.parametrize(
    "name, says",
    [
        ("tpu", "device must be auto, cpu, cuda, cuda:N or mps, not 'tpu'"),
        ("cpu:0", "not 'cpu:0'"),
        ("cuda:99", "device = cuda:99, but this torch"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, says):
    with pytest.raises(ValueError, match=says):
        runtime.pick_device(name)


@pytest.mark.quick
def test_dtypes():
    assert runtime.pick_dtype("auto", CPU) == torch.float32
    assert runtime.pick_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ValueError, match="not 'float8'"):
        runtime.pick_dtype("float8", CPU)
    assert runtime.pick_dtype("bfloat16", CPU, "bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is float32: say --dtype=bfloat16"):
        runtime.pick_dtype("auto", CPU, "bfloat16")
    x = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with runtime.pick_autocast(dtype, CPU):
            assert (x @ x).dtype == dtype


@pytest.mark.quick
@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Radeon of tomorrow", 0),
    ],
)
def test_peak_flops_by_the_name_of_the_gpu(name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert runtime.peak_flops(torch.device("cuda:0"), torch.bfloat16) == flops
    assert runtime.peak_flops(torch.device("cuda:0"), torch.float32) == 0  # of another data sheet


@pytest.mark.quick
def test_a_cpu_promises_no_flops_and_has_a_peak_of_memory():
    """A block as large as the peak so far, which a test before may have set, moves it."""
    assert runtime.peak_flops(CPU, torch.bfloat16) == 0
    before = runtime.peak_memory(CPU)
    block = torch.ones(before, dtype=torch.uint8)
    assert before + 25e6 < runtime.peak_memory(CPU) < 2 * before + 1e9
    del block


@pytest.mark.skipif(
    not STATUS.exists() or "VmHWM" not in STATUS.read_text(),
    reason="needs the peak that Linux keeps",
)
def test_the_peak_of_a_started_process_is_not_that_of_its_parent():
    block = torch.ones(2**30, dtype=torch.uint8)
    code = "import runtime, torch; print(runtime.peak_memory(torch.device('cpu')))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 2**30 < runtime.peak_memory(CPU)
    del block


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def provenance_of(folder):
    """What the copy of runtime.py in this folder says."""
    spec = importlib.util.spec_from_file_location("a_copy", folder / "runtime.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.provenance()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_provenance_names_the_commit_that_holds_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/folder/train.py", "--x=a b"])
    repository, copy = tmp_path / "repository", tmp_path / "repository" / "copy"
    copy.mkdir(parents=True)
    for folder in (tmp_path, repository, copy):
        shutil.copy(ROOT / "runtime.py", folder)
    nothing = {"commit": None, "clean": None}
    assert nothing.items() <= provenance_of(tmp_path).items()  # no repository

    git(repository, "init", "-q")
    (repository / ".gitignore").write_text("copy\n__pycache__\n")
    git(repository, "add", ".gitignore", "runtime.py")
    git(repository, "commit", "-qm", "one")
    done = subprocess.run(
        ["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True
    )
    commit = done.stdout.strip()
    assert provenance_of(repository) == {
        "commit": commit,
        "clean": True,
        "torch": torch.__version__,
        "command": "train.py '--x=a b'",
    }
    assert nothing.items() <= provenance_of(copy).items()  # a repository that ignores the file
    with monkeypatch.context() as without_git:
        without_git.setenv("PATH", "")
        assert nothing.items() <= provenance_of(repository).items()
    (repository / "results").mkdir()
    (repository / "results" / "table.md").write_text("a study writes here while its runs go on")
    assert provenance_of(repository)["clean"] is True
    with open(repository / "runtime.py", "a") as file:
        file.write("# changed\n")
    assert provenance_of(repository)["clean"] is False


@pytest.mark.quick
@pytest.mark.parametrize(
    "error, ends_with",
    [
        (ValueError("seed must be 1"), "ValueError: seed must be 1"),
        (runtime.RunError("the disk is full"), "RunError: the disk is full"),
        (KeyboardInterrupt(), 130),
        (OSError(13, "denied", "/x/torchinductor_me/a"), "torch.compile does not work here"),
    ],
)
@pytest.mark.parametrize("local_rank", [0, 1])
def test_how_a_script_ends(error, ends_with, local_rank, monkeypatch):
    """One process of a machine says why, and none that is not to blame hides where it broke."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        runtime.run_script(main)
    assert str(end.value.code).startswith(str(ends_with) if local_rank == 0 else "1")
    if isinstance(error, ValueError):
        with pytest.raises(ValueError):
            runtime.run_script(main, expected=(KeyError,))
    runtime.run_script(lambda: None)


def test_print0_and_on_rank_0_without_torchrun(capsys):
    runtime.print0("one", 2)
    assert capsys.readouterr().out == "one 2\n"
    assert runtime.on_rank_0(None, max, 3, 4) == 4 == runtime.from_rank_0(None, 4)
    with pytest.raises(runtime.RunError, match="full"):
        runtime.on_all_ranks(None, refuse)


def refuse():
    raise runtime.RunError("the disk is full")


def test_help_names_what_the_scripts_share():
    for script in ("train.py", "sample.py"):
        assert "--device='auto'" in run(script, "--help")


@pytest.mark.quick
@pytest.mark.parametrize(
    "gpus, processes, backend", [(8, 8, "nccl"), (1, 1, "nccl"), (1, 2, "gloo")]
)
def test_processes_that_share_a_gpu_meet_by_gloo(gpus, processes, backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert runtime.pick_backend(torch.device("cuda", 0)) == backend
    assert runtime.pick_backend(torch.device("cpu")) == "gloo"


@pytest.mark.quick
def test_a_machine_is_described():
    found = runtime.describe_machine(torch.device("cpu"))
    assert found["processor"] and found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads() and "gpu" not in found


@pytest.mark.quick
@pytest.mark.parametrize("group", [None, "the group of all ranks"])
def test_a_second_ctrl_c_leaves_at_once_but_under_torchrun(group):
    with handlers_kept():
        stop = runtime.StopSignal(group)
        signal.raise_signal(signal.SIGINT)
        assert stop.received
        with contextlib.nullcontext() if group else pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "words", [["study.py", "config/studies/constraint.py", "--list"], ["train.py", "--help"]]
)
def test_a_reader_who_has_seen_enough_is_no_error(words):
    """As `| head -1`: the rest of the output finds a pipe that nobody reads."""
    command = [sys.executable, "-u", *words]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as script:
        script.stdout.readline()
        script.stdout.close()
        said = script.stderr.read()
        assert said == b"", said.decode()
        assert script.wait() in (0, 141)
