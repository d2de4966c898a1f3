"""trackers.py, with modules in the place of the packages; and TensorBoard's own where it is."""

import json
import sys

import pytest
from conftest import run

import trackers
from data import as_number
from progress import Metrics

# Stand-ins that note each call in a file: what was called, and with which arguments.
FAKES = """
import json, types
import importlib.machinery

def note(*call):
    with open({calls!r}, "a") as file:
        print(json.dumps(call), file=file)

class SummaryWriter:
    def __init__(self, folder, purge_step):
        note("writer", folder, purge_step)
    def add_scalar(self, name, value, step):
        note("scalar", name, value, step)
    def flush(self):
        note("flush")

class Run:
    def define_metric(self, *names, **settings):
        note("metric", *names, settings)
    def log(self, line):
        note("log", line)

def init(**settings):
    if {fails}:
        raise wandb.Error("no key")
    note("init", settings)
    return Run()

def add(name, **content):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    sys.modules[name] = module
    return module

add("tensorboard")
add("torch.utils.tensorboard", SummaryWriter=SummaryWriter)
wandb = add("wandb", init=init, Error=type("Error", (Exception,), {{}}))
"""
BOTH = ["--tensorboard=True", "--wandb_project=streams"]


def fakes(folder, fails=False):
    return FAKES.format(calls=str(folder / "calls"), fails=fails)


def calls(folder):
    """What the stand-ins were called with since the last time, by kind."""
    found = {}
    for line in (folder / "calls").read_text().splitlines():
        kind, *arguments = json.loads(line)
        found.setdefault(kind, []).append(arguments)
    (folder / "calls").unlink()
    return found


def scalars(lines):
    """[[name, value, step], ...] of lines of metrics."""
    return [[n, value, line["step"]] for line in lines for n, value in line.items() if n != "step"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_both_get_the_lines_of_the_file_and_a_resumed_run_goes_on(tiny, tmp_path):
    out_dir = tmp_path / "out"
    run(*tiny, *BOTH, patch=fakes(tmp_path))
    first, lines = calls(tmp_path), metrics(out_dir)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4, 5, 6, 6]
    assert [line for (line,) in first["log"]] == lines and first["scalar"] == scalars(lines)
    assert first["writer"] == [[str(out_dir / "tensorboard"), 0]]
    assert len(first["flush"]) == len(lines) and first["metric"] == [["*", {"step_metric": "step"}]]
    ((settings,),) = first["init"]
    assert settings["project"] == "streams" and settings["resume"] == "allow"
    assert settings["config"] == json.loads((out_dir / "config.json").read_text())

    (out_dir / "ckpt_0000006.pt").unlink()  # as if killed between steps 4 and 6
    said = run("train.py", f"--out_dir={out_dir}", "--init_from=resume", patch=fakes(tmp_path))
    again, lines = calls(tmp_path), metrics(out_dir)
    new = [line for line in lines if line["step"] > 4]
    assert "changed since" not in said and [line for (line,) in again["log"]] == new
    assert again["writer"] == [[str(out_dir / "tensorboard"), 5]]
    assert again["init"][0][0]["id"] == settings["id"] and again["scalar"] == scalars(new)


def test_a_run_that_cannot_begin_there_says_why(tiny, tmp_path):
    said = run(*tiny, "--wandb_project=streams", patch=fakes(tmp_path, fails=True), ok=False)
    assert "could not begin a run of streams (no key). Run wandb login" in said


def test_nothing_is_imported_that_nobody_asked_for(tiny):
    absent = "for name in ('tensorboard', 'torch.utils.tensorboard', 'wandb'):\n"
    absent += "    sys.modules[name] = None"
    assert "finished: 1 steps" in run(*tiny, "--max_iters=1", patch=absent)


@pytest.mark.quick
@pytest.mark.parametrize(
    "knob, value, package", [("tensorboard", True, "tensorboard"), ("wandb_project", "x", "wandb")]
)
def test_a_package_that_is_not_there_is_named(knob, value, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    config = {"tensorboard": False, "wandb_project": "", knob: value}
    with pytest.raises(ValueError, match=f"{knob} is {value!r}.*pip install {package}"):
        trackers.check_packages(config)
    trackers.check_packages({**config, knob: type(value)()})


@pytest.mark.quick
def test_tensorboard_reads_what_the_file_holds(tmp_path):
    """The package itself: a loss that is not finite, and a run that was killed and resumed."""
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    for step, last in ((None, 6), (4, 8)):
        log = Metrics(tmp_path, step, [trackers.TensorBoard(tmp_path, step)])
        for now in range((step or 0) + 1, last + 1):
            log.write(step=now, loss=float("nan") if now == 3 else last + now / 4)
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    found = [(event.step, event.value) for event in read.Scalars("loss")]
    wanted = [(line["step"], as_number(line["loss"])) for line in metrics(tmp_path)]
    assert str(found) == str(wanted) and found[-1] == (8, 10.0)  # as text, NaN equals NaN
