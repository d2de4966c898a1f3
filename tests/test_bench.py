"""bench.py and what it is made of (dev/costs.py, dev/table.py, dev/plain_gpt2.py), on models too
small to learn anything from."""

import importlib.util
import json
import runpy
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run

from dev import costs, growth
from dev.plain_gpt2 import PlainGPT2
from dev.table import print_table
from mixers import MIXERS, n_logits
from model import GPT, GPTConfig
from runtime import RunError

SMALL = (
    "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --vocab_size=64 "
    "--device=cpu --rounds=2 --steps=1 --warmup=1"
).split()


@pytest.fixture
def bench(tmp_path):
    """Runs bench.py; its output, its file, and the file's rows by mixer and number of streams."""

    def call(*arguments):
        arguments = [*arguments, *SMALL, f"--out={tmp_path}/bench.json"]
        output = run("bench.py", *arguments, timeout=900)
        report = json.loads((tmp_path / "bench.json").read_text())
        return output, report, {(row["mixer"], row["n_streams"]): row for row in report["rows"]}

    return call


@pytest.fixture
def script(monkeypatch):
    """bench.py as a module, with knobs."""

    def load(*arguments):
        monkeypatch.setattr("sys.argv", ["bench.py", *arguments])
        spec = importlib.util.spec_from_file_location("bench", ROOT / "bench.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    torch.use_deterministic_algorithms(False)


def check_times(row):
    assert row["tok_s"] == pytest.approx(2 * 16 / row["step_ms"] * 1e3)
    assert 0 < row["step_ms_min"] <= row["step_ms"] <= row["step_ms_max"]
    assert 0 < row["ratio_min"] <= row["ratio_to_residual"] <= row["ratio_max"]
    assert 0 < row["plain_min"] <= row["ratio_to_plain"] <= row["plain_max"]
    assert row["share_of_bound"] == pytest.approx(row["ratio_to_residual"] / row["flops_bound"])


# ---- as a user runs it ---------------------------------------------------------------------------


@pytest.mark.long  # with a compiler cache of its own, a minute
def test_compiled(bench, monkeypatch):
    """On the two models that every run measures: compiling is what takes long here."""
    # Else each empty cache is probed for the processor's instructions, for 14 s.
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
    output, report, rows = bench("--mixers=residual")
    assert list(rows) == [("residual", 1), ("plain", 1)]
    for row in rows.values():
        check_times(row)
        assert row["kernels_forward"] > 0 and row["kernels_backward"] > 0
        assert row["graph_breaks"] == row["recompiles"] == 0 and row["mfu"] is None
        assert row["compile_s"] > row["compile_warm_s"] > 0 and row["compile_cpu_s"] > 0
        assert f"{row['peak_memory_bytes']:,}" in output
    residual, plain = rows.values()
    assert residual["ratio_min"] == residual["ratio_max"] == residual["ratio_fastest"] == 1
    assert plain["plain_min"] == plain["plain_max"] == residual["peak_memory_ratio"] == 1
    assert plain["params"] == residual["params"]
    assert plain["peak_memory_bytes"] == pytest.approx(residual["peak_memory_bytes"], rel=1e-3)
    assert report["provenance"].keys() == {"commit", "clean", "torch", "command"}
    assert report["machine"]["processor"] and report["machine"]["threads"] == 1
    assert report["config"]["n_embd"] == 16


def test_rows_for_each_number_of_streams_on_a_config_file_of_training(bench):
    """What is not defined for so many streams is left out aloud."""
    arguments = ["--compile=False", "--mixers=tbp,permutation", "--sweep_streams=2,8"]
    arguments.append("--clock=processor")
    output, _, rows = bench("config/tbp.py", "config/laptop.py", *arguments)
    assert list(rows) == [
        *(("residual", 1), ("plain", 1), ("tbp", 2), ("permutation", 2), ("tbp", 8))
    ]
    assert "permutation is left out: a mixture of permutations of 8 streams needs 8! logits" in (
        output
    )
    for row in rows.values():
        check_times(row)
        # At the least weights, gradients and two moments of float32
        assert 16 * row["params"] < row["peak_memory_bytes"] and "compile_s" not in row
    for field in ("params", "peak_memory_ratio"):
        growth = [rows[mixer][field] for mixer in (("residual", 1), ("tbp", 2), ("tbp", 8))]
        assert growth == sorted(growth) and growth[0] < growth[1] < growth[2]
    assert rows["plain", 1]["params"] == rows["residual", 1]["params"]
    # phi, alpha and bias: 2n + (n-1)^2 logits of n * 16 numbers in 3 parts
    expected = {1: 0, 2: 5 * 2 * 16 + 5 + 3, 8: 65 * 8 * 16 + 65 + 3}
    for (_, n), row in rows.items():
        assert n == 2 and row["mixer"] == "permutation" or row["connection_params"] == expected[n]


def test_a_new_mixer_needs_no_edit(bench, tmp_path):
    twin = tmp_path / "twin.py"
    twin.write_text("import mixers as _mixers\n_mixers.MIXERS['twin'] = _mixers.MIXERS['tbp']\n")
    knobs = ["--stream_start=learned", "--readout=learned", "--mix_scale=stream", "--gates=free"]
    _, _, rows = bench(
        twin, "--compile=False", "--fresh=False", "--n_mlp=24", "--n_streams=3", *knobs
    )
    assert {mixer for mixer, _ in rows} == {"plain", "twin", *MIXERS}
    assert rows["twin", 3]["params"] == rows["tbp", 3]["params"]
    assert "peak_memory_bytes" not in rows["twin", 3]


def test_rows_for_budgets_and_both_kinds_of_algorithms(bench):
    arguments = ["--budgets=1.0,0.5", "--both_deterministic=True"]
    _, report, _ = bench("--mixers=residual,hc", "--compile=False", "--fresh=False", *arguments)
    rows = {
        (row["mixer"], row["activation_memory_budget"], row["deterministic"]): row
        for row in report["rows"]
    }
    yardsticks = {(name, 1.0, flag) for name in ("plain", "residual") for flag in (True, False)}
    assert rows.keys() == yardsticks | {("hc", b, f) for b in (1.0, 0.5) for f in (True, False)}
    for row in rows.values():
        check_times(row)


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--mixers=tbp,tpb", "there is no mixer 'tpb'; there are residual, identity"),
        ("--mixers=permutation --n_streams=8", "none of 'permutation' is defined for 8 streams"),
        ("--mixers=tbp --sinkhorn_rounds=5", "no mixer of 'tbp' takes sinkhorn_rounds"),
        ("--sinkhorn_rounds=0", "sinkhorn_rounds must be a whole number of at least 1, not 0"),
        ("--budgets=1,half", "such as 1.0,0.5,0.0, not '1,half'"),
        ("--sweep_streams=2,2.5", "sweep_streams must be numbers with commas between"),
        ("--activation_memory_budget=2", "lies between 0 and 1; these are [2.0]"),
        ("--clock=sun", "clock must be wall, or processor (with --device=cpu), not 'sun'"),
        ("--steps=0", "steps must be at least 1, not 0"),
        ("--batch_size=0", "batch_size must be at least 1, not 0"),
        ("--rounds=-1", "rounds must be at least 0, not -1"),
        ("--rounds=0 --fresh=False", "nothing to measure"),
        ("--out=nowhere/bench.json", "there is no folder nowhere to write to"),
        ("--n_head=5", "n_embd 384 is not divisible by n_head 5"),
        ("--gates=ajar", "gates must be one of auto, bounded"),
        ("--device=tpu", "device must be auto, cpu, cuda, cuda:N or mps, not 'tpu'"),
        ("--dtype=half", "dtype must be auto, float32, bfloat16 or float16, not 'half'"),
        ("--max_iters=3", "bench.py has no such knob"),
    ],
)
def test_refuses(argument, said, monkeypatch, capsys):
    """In this process: importing torch a dozen times would take longer than all the rest."""
    monkeypatch.setattr("sys.argv", ["bench.py", *argument.split()])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "bench.py"), run_name="__main__")
    assert said in f"{error.value} {capsys.readouterr().err}"


# ---- a step, the yardstick, the bound ------------------------------------------------------------


def test_a_step_clips_and_skips_as_training_does(script):
    module = script("--compile=False", *SMALL)
    trainer = module.Trainer(module.Case("tbp", 4, 1.0, True))
    norms = []

    def take_norm(*_):
        grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.cat(grads).norm().item())

    trainer.optimizer.register_step_pre_hook(take_norm)
    with torch.no_grad():
        trainer.model.embed.wte.weight.mul_(100)  # the loss is hundreds, and its gradient as large
    trainer.step()
    assert norms == [pytest.approx(1, rel=1e-3)]

    with torch.no_grad():
        trainer.model.head.ln_f.weight[0] = torch.nan
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step()
    for old, new in zip(before, trainer.model.parameters()):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.quick
@pytest.mark.parametrize("bias", [False, True])
def test_the_yardstick_is_the_residual_model(bias):
    sizes = dict(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16, n_mlp=24, bias=bias)
    config = GPTConfig(**sizes, mixer="residual", n_streams=1)
    ours, plain = GPT(config), PlainGPT2(config)
    theirs = {name.replace("c_out", "mlp.c_proj"): p for name, p in plain.named_parameters()}
    theirs = {name.replace("c_fc", "mlp.c_fc"): p for name, p in theirs.items()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            key = name.removeprefix("embed.").replace(".attn.", ".")
            theirs.pop(key).copy_(parameter)
    assert not theirs
    batch = torch.randint(32, (2, 3, 8))
    for mine, its in zip(ours(*batch), plain(*batch)):
        torch.testing.assert_close(mine, its)


def test_the_bound_is_that_of_the_operations(script):
    """A layer costs 72 C^2 + 12 C T a token; a sublayer's streams 6 for each number of phi, which
    has (K + 2n) n C, and 6 C for each of the 2n reads and writes and the n^2 products of the mix.
    """
    C, T, V, L = 384, 256, 64, 3
    module = script(f"--n_layer={L}", f"--n_embd={C}", f"--block_size={T}", f"--vocab_size={V}")
    layer = 72 * C * C + 12 * C * T
    for mixer, n in (("tbp", 4), ("tbp", 16), ("sinkhorn", 8)):
        K = n_logits(mixer, n)
        streams = 6 * (K + 2 * n) * n * C + 6 * C * (2 * n + n * n)
        wanted = (L * layer + 6 * V * C) / (L * (layer + 2 * streams) + 6 * V * C)
        found = module.facts(module.Case(mixer, n, 1.0, True))["flops_bound"]
        assert found == pytest.approx(wanted, rel=1e-3)


# ---- memory, kernels, bytes per second -----------------------------------------------------------


def test_peak_memory_is_what_is_kept_and_the_most_at_once():
    kept = torch.zeros(1000)

    def step():
        first = torch.zeros(1 << 18)  # 1 MiB
        del first
        second, third = torch.zeros(1 << 18), torch.zeros(1 << 19)  # 3 MiB
        del second, third

    assert costs.peak_memory(step, [kept], torch.device("cpu")) == 4000 + 3 * 2**20


@pytest.mark.quick
def test_kernels_are_counted_where_they_are_called():
    program = """
cpp_fused_add_0 = async_compile.cpp_pybinding(['float*'], r'''
extern "C" void cpp_fused_add_0(float* out)
''')
def call(args):
    cpp_fused_add_0(buf0)
    extern_kernels.mm(buf0, arg1, out=buf1)
    triton_poi_fused_mul_1.run(buf1, 64, stream=stream0)
"""
    assert costs.count_kernels(program) == 2


@pytest.mark.quick
def test_bytes_of_a_launch():
    names = ["in_ptr0", "in_out_ptr0", "out_ptr1", "xnumel", "XBLOCK"]
    small = torch.zeros(1).expand(1000)  # 4 bytes, however many numbers
    half = torch.zeros(10, dtype=torch.bfloat16)
    launch = costs.describe("triton_poi_0", names, (small, half, torch.zeros(3, 5), 15))
    assert launch == costs.Launch("triton_poi_0", 4 + 2 * 20 + 60, 15)


@pytest.mark.quick
def test_bandwidth_of_the_streams_is_bytes_over_seconds_of_the_same_launches(capsys):
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name, start, nanoseconds, device=cuda):
        return SimpleNamespace(
            name=lambda: name,
            start_ns=lambda: start,
            duration_ns=lambda: nanoseconds,
            device_type=lambda: device,
        )

    events = [  # as a profiler gives them: in no order, with others between
        event("triton_b", 30, 4000),
        event("triton_a", 10, 1000),
        event("cudaLaunchKernel", 5, 99, cpu),
        event("gemm", 20, 99),
        event("triton_a", 40, 3000),
        event("triton_small", 50, 5000),
    ]
    timed = costs.generated_kernels(events)
    assert timed[:2] == [("triton_a", 1e-6), ("triton_b", 4e-6)]

    launches = [
        costs.Launch("triton_a", 2000, 64),
        costs.Launch("triton_b", 12000, 128),
        costs.Launch("triton_a", 2000, 64),
        costs.Launch("triton_small", 10, 4),
    ]
    found = costs.stream_traffic(launches, timed, size=64)
    assert found["stream_bytes"] == 16000 and found["stream_ms"] == pytest.approx(8e-3)
    assert found["stream_gb_s"] == pytest.approx(16000 / 8e-6 / 1e9)
    first = found["kernels"][0]
    assert first["kernel"] == "triton_a" and first["launches"] == 2
    assert first["ms"] == pytest.approx(4e-3)

    # Other kernels than those that were launched: no bytes belong to these seconds.
    missed = costs.stream_traffic(launches[1:], timed, size=64)
    assert set(missed.values()) == {None}
    assert (
        "GB/s are left out: 3 generated kernels were launched, and the" in capsys.readouterr().out
    )


@pytest.mark.quick
def test_launches_are_recorded_and_run(monkeypatch):
    from torch._inductor.runtime import triton_heuristics

    class Kernel:
        fn = SimpleNamespace(__name__="triton_x", arg_names=["in_ptr0", "xnumel"])

        def run(self, tensor, count, stream):
            return tensor.sum().item() + count + stream

    monkeypatch.setattr(triton_heuristics, "CachingAutotuner", Kernel)
    launches = []
    costs.record_launches(launches)
    assert Kernel().run(torch.ones(3), 10, stream=100) == 113
    assert launches == [costs.Launch("triton_x", 12, 3)]


@pytest.mark.quick
def test_a_copy_reads_and_writes(monkeypatch):
    clock = iter([0, 9, 0, 4, 0, 2, 0, 3])  # the first try warms up, the third is the fastest
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    found = costs.copy_gb_s(torch.device("cpu"), size=1000, repeats=5)
    assert found == pytest.approx(2 * 1000 * 5 / 2 / 1e9)


@pytest.mark.quick
def test_a_table_has_the_columns_that_tell_something(capsys):
    rows = [{"a": "x", "b": 1200, "c": True}, {"a": "long", "b": 0.5, "c": True, "d": None}]
    columns = {"name": "a", "figure": "b", "flag": "c", "nothing": "d"}
    print_table(rows, columns, only_if_several=("flag",))
    assert capsys.readouterr().out == "name  figure\nx      1,200\nlong   0.500\n"


@pytest.mark.quick
def test_growth_is_a_table_and_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    found = {"connection_params": 7, "ratio_to_residual": 0.5, "peak_memory_ratio": 2.0}
    found |= {"flops_bound": 0.8, "share_of_bound": 0.625}
    rows = [{"mixer": "tbp", "n_streams": n, **found} for n in (4, 2)]
    rows.append({"mixer": "residual", "n_streams": 1, **found})
    report = {"config": {"sees": "input", "compile": False}, "rows": rows}
    (tmp_path / "report.json").write_text(json.dumps(report))
    growth.write_tables(tmp_path, growth.read_rows(tmp_path))
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[1:] == [f"tbp,input,False,{n},7,0.5,2.0,,0.8,0.625" for n in (2, 4)]
    figure = growth.growth_figure(growth.read_rows(tmp_path))
    # Compiling was not measured, so it has no panel. A line for what was, and one for the bound.
    assert [len(axes.lines) for axes in figure.axes] == [1, 2, 1]
    assert figure.axes[1].lines[1].get_ydata().tolist() == [0.8, 0.8]

    (tmp_path / "report.json").unlink()
    with pytest.raises(RunError, match="has no report of bench.py with several streams"):
        growth.read_rows(tmp_path)
