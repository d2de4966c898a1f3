"""study.py, with runs of four steps that really go through train.py."""

import csv
import functools
import json
import os
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, handlers_kept, records, run
from forks import Script

import comparison
import grid
import study
from mixers import MIXERS
from runtime import RunError

STUDIES = sorted((ROOT / "config" / "studies").glob("*.py"))

SOURCE = """
question = "Does it run?"
decision = "It does if there is a table."
files = []
knobs = {knobs}
arms = {{"residual": {{"mixer": "residual", "n_streams": 1}}, "identity": {{"mixer": "identity"}}}}
seeds = 2
"""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """study.py with arguments, in a folder of its own; its output. `ok=False`: it must fail."""
    monkeypatch.chdir(tmp_path)

    def call_study(*arguments, ok=True):
        monkeypatch.setattr("sys.argv", ["study.py", *map(str, arguments)])
        error = ""
        try:
            study.main()
        except (RunError, SystemExit) as raised:
            error = str(raised) if isinstance(raised, RunError) else "exit"
        assert bool(error) != ok, error
        captured = capsys.readouterr()
        return captured.out + captured.err + error

    with handlers_kept():
        yield call_study


def write_study(folder, data, more=""):
    """A study of 2 arms and 2 seeds, 4 steps each; `more` is put behind it."""
    words = [*TINY, "--max_iters=4", "--compile=False", f"--data_dir={data}"]
    knobs = dict(word.removeprefix("--").split("=") for word in words)
    (folder / "tiny.py").write_text(SOURCE.format(knobs=knobs) + more)
    return folder / "tiny.py"


@pytest.fixture
def tiny_study(tiny_data, tmp_path):
    """write_study in this test's folder, with only `more` to give."""
    return functools.partial(write_study, tmp_path, tiny_data)


class ForkedRun(Script):
    """In place of subprocess.Popen for a run, which then need not import torch."""

    def __init__(self, words, env, stdout, **_):
        patch = f"os.chdir({os.getcwd()!r})\n"
        patch += f"log = os.open({stdout.name!r}, os.O_WRONLY | os.O_APPEND)\n"
        patch += "os.dup2(log, 1), os.dup2(log, 2)"
        super().__init__(words[1:], patch, env)

    def poll(self):
        if super().poll() is not None:
            self.finish()
        return self.returncode


@pytest.fixture
def forked_runs(monkeypatch):
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(Popen=ForkedRun))


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """The folder of a study that has run."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_study(folder, tiny_data)
    places = f"--results={folder}/results", f"--out={folder}/out/studies"
    with pytest.MonkeyPatch.context() as patch, handlers_kept():
        patch.setattr(study, "subprocess", SimpleNamespace(Popen=ForkedRun))
        patch.setattr("sys.argv", ["study.py", str(path), "--jobs=2", *places])
        study.main()
    output = run("study.py", path, "--table", *places)
    assert "4 of 4 runs are here" in output and "| identity | 2 |" in output
    assert "tiny.py` runs all of them again where results/ is empty." in output
    return folder


def rows(folder):
    """table.csv of the tiny study, without what depends on the clock."""
    clock = ("ms_per_step", "equal_time", "speed_up")
    with open(folder / "results/tiny/table.csv") as file:
        return [
            {key: value for key, value in row.items() if not key.startswith(clock)}
            for row in csv.DictReader(file)
        ]


# ---- real runs ----------------------------------------------------------------------------------


STOP_AT_STEP_2 = """
step = torch.optim.AdamW.step
def stop(*arguments):
    next(calls) == 2 and os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments)
torch.optim.AdamW.step = stop
"""


@pytest.mark.usefixtures("forked_runs")
def test_a_study_that_was_cut_off_ends_with_the_same_table(call, finished, tmp_path):
    """Two runs are there, one was stopped after two of its four steps, one has not begun."""
    path, name = finished / "tiny.py", "out/studies/tiny"
    assert {row["minus_residual_pairs"] for row in rows(finished)} == {"", "2"}
    for cell in ("residual/seed1", "identity/seed1"):
        (tmp_path / "results/tiny" / cell).parent.mkdir(parents=True)
        shutil.copy(finished / f"results/tiny/{cell}.json", tmp_path / f"results/tiny/{cell}.json")
    first, second = call(path, "--dry_run").splitlines()
    assert "residual" in first and "identity" in second
    words = shlex.split(second)
    words[-1] = f"--out_dir={tmp_path}/{name}/identity/seed2"
    run(*words[words.index("train.py") :], patch=STOP_AT_STEP_2)
    assert "identity/seed2: at step 2" in call(path, "--list")

    output = call(path, "--jobs=2")
    assert "2 of 4 runs are finished, 2 to do" in output
    assert "identity/seed2: from step 2" in output and "/seed1: from" not in output
    assert rows(tmp_path) == rows(finished)
    for cell in ("residual/seed2", "identity/seed2"):
        assert records(tmp_path / name / cell) == records(finished / name / cell)
    assert "0 to do" in call(path)


@pytest.mark.usefixtures("forked_runs")
def test_one_cell_again_gives_the_same_loss_or_says_where_it_differs(
    call, finished, tmp_path, monkeypatch
):
    path, kept = finished / "tiny.py", tmp_path / "results/tiny/identity/seed1.json"
    shutil.copytree(finished / "results", tmp_path / "results")
    assert not (tmp_path / "out").exists()
    assert "the same loss at all 2 evaluations" in call(path, "--cell=identity/seed1")
    usual = kept.read_text()

    def run_as_before(_, todo, options):
        assert todo[0].folder == Path("out/studies/tiny/identity/seed1-again2")
        todo[0].result.parent.mkdir(exist_ok=True)
        shutil.copy(finished / "results/tiny/identity/seed1.json", todo[0].result)

    monkeypatch.setattr(study, "run_grid", run_as_before)
    for clean, place in ((True, -1), (False, 0)):  # the last evaluation, and the first
        result = json.loads(usual)
        step, val = (result["evaluations"][place][key] for key in ("step", "val"))
        result["evaluations"][place]["val"] = val + 1e-7
        result["provenance"]["clean"] = clean
        kept.write_text(json.dumps(result))
        output = call(path, "--cell=identity/seed1", ok=False)
        assert "not the same losses. Then, by step: [(0, " in output
        assert f"({step}, {val + 1e-7})" in output and f"({step}, {val})" in output
        assert ("made with changes that its commit does not have" in output) != clean
        shutil.rmtree("out/studies/tiny/identity/seed1-again2")
    # a run that is done again is no run of the study
    assert json.loads(kept.read_text()) == result
    assert rows(tmp_path) == rows(finished)


@pytest.mark.usefixtures("forked_runs")
def test_divergence_is_a_result_and_a_failure_is_not(call, tiny_study, tmp_path):
    """A rate of 1e38 makes the second step's loss infinite. A run alone refuses eval_tokens=1."""
    path = tiny_study(
        'arms = {"wild": {"mixer": "residual", "n_streams": 1, "learning_rate": 1e38, '
        '"max_bad_steps": 2}, "wrong": {"eval_tokens": 1}}\nseeds = 1\n'
    )
    output = call(path, "--jobs=2", ok=False)
    assert "wild/seed1: diverged, at step" in output
    assert "wrong/seed1: failed; out/studies/tiny/wrong/seed1/log.txt ends with" in output
    assert "choose --eval_tokens of at least" in output
    assert "1 runs failed, as said above: wrong/seed1" in output
    kept = json.loads((tmp_path / "results/tiny/wild/seed1.json").read_text())
    assert kept["diverged"] and kept["final_loss"] is None and kept["best_loss"] > 0
    (row,) = rows(tmp_path)
    assert (row["arm"], row["runs"], row["diverged"], row["loss"]) == ("wild", "1", "1", "")
    output = call(path, "--list")
    assert "wild/seed1: diverged" in output and "wrong/seed1: not begun" in output


def test_a_kill_lets_the_run_write_a_checkpoint(call, tiny_study, tmp_path):
    """A run in a process of its own, as a user's are."""
    path = tiny_study('knobs |= {"max_iters": 10**6, "checkpoint_interval": 10**6}\nseeds = 1\n')
    folder = tmp_path / "out/studies/tiny/residual/seed1"

    def kill_this_process_once_the_run_is_going():
        while comparison.last_step(folder) == 0:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill_this_process_once_the_run_is_going, daemon=True).start()
    output = call(path)
    step = comparison.last_step(folder)
    assert f"residual/seed1: cut off at step {step} of 1000000" in output
    assert (folder / f"ckpt_{step:07}.pt").exists() and "identity/seed1: from" not in output
    assert f"residual/seed1: at step {step}" in call(path, "--list")
    assert not list((tmp_path / "results").rglob("*.json"))


@pytest.mark.quick
def test_a_second_ctrl_c_leaves_a_run_that_does_not_end(call, tiny_study, monkeypatch):
    """The first one asks it for a checkpoint. A run has a session of its own, so that the Ctrl-C of
    a terminal does not reach it."""
    started, looks, asked = [], [], []

    class Endless:
        def __init__(self, words, env, start_new_session, **_):
            started.append((env["OMP_NUM_THREADS"], start_new_session))

        def poll(self):
            looks.append(self)
            assert len(looks) < 3, "the second Ctrl-C changed nothing"
            signal.raise_signal(signal.SIGINT)

        def terminate(self):
            asked.append(self)

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(Popen=Endless))
    with pytest.raises(KeyboardInterrupt):
        call(tiny_study(), "--threads=3")
    assert started == [("3", True)] and len(asked) == 2


@pytest.mark.quick
def test_after_a_signal_no_run_begins(call, tiny_study, monkeypatch):
    """Of four runs two have begun. The first ends sooner, and leaves its place free."""
    started = []

    class Stopped:
        returncode = -signal.SIGTERM

        def __init__(self, *_, **__):
            started.append(self)
            self.looks = 3 * len(started)  # before it ends

        def poll(self):
            signal.raise_signal(signal.SIGTERM)
            self.looks -= 1
            return None if self.looks else self.returncode

        def terminate(self):
            pass

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(Popen=Stopped))
    output = call(tiny_study(), "--jobs=2")
    assert len(started) == 2 and output.count("cut off at step 0 of 4") == 2


@pytest.mark.quick
def test_a_run_goes_on_from_its_newest_checkpoint(call, tiny_study, tmp_path, monkeypatch):
    folder = tmp_path / "out/studies/tiny/residual/seed1"
    folder.mkdir(parents=True)
    for step in (1, 3, 2):
        (folder / f"ckpt_{step:07}.pt").touch()
    ended = SimpleNamespace(poll=lambda: 0, returncode=0)
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(Popen=lambda *_, **__: ended))
    output = call(tiny_study("seeds = 1\n"))
    assert "residual/seed1: from step 3:" in output and "identity/seed1: from step 0:" in output


# ---- the grid -----------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_grid_of_config_files(call):
    """All arms with the first seed come before the second; residual stands once for all n."""
    output = call(
        "--sweep",
        "n_streams=2,4",
        ROOT / "config/laptop.py",
        "--mixers=residual,tbp",
        "--seeds=2",
        "--list",
    )
    assert [line.split(":")[0] for line in output.splitlines()] == [
        "residual/seed1",
        "tbp/n_streams=2/seed1",
        "tbp/n_streams=4/seed1",
        "residual/seed2",
        "tbp/n_streams=2/seed2",
        "tbp/n_streams=4/seed2",
    ]
    output = call(ROOT / "config/laptop.py", "--list", "--seeds=3,", "--n_layer=2")
    assert [line.split("/")[0] for line in output.splitlines()] == list(MIXERS)
    assert all("/seed3:" in line for line in output.splitlines())


@pytest.mark.quick
def test_min_lr_moves_with_a_swept_rate(call):
    """laptop.py has 2e-3 and a tenth of it."""
    arguments = (ROOT / "config/laptop.py", "--mixers=tbp", "--seeds=1", "--dry_run")
    output = call(*arguments, "--sweep", "learning_rate=7e-4,1.4e-3")
    first, second = output.splitlines()
    assert "--learning_rate=0.0007 " in first and "--min_lr=7e-05 " in first
    assert "--learning_rate=0.0014 " in second and "--min_lr=0.00014 " in second


@pytest.mark.quick
def test_an_arm_keeps_its_own_min_lr(call, tiny_study):
    more = "seeds = 1\nsweep = {'learning_rate': [1e-3]}\narms['identity']['min_lr'] = 2e-5\n"
    plain, own = call(tiny_study(more), "--dry_run").splitlines()
    assert "--min_lr=2e-05 " in own and "--min_lr=2e-05" not in plain


@pytest.mark.quick
def test_the_command_of_a_cell_has_the_threads_and_processes(call):
    arguments = (ROOT / "config/laptop.py", "--mixers=tbp", "--seeds=1", "--dry_run")
    assert call(*arguments).startswith("OMP_NUM_THREADS=1 python train.py ")
    output = call(*arguments, "--threads=2", "--processes=4", "--batch_size=4")
    assert output.startswith("OMP_NUM_THREADS=2 torchrun --standalone --nproc_per_node=4 train.py ")
    assert output.rstrip().endswith("--seed=1 --out_dir=out/studies/laptop/tbp/seed1")


@pytest.mark.quick
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_in_config_could_run(path, monkeypatch, tmp_path):
    """Also of a study that somebody adds there: it is well formed, and every arm could begin."""
    monkeypatch.chdir(ROOT)
    options = study.argparse.Namespace(out="out", results="results", processes=1, files=[path])
    one = grid.read_study(path)
    first = {knob: values[:1] for knob, values in one.sweep.items()}
    for cell in grid.cells(one._replace(seeds=one.seeds[:1], sweep=first), options):
        study.planned(cell._replace(folder=tmp_path), options)


@pytest.mark.quick
def test_the_table_names_the_command_that_makes_it(call, tiny_study, tmp_path):
    """Without what restricts a call of a study; with all that makes a grid of config files."""
    path, laptop = tiny_study(), ROOT / "config/laptop.py"
    output = call(path, "--arms=residual", "--name=two words", "--n_layer=3", "--table")
    assert f"`python study.py {path} '--name=two words' --n_layer=3`" in output
    assert "0 of 4 runs are here" in output and "--n_layer=3` runs the others, or all" in output
    assert (tmp_path / "results/two words/table.csv").exists()
    output = call(
        laptop, "--mixers=residual,tbp", "--sweep", "n_streams=2,4", "--table", "--jobs=2"
    )
    words = f"{laptop} --mixers=residual,tbp --seeds=5 --sweep n_streams=2,4"
    assert f"`python study.py {words}`" in output and "0 of 15 runs are here" in output


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "more, arguments, message",
    [
        ("", ["--arms=residual,tpb"], "there is no arm tpb; there are residual, identity"),
        ("", ["--seeds=2,3"], "there is no seed 3; there are 1, 2; for more, raise seeds in /"),
        ("", ["--sweep", "n_streams=2"], "there is no swept knob n_streams; there are none"),
        (
            "",
            ["--cell=identity/seed7"],
            "there is no cell identity/seed7; there are residual/seed1",
        ),
        ("", ["--cell=identity/seed1"], "identity/seed1 has no result yet"),
        ("", ["--n_layers=2"], "no such knob (did you mean --n_layer?)"),
        ("", ["--n_layer", "--list"], "write files first, then --knob=value in one word"),
        ("", ["--jobs=0"], "--jobs must be at least 1, not 0"),
        ("seed = 3", [], "tiny.py: seed is not known: a study has question,"),
        ("del decision", [], "tiny.py: decision is missing: a study has question,"),
        ("del arms", [], "tiny.py: arms is missing: a study has question,"),
        ("files = 'config/laptop.py'", [], "files is of the type str; write it as list"),
        ("\nseeds = 1 / 0", [], "tiny.py:9: ZeroDivisionError: division by zero"),
        ("seeds = [1, 2", [], "tiny.py:8: SyntaxError: '[' was never closed"),
        ("seeds = 0", [], "tiny.py: seeds are []; write how many, such as 5, or a list of"),
        ("seeds = '5'", [], "tiny.py: seeds is of the type str; write it as int or list"),
        ("seeds = ['1']", [], "tiny.py: seeds are ['1']; write how many"),
        ("knobs = 'n_layer=2'", [], "tiny.py: knobs is of the type str; write it as dict"),
        ("knobs = {'n_layers': 2}", [], "tiny.py: --n_layers: train.py has no such knob (did"),
        ("knobs['n_layer'] = 'two'", [], "tiny.py: n_layer = 'two' is of type str"),
        ('sweep = {"n_layer": 2}', [], "tiny.py: the sweep of n_layer is 2; write a list of"),
        ('sweep = {"n_layer": []}', [], "tiny.py: the sweep of n_layer is []; write a list of"),
        ('sweep = {"learning_rate": ["x"]}', [], "learning_rate has 'x', which is no number"),
        (
            'sweep = {"n_layer": ["x"]}',
            [],
            "tiny.py: residual/n_layer=x/seed1: n_layer = 'x' is of",
        ),
        ("arms = {}", [], "tiny.py: arms is empty; write at least one"),
        ("arms['tbp'] = 'tbp'", [], "tiny.py: arm 'tbp' is 'tbp'; write a name and its knobs"),
        ("arms['tbp'] = {'mixr': 'tbp'}", [], "tiny.py: tbp/seed1: --mixr: train.py has no such"),
        (
            "arms['tbp'] = {'mixer': 'tpb'}",
            [],
            "tiny.py: tbp/seed1: unknown mixer 'tpb'; there are",
        ),
        ("arms['tbp'] = {'n_head': 3}", ["--dry_run"], "tbp/seed1: n_embd 16 is not divisible"),
        ("arms['tbp'] = {'batch_size': 0}", [], "tbp/seed1: batch_size must be at least 1"),
        ("arms['tbp'] = {'eval_interval': 0}", [], "tbp/seed1: eval_interval must be at least 1"),
        ("", ["--learning_rate=1e-9", "--min_lr=1"], "learning_rate = 1e-09 falls to min_lr = 1.0"),
        ("", ["--max_iters=0"], "residual/seed1: max_iters must be at least 1, not 0"),
        ("arms['n=4'] = {'mixer': 'tbp'}", [], "arm 'n=4': a folder with = is a swept knob's"),
        ("", ["--eval_only=True"], "eval_only: a study gives each run its own"),
        ("arms['tbp'] = {'batch_size': 3}", [], "tbp/seed1: total_batch_tokens = 128 is no"),
        ("references = ['tbp']", [], "tiny.py: references: tbp is no arm; the arms are residual"),
        ("files = ['laptop.py']", [], "laptop.py: no such file; there are: "),
        ("", ["--seeds=few"], "--seeds=few: give how many"),
        ("", ["--sweep", "n_streams"], "write --sweep knob=value,value"),
        (
            'sweep = {"n_streams": [2, 4]}',
            ["--sweep", "n_streams=3"],
            "value of n_streams 3; there are 2",
        ),
        ('arms["rate_1/16"] = {}', [], "'rate_1/16' cannot be the name of a folder of runs"),
        ('arms[".."] = {}', ["--list"], "'..' cannot be the name of a folder"),
        ("", ["--name=../other"], "'../other' cannot be the name of a folder"),
        ("", ["--name=."], "'.' cannot be the name of a folder"),
        ('sweep = {"data_dir": ["a/b"]}', [], "'data_dir=a/b' cannot be the name of a folder"),
        ("", ["--seeds=0"], "--seeds=0: give how many"),
        ("", ["--seed=3"], "seed: a study gives each run its own; seeds are --seeds=1,2"),
        ("", ["--out_dir=out/x"], "out_dir: a study gives each run its own"),
        ("", ["--init_from=gpt2"], "init_from: a study gives each run its own"),
        ('arms["identity"]["init_from"] = "out/tbp"', [], "and all runs start from scratch"),
        (
            'Path = __import__("pathlib").Path\nPath("w.py").write_text("init_from = \'gpt2\'")\n'
            'files = ["w.py"]\ndel Path',
            [],
            "init_from = 'gpt2': runs of a study start from scratch",
        ),
        ('arms["identity"]["seed"] = 3', [], "seed: a study gives each run its own"),
        ('sweep = {"seed": [3]}', [], "seed: a study gives each run its own"),
        (
            'sweep = {"n_embd": [16]}',
            ["--n_embd=32"],
            "the study sweeps it; write --sweep n_embd=32",
        ),
        ("", ["--mixer=tbp"], "--mixer: every arm of the study sets mixer itself; change"),
    ],
)
def test_refusals_before_anything_runs(call, tiny_study, tmp_path, more, arguments, message):
    assert message in call(tiny_study(more), *arguments, ok=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "results").exists()


@pytest.mark.quick
def test_mixers_and_files_that_are_not_there(call, tmp_path):
    assert "there is no mixer tpb; there are residual" in call(
        ROOT / "config/laptop.py", "--mixers=tpb", ok=False
    )
    output = call("config/mixer.py", ok=False)
    assert output.startswith("config/mixer.py: no such file; there are: ")
    assert output.rstrip("\nexit").endswith("config/studies/mixers.py")


@pytest.mark.quick
def test_of_many_cells_the_near_ones_are_named(call, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "config/studies/mixers.py"
    output = call(path, "--cell=tbp/seed1", ok=False)
    count = len(call(path, "--list").splitlines())
    assert "tbp/learning_rate=0.008/seed1, " in output and len(output) < 300
    assert output.endswith(f"…: --list shows all {count}")
    assert "there are residual/" in call(path, "--cell=zzz", ok=False)


@pytest.mark.quick
def test_its_help_has_commands_that_it_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line for line in study.__doc__.splitlines() if line.startswith("    python study.py")]
    assert len(lines) > 5
    for line in lines:
        monkeypatch.setattr("sys.argv", shlex.split(line, comments=True)[1:])
        options, whole, _ = study.read_command_line()
        names = {cell.name for cell in grid.cells(whole, options)}
        assert not options.cell or options.cell in names, line


@pytest.mark.quick
def test_a_run_of_other_knobs_is_not_taken_for_a_cell(call, tiny_study, tmp_path):
    """Neither a result nor a run that was cut off; a knob that was new since is at its default."""
    path = tiny_study()
    one = grid.read_study(path)
    arguments = grid.arguments(one, {**one.knobs, **one.arms["identity"], "seed": 1})
    knobs = dict(grid.knobs_of(*arguments))
    del knobs["read_start"]
    kept = tmp_path / "results/tiny/identity/seed1.json"
    begun = tmp_path / "out/studies/tiny/residual/seed2"
    kept.parent.mkdir(parents=True)
    begun.mkdir(parents=True)
    kept.write_text(json.dumps({"knobs": knobs, "diverged": False, "final_loss": 5.0}))
    assert "identity/seed1: loss 5.0000" in call(path, "--list")

    output = call(path, "--n_layer=3", "--list", ok=False)
    assert "identity/seed1.json is a run with other knobs" in output and "n_layer: 2 -> 3" in output
    assert "read_start: 0.7 -> 0.6" in call(path, "--read_start=0.6", "--list", ok=False)
    assert "identity/seed1: not begun" in call(path, "--n_layer=3", "--name=other", "--list")

    (begun / "config.json").write_text(json.dumps({**knobs, "n_layer": 5}))
    (begun / "metrics.jsonl").write_text('{"step": 2, "val": 5.0, "gain": 1.0}\n')
    output = call(path, "--arms=residual", "--seeds=2,", ok=False)
    assert "out/studies/tiny/residual/seed2 is a run with other knobs" in output
    assert "mixer: 'identity' -> 'residual'" in output and not (begun / "log.txt").exists()


@pytest.mark.quick
@pytest.mark.parametrize("worst, gave_up", [(0, False), (9, False), (10, True), (12, True)])
def test_only_bad_steps_in_a_row_are_a_divergence(worst, gave_up):
    """A loss scaler skips a step now and then: many in all, and a run that was then killed."""
    line = {"step": 20, "loss": 5.0, "skipped": 9, "bad": 0, "worst": 1}
    lines = [{**line, "step": step} for step in (20, 40, 60)] + [{**line, "worst": worst}]
    assert comparison.ends_in_bad_steps(lines, {"max_bad_steps": 10}) == gave_up
    assert not comparison.ends_in_bad_steps(
        [*lines, {"step": 80, "val": 5.0}], {"max_bad_steps": 10}
    )
    assert not comparison.ends_in_bad_steps([], {"max_bad_steps": 10})


@pytest.mark.quick
def test_the_time_left_is_that_of_the_runs_that_were_not_begun():
    """Of three whole runs one is done, and took an hour."""
    assert study.time_left(3600, done=1.0, total=3.0, running=[]) == "about 2h"
    assert "not known" in study.time_left(3600, done=0.0, total=3.0, running=[])


@pytest.mark.quick
def test_a_failed_run_does_not_shorten_the_time_left(call, tiny_study, monkeypatch):
    """The first of two fails at once: how long the second takes is not known."""
    ended = SimpleNamespace(poll=lambda: 1, returncode=1)
    log = Path("out/studies/tiny/residual/seed1/log.txt")
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(Popen=lambda *_, **__: ended))
    output = call(tiny_study("seeds = 1\n"), ok=False)
    assert f"residual/seed1: failed; {log} ends with" in output
    assert "| 1 to go, the time left is not known yet" in output


@pytest.mark.quick
def test_a_killed_run_goes_on_from_its_checkpoint_not_its_last_line(tiny_study, tmp_path):
    """It had written metrics up to step 3 and a checkpoint at step 2."""
    one = grid.read_study(tiny_study())
    folders = {"out": tmp_path / "out", "results": tmp_path / "results"}
    options = study.argparse.Namespace(**folders, files=one.files, processes=1)
    cell = grid.cells(one, options)[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.json").write_text(json.dumps(grid.knobs_of(*cell.arguments)))
    (cell.folder / "metrics.jsonl").write_text('{"step": 3, "loss": 5.0}\n{"step": 4, "lo')
    assert (study.planned(cell, options).begun, study.state(cell)) == (0, "at step 3")
    (cell.folder / "ckpt_0000002.pt").touch()
    run = study.planned(cell, options)
    assert (run.begun, run.steps, run.share(4)) == (2, 4, 0.5)


@pytest.mark.quick
def test_a_damaged_result_and_one_of_no_cell_are_named(call, tiny_study, tmp_path):
    path, folder = tiny_study(), tmp_path / "results/tiny"
    (folder / "gone").mkdir(parents=True)
    (folder / "gone/seed1.json").write_text("{}")
    (folder / "gain.json").write_text("{}")  # analyze.py's: no run's
    assert (
        "Not in the table, since the study has no such cell: results/tiny/gone/seed1.json."
        in call(path, "--table")
    )
    (folder / "identity").mkdir()
    (folder / "identity/seed1.json").write_text('{"knobs": ')
    assert "identity/seed1.json is damaged" in call(path, "--table", ok=False)


@pytest.mark.quick
@pytest.mark.parametrize("name, mix_logits", [("constraint", 9), ("mixers", 16)])
def test_a_wide_residual_has_as_many_parameters_as_tbp_or_hc(name, mix_logits):
    """One by one: a linear layer of C x n_mlp and one back, against phi, bias and alphas."""
    one = grid.read_study(ROOT / f"config/studies/{name}.py")
    C, n = 64, 4  # config/deep.py
    extra = one.arms["residual_wide"]["n_mlp"] - 4 * C
    logits = n + n + mix_logits
    hyper_connections = 2 * (logits * n * C + logits + 3)  # of a layer: attention and MLP
    assert abs(2 * C * extra - hyper_connections) <= C  # half a hidden unit


def test_each_job_has_gpus_of_its_own(monkeypatch, tmp_path, tiny_study):
    """With 4 GPUs and 2 processes a run, the second slot has the last two."""
    started = []
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(study.subprocess, "Popen", lambda *a, env, **k: started.append(env))
    cell = grid.Cell("a/seed1", "a", {}, 1, [], tmp_path / "a", tmp_path / "a.json")
    options = study.argparse.Namespace(processes=2, threads=1)
    for slot in (0, 1):
        study.start(study.Run(cell, 0, 4), options, slot)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    study.start(study.Run(cell, 0, 4), options, 1)
    assert started[-1]["CUDA_VISIBLE_DEVICES"] == "6,7"
