"""dev/gpu_*.py, rehearsed on a CPU with models too small to learn anything from."""

import importlib.util
import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run

from configurator import resolve
from mixers import MIXERS, OPTIONS
from model import GPT

TINY = "--n_layer=1 --n_embd=16 --n_head=2 --block_size=16 --device=cpu".split()


@pytest.fixture
def script(monkeypatch, tmp_path):
    """A script of dev/ as a module, with knobs and a folder of its own."""

    def load(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *TINY, f"--folder={tmp_path}/out", *arguments])
        spec = importlib.util.spec_from_file_location(name, ROOT / "dev" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    torch.use_deterministic_algorithms(False)


# ---- right ---------------------------------------------------------------------------------------


def test_right_on_a_cpu(tmp_path):
    """All of it, once: killed and resumed, two processes on one device, compiled gradients."""
    knobs = "--mixers=residual --dtypes=float32 --batch_size=2 --max_iters=4"
    arguments = [*TINY, *knobs.split(), "--compile_runs=False", f"--folder={tmp_path}/out"]
    output = run("-m", "dev.gpu_right", *arguments, timeout=900)
    lines = (tmp_path / "out" / "right.jsonl").read_text().splitlines()
    about, resumed, shared, gradients = map(json.loads, lines)
    assert about["provenance"]["torch"] == torch.__version__ and about["machine"]["processor"]
    assert resumed["check"] == "killed and resumed, to the bit" and resumed["ok"]
    assert shared["check"] == "two processes on one device" and shared["ok"]
    assert 0 < shared["compiled"] < 1e-3  # not the same bits: two processes did share the sums
    assert gradients["case"] == ["residual", True, 1, "float32"]
    assert gradients["ok"] and gradients["to_eager"] > 0
    assert "3 right, 0 wrong, 0 left" in output


def wrong_in_one_gradient(model):
    """In place of GPT.compile_regions: code that gets one gradient wrong by a percent."""
    parameter = model.get_parameter("blocks.0.hc_mlp.bias")
    parameter.register_hook(lambda grad: 1.01 * grad)


def not_finite(model):
    model.head.ln_f.weight.register_hook(lambda grad: grad * torch.nan)


@pytest.mark.quick
@pytest.mark.parametrize(
    "compiler, right",
    [(lambda model: None, True), (wrong_in_one_gradient, False), (not_finite, False)],
)
def test_a_gradient_that_is_wrong_is_found(compiler, right, script, monkeypatch):
    module = script("gpu_right", "--batch_size=2")
    monkeypatch.setattr(GPT, "compile_regions", compiler)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    result = module.check_case(("tbp", True, 2, "float32"))
    assert result["ok"] == right and 0 < result["eager"] < 1e-4
    if compiler is wrong_in_one_gradient:
        assert result["worst"] == "blocks.0.hc_mlp.bias"
        assert result["compiled"] == pytest.approx(0.01, rel=0.01)


@pytest.mark.quick
def test_every_mixer_is_checked_where_it_is_defined(script):
    cases = script("gpu_right").all_cases()
    assert len(set(cases)) == len(cases)
    for name, mixer in MIXERS.items():
        numbers = {1} if mixer.one_stream else {2, 4, 8} - ({8} if name == "permutation" else set())
        kinds = {True} if mixer.one_stream else {True, False}
        assert {case[1:3] for case in cases if case[0] == name} == {
            (dynamic, n) for dynamic in kinds for n in numbers
        }
        assert {case[3] for case in cases if case[0] == name} == {"float32", "bfloat16"}


@pytest.mark.quick
def test_bits_are_compared_all_the_way_down(script):
    same_bits = script("gpu_right").same_bits
    state = {"a": [torch.ones(2), {"b": 1.5}]}
    assert same_bits(state, {"a": [torch.ones(2), {"b": 1.5}]})
    assert not same_bits(state, {"a": [torch.tensor([1.0, 1 + 2**-23]), {"b": 1.5}]})
    assert not same_bits(state, {"a": [torch.ones(2), {"b": 1.25}]})
    assert not same_bits(state, {"a": [torch.ones(2)]})


@pytest.mark.quick
def test_two_processes_see_the_same_gpu(script):
    one = script("gpu_right").with_one_gpu
    assert one({"A": "b"}, 1) == {"A": "b", "CUDA_VISIBLE_DEVICES": "1"}
    assert one({"CUDA_VISIBLE_DEVICES": "3,4"}, 0) == {"CUDA_VISIBLE_DEVICES": "3"}
    assert one({"CUDA_VISIBLE_DEVICES": "3,4"}, 1) == {"CUDA_VISIBLE_DEVICES": "4"}


@pytest.mark.quick
def test_a_run_sees_one_gpu(script, monkeypatch, tmp_path):
    module, seen = script("gpu_right"), []

    def note(command, env, **others):
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.setattr(module.subprocess, "run", note)
    module.train(tmp_path, processes=2)
    assert seen == ["3"]


@pytest.mark.quick
def test_results_of_another_commit_are_not_continued(script, monkeypatch, tmp_path):
    module, path = script("gpu_right"), tmp_path / "out" / "right.jsonl"
    assert module.open_results(path) == []
    module.add(path, [], {"check": "x", "ok": True})
    assert module.open_results(path) == [{"check": "x", "ok": True}]
    monkeypatch.setattr(module.runtime, "provenance", lambda: {"commit": "abc", "clean": True})
    with pytest.raises(ValueError, match="'commit': 'abc'.*change --folder"):
        module.open_results(path)


# ---- speed ---------------------------------------------------------------------------------------


def report_of(commit, config, *mixers):
    """Of bench.py; the first mixer has kernels, and the others have one of their own."""
    rows = [{"mixer": name, "n_streams": 4, "tok_s": 1000.0} for name in ("residual", *mixers)]
    kernels = [
        {"kernel": "triton_a", "bytes": 2 * 10**6, "largest": 9, "launches": 4, "ms": 0.004},
        {"kernel": "triton_b", "bytes": 10**6, "largest": 9, "launches": 1, "ms": 0.01},
    ]
    for row in rows[1:]:
        row |= {"kernels": kernels[:1], "peak_memory_bytes": 3 * 10**9}
    rows[1]["kernels"] = kernels
    about = {"provenance": {"commit": commit}, "machine": {"gpu": "G"}, "config": config}
    return about | {"rows": rows}


def test_speed_runs_what_is_left_and_tells_what_is_not_done(script, monkeypatch, capsys):
    module = script("gpu_speed", "--groups=tbp,identity hc,rows", "--seconds=50")
    commit, commands = module.runtime.provenance()["commit"], []

    def first_group_only(command, deadline):
        commands.append(command)
        if len(commands) == 1:
            report = report_of(commit, module.config, "tbp", "identity")
            module.result_path("tbp,identity").write_text(json.dumps(report))

    monkeypatch.setattr(module, "run_until", first_group_only)
    module.main()
    output = capsys.readouterr().out
    assert "not measured yet: hc,rows; run the same command again" in output
    lines = output.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("triton_"))
    assert lines[first].split() == ["triton_b", "1", "1.000", "10.000", "100.000"]
    assert lines[first + 1].split() == ["triton_a", "4", "2.000", "1.000", "2,000"]

    for command, first_one in zip(commands, (True, False)):
        knobs = resolve(ROOT / "bench.py", command[2:], extra=OPTIONS)  # bench.py takes them
        assert knobs["both_deterministic"] is first_one and knobs["n_embd"] == 16
    module.main()
    assert len(commands) == 3 and "--mixers=hc,rows" in commands[2]  # tbp is there already

    path = module.result_path("tbp,identity")
    path.write_text(json.dumps(report_of("abc", module.config, "tbp", "identity")))
    with pytest.raises(ValueError, match="was measured at commit abc.*change --folder"):
        module.main()
    other = module.config | {"batch_size": 99}
    path.write_text(json.dumps(report_of(commit, other, "tbp", "identity")))
    with pytest.raises(ValueError, match="with batch_size = 99, and now .*change --folder"):
        module.main()


def test_a_group_that_fails_does_not_keep_others_from_being_measured(script, monkeypatch, capsys):
    module = script("gpu_speed", "--groups=hc tbp,identity", "--seconds=50")
    commit = module.runtime.provenance()["commit"]

    def second_group_only(command, deadline):
        if "--mixers=hc" in command:
            raise module.runtime.RunError("hc failed")
        report = report_of(commit, module.config, "tbp", "identity")
        module.result_path("tbp,identity").write_text(json.dumps(report))

    monkeypatch.setattr(module, "run_until", second_group_only)
    with pytest.raises(RuntimeError, match="hc failed"):
        module.main()
    assert "identity" in capsys.readouterr().out


@pytest.mark.quick
def test_nothing_outlives_the_deadline(script, tmp_path):
    run_until = script("gpu_speed").run_until
    run_until([sys.executable, "-c", ""], time.time() + 60)
    with pytest.raises(RuntimeError, match="status 3; .*raise SystemExit"):
        run_until([sys.executable, "-c", "raise SystemExit(3)"], time.time() + 60)
    grandchild = "sleep 1000 & echo $! > pid; wait"
    began = time.time()
    run_until(["sh", "-c", f"cd {tmp_path}; {grandchild}"], time.time() + 1)
    assert time.time() - began < 30
    pid = (tmp_path / "pid").read_text().strip()
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout
    assert not state.strip() or state.startswith("Z")  # gone, or dead and not yet collected


# ---- generation ----------------------------------------------------------------------------------


def test_generation_is_timed_in_turn(script, tmp_path, capsys):
    knobs = "--mixers=residual,tbp --batches=1,2 --prompt_tokens=4 --new_tokens=8 --rounds=2"
    knobs += " --compile=False"
    script("gpu_generate", *knobs.split(), "--vocab_size=64").main()
    report = json.loads((tmp_path / "out" / "generate.json").read_text())
    rows = {(row["mixer"], row["sequences"]): row for row in report["rows"]}
    assert list(rows) == [("residual", 1), ("tbp", 1), ("residual", 2), ("tbp", 2)]
    for row in rows.values():
        assert 0 < row["slowest"] <= row["tok_s"] <= row["fastest"]
    assert rows["residual", 2]["ratio"] == 1 and rows["tbp", 2]["n_streams"] == 4
    assert report["machine"]["processor"] in capsys.readouterr().out
