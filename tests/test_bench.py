"""bench.py as a subprocess, as a user runs it, on models too small to learn anything from."""
import json
import runpy

import pytest

from conftest import ROOT, run
from mixers import MIXERS

SMALL = "--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --vocab_size=64 --device=cpu --rounds=2 --steps=1"
REPORTED = set("mixer n_streams tok_s ratio_to_residual ratio_min ratio_max compile_s peak_memory_ratio params kernels_forward "
               "kernels_backward graph_breaks recompiles n_layer n_head n_embd block_size batch_size dtype device torch threads "
               "compile_warm_s peak_memory_bytes mfu data_wait ratio_fastest".split())


@pytest.fixture
def bench(tmp_path):
    """Runs bench.py; its output, and the rows of its file by mixer and activation_memory_budget."""
    def call(*arguments):
        output = run("bench.py", *arguments, *SMALL.split(), f"--out={tmp_path}/bench.json")
        rows = json.loads((tmp_path / "bench.json").read_text())
        return output, {(row["mixer"], row["activation_memory_budget"]): row for row in rows}
    return call


def check_times(row):
    assert row["tok_s"] == pytest.approx(2 * 16 / row["step_ms"] * 1e3) and 0 < row["data_wait"]
    assert 0 < row["ratio_min"] <= row["ratio_to_residual"] <= row["ratio_max"]


def test_compiled(bench):
    """On the two models that every run measures: compiling is what takes long here."""
    output, rows = bench("--mixers=residual")
    assert list(rows) == [("plain", 1), ("residual", 1)]
    for row in rows.values():
        assert row.keys() >= REPORTED and row["device"] == "cpu" and row["mfu"] is None
        check_times(row)
        assert row["kernels_forward"] > 0 and row["kernels_backward"] > 0 and row["graph_breaks"] == row["recompiles"] == 0
        assert row["compile_s"] > row["compile_warm_s"] > 0
        assert row["mixer"] in output and f"{row['peak_memory_bytes']:,}" in output
    plain, residual = rows.values()
    assert residual["ratio_min"] == residual["ratio_max"] == residual["ratio_fastest"] == residual["peak_memory_ratio"] == 1
    assert plain["params"] == residual["params"] and plain["peak_memory_bytes"] == residual["peak_memory_bytes"]
    assert "the loop waits for data at most" in output


def test_eager_on_a_config_file_of_training(bench):
    output, rows = bench("config/tbp.py", "config/laptop.py", "--mode=eager", "--mixers=tbp", "--n_streams=2")
    row = rows["tbp", 1]
    check_times(row)
    assert row["kernels_forward"] is row["compile_s"] is row["recompiles"] is None and row["n_streams"] == 2
    # at the least weights, gradients and two moments of float32
    assert 1 < row["peak_memory_ratio"] and 16 * row["params"] < row["peak_memory_bytes"]
    assert row["params"] > rows["residual", 1]["params"] == rows["plain", 1]["params"]


def test_a_new_mixer_needs_no_edit(bench, tmp_path):
    """And what is not defined for so many streams is left out aloud."""
    (tmp_path / "twin.py").write_text("import mixers as _mixers\n_mixers.MIXERS['twin'] = _mixers.MIXERS['tbp']\n")
    output, rows = bench(tmp_path / "twin.py", "--mode=eager", "--fresh=False", "--n_streams=8")
    assert {mixer for mixer, _ in rows} == {"plain", "twin", *MIXERS} - {"permutation"}
    assert "permutation is left out: a mixture of permutations of 8 streams needs 8! logits" in output
    assert rows["twin", 1]["params"] == rows["tbp", 1]["params"] and rows["twin", 1]["peak_memory_ratio"] is None


def test_a_row_for_each_budget(bench):
    output, rows = bench("--budgets=1.0,0.5", "--mixers=residual,hc", "--mode=eager", "--fresh=False")
    assert list(rows) == [("plain", 1), ("residual", 1), ("hc", 1), ("residual", .5), ("hc", .5)]
    for row in rows.values():
        check_times(row)


@pytest.mark.parametrize("argument, said", [
    ("--mixers=tbp,tpb", "there is no mixer 'tpb'; there are residual, identity"),
    ("--mixers=permutation --n_streams=8", "none of them is defined for n_streams = 8"),
    ("--mode=fast", "mode must be compiled or eager, not 'fast'"),
    ("--budgets=1,half", "budgets must be numbers with commas between, such as 1.0,0.5,0.0, not '1,half'"),
    ("--activation_memory_budget=2", "lies between 0 and 1; these are [2.0]"),
    ("--steps=0", "steps, warmup and batch_size must be at least 1, not 0, 3 and 4"),
    ("--batch_size=0", "steps, warmup and batch_size must be at least 1, not 2, 3 and 0"),
    ("--rounds=-1", "rounds must be at least 0, not -1"),
    ("--rounds=0 --fresh=False", "nothing to measure"),
    ("--n_head=5", "n_embd 384 is not divisible by n_head 5"),
    ("--device=tpu", "device = 'tpu': there are auto, cpu and"),
    ("--dtype=half", "dtype must be auto, float32 or bfloat16, not 'half'"),
    ("--max_iters=3", "bench.py has no such knob"),
])
def test_refuses(argument, said, monkeypatch, capsys):
    """In this process: importing torch a dozen times would take longer than all the rest."""
    monkeypatch.setattr("sys.argv", ["bench.py", *argument.split()])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "bench.py"), run_name="__main__")
    assert said in f"{error.value} {capsys.readouterr().err}"
