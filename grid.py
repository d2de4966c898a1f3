"""
A study: its file, the cells of its grid, and the result of each.

A cell is one run of train.py: an arm (a name for some knobs), one value of every swept knob, a
seed. The runs of a seed have the same initial weights and see the same batches.

    question = "..."                             what the runs are to decide
    decision = "..."                             by which rule they decide, written before the runs
    files = ["config/laptop.py"]                 config files of train.py
    knobs = {"n_layer": 24}                      of every run, after the files
    arms = {"tbp": {"mixer": "tbp"}}             the knobs of each arm, by its name
    seeds = 5                                    how many: seeds 1 to 5; or a list of seeds
    sweep = {"learning_rate": [1e-3, 2e-3]}      the values of each swept knob
    references = ["residual", "identity"]        the arms with which the table compares every other

knobs, sweep and references may be left out; a helper variable has a name that starts with _. An arm
that sets a swept knob itself keeps its own value. Where learning_rate is swept, min_lr changes in
proportion. All runs start from scratch.
"""

import contextlib
import functools
import io
import itertools
import json
import shlex
from pathlib import Path
from typing import NamedTuple

import recipe
from batches import sequences_per_step
from configurator import at_least, read_source, resolve, run_file
from mixers import OPTIONS
from runtime import RunError

TRAIN = Path(__file__).with_name("train.py")
TYPES = {  # of the names in a study's file
    "question": str,
    "decision": str,
    "files": list,
    "knobs": dict,
    "arms": dict,
    "seeds": (int, list),
    "sweep": dict,
    "references": list,
}
DEFAULTS = {"knobs": {}, "sweep": {}, "references": ["residual", "identity"]}
# Knobs in which a run may differ from its cell: where files are, and init_from, which is auto
IGNORED = ("out_dir", "init_from", "data_dir")
# Knobs that each cell sets itself; a study that sets one is refused
OF_THE_CELL = ("seed", "out_dir", "init_from", "eval_only")


class Study(NamedTuple):
    name: str  # of its folders in out/studies and results
    command: str  # that runs it
    question: str
    decision: str
    files: list[str]
    knobs: dict
    arms: dict[str, dict]
    seeds: list[int]
    sweep: dict[str, list]
    references: list[str]


class Cell(NamedTuple):
    name: str  # tbp/learning_rate=0.002/seed1
    arm: str
    axes: dict  # one value of each swept knob that the arm does not set itself
    seed: int
    arguments: list[str]  # what follows train.py, without the folder
    folder: Path  # of the run's checkpoints, metrics and log
    result: Path  # the file in results/


# ---- a study's file ------------------------------------------------------------------------------


def read_study(path):
    """The study in the file at `path`. RunError for what is wrong in it; SystemExit, with a message
    on stderr, where it cannot be run at all."""
    scope = run_file(str(path), read_source(path, TRAIN), {})
    given = DEFAULTS | {name: scope[name] for name in scope if not name.startswith("_")}
    missing = [f"{name} is missing" for name in TYPES if name not in given]
    if wrong := missing + [f"{name} is not known" for name in given if name not in TYPES]:
        raise RunError(
            f"{path}: {', '.join(wrong)}: a study has {', '.join(TYPES)} and nothing else, and "
            f"only {', '.join(DEFAULTS)} may be left out; a name of the file's own starts with _"
        )
    for name, kind in TYPES.items():
        if not isinstance(given[name], kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(one.__name__ for one in kinds)
            found = type(given[name]).__name__
            raise RunError(f"{path}: {name} is of the type {found}; write it as {wanted}")
    if isinstance(given["seeds"], int):
        given["seeds"] = list(range(1, given["seeds"] + 1))
    study = Study(Path(path).stem, f"python study.py {path}", **given)
    if wrong := faults(study):
        raise RunError(f"{path}: {'; '.join(wrong)}")
    try:
        knobs_of(*arguments(study, study.knobs))
    except RunError as error:
        raise RunError(f"{path}: {error}") from error
    return study


def faults(study):
    """What is wrong inside the lists and dicts of a study's file, in words."""
    found = [
        f"the sweep of {knob} is {values!r}; write a list of values"
        for knob, values in study.sweep.items()
        if not isinstance(values, list) or not values
    ]
    found += [
        f"arm {arm!r} is {knobs!r}; write a name and its knobs, 'tbp': {{'mixer': 'tbp'}}"
        for arm, knobs in study.arms.items()
        if not isinstance(arm, str) or not isinstance(knobs, dict)
    ]
    found += [
        f"references: {name} is no arm; the arms are {', '.join(map(str, study.arms))}"
        for name in study.references
        if name not in study.arms and study.references != DEFAULTS["references"]
    ]
    found += [
        f"arm {arm!r}: a folder with = is a swept knob's; write another name, such as "
        f"{arm.replace('=', '_')}"
        for arm in study.arms
        if isinstance(arm, str) and "=" in arm
    ]
    if not study.arms:
        found.append("arms is empty; write at least one")
    if not study.seeds or not all(type(seed) is int for seed in study.seeds):
        found.append(f"seeds are {study.seeds!r}; write how many, such as 5, or a list of integers")
    return found


# ---- cells ---------------------------------------------------------------------------------------


def cells(study, options):
    """The cells in the order of their runs: all arms and swept values with the first seed, then all
    with the second."""
    found = {}
    for seed in study.seeds:
        for values in itertools.product(*study.sweep.values()):
            for arm in study.arms:
                cell = make_cell(study, options, arm, dict(zip(study.sweep, values)), seed)
                # An arm that sets a swept knob itself is the same cell for all values of the knob.
                found.setdefault(cell.name, cell)
    return list(found.values())


def make_cell(study, options, arm, axes, seed):
    """axes: a value for every swept knob; those that the arm sets itself are left out."""
    own = study.arms[arm]
    axes = {knob: value for knob, value in axes.items() if knob not in own}
    parts = [arm, *(f"{knob}={value}" for knob, value in axes.items()), f"seed{seed}"]
    for part in (study.name, *parts):
        refuse_as_folder(part)
    if lost := [knob for knob in OF_THE_CELL if knob in {**study.knobs, **study.sweep, **own}]:
        raise RunError(
            f"{', '.join(lost)}: a study gives each run its own; seeds are --seeds=1,2 or seeds of "
            "the study, folders are in --out, and all runs start from scratch"
        )
    name = "/".join(parts)
    knobs = {**study.knobs, **axes, **own, "seed": seed}
    if "learning_rate" in axes and "min_lr" not in {**axes, **own}:
        knobs["min_lr"] = min_lr_at(study, axes["learning_rate"])
    folder = Path(options.out, study.name, name)
    result = Path(options.results, study.name, name + ".json")
    return Cell(name, arm, axes, seed, arguments(study, knobs), folder, result)


def refuse_as_folder(part):
    """RunError for a part of a path that would lead elsewhere."""
    if part in ("", ".", "..") or "/" in part or "\\" in part:
        raise RunError(
            f"{part!r} cannot be the name of a folder of runs: use a name without / or \\, and for "
            "swept values that have one, arms with names of their own"
        )


def arguments(study, knobs):
    """What follows train.py on its command line."""
    return [*study.files, *(f"--{knob}={value}" for knob, value in knobs.items())]


@functools.cache
def knobs_of(*arguments):
    """The knobs of train.py with these arguments. RunError where train.py would refuse them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return resolve(TRAIN, list(arguments), extra=OPTIONS)
    except SystemExit as error:
        raise RunError(said.getvalue().strip().removeprefix("command line: ")) from error


def check_knobs(cell, processes):
    """-> the knobs of a cell's run. RunError or ValueError for a knob of a wrong name or type, a
    value that train.py refuses, a model that cannot be, or a step whose sizes do not fit."""
    config = knobs_of(*cell.arguments)
    if config["init_from"] != "scratch":  # of a config file
        raise RunError(f"init_from = {config['init_from']!r}: runs of a study start from scratch")
    recipe.check(config)
    recipe.gpt_config(config)
    at_least(config, 1, "max_iters")  # a run without a step has no step time
    sizes = ("total_batch_tokens", "batch_size", "block_size")
    sequences_per_step(*(config[name] for name in sizes), processes)
    return config


def min_lr_at(study, learning_rate):
    """The min_lr for a swept learning_rate, in the ratio that the study's files and knobs have."""
    if not isinstance(learning_rate, (int, float)):
        raise RunError(f"the sweep of learning_rate has {learning_rate!r}, which is no number")
    own = knobs_of(*arguments(study, study.knobs))
    return float(f"{own['min_lr'] / own['learning_rate'] * learning_rate:.6g}")


def command(cell, options):
    """The command line of a cell, as a person types it."""
    launcher = ["python"]
    if options.processes > 1:
        launcher = ["torchrun", "--standalone", f"--nproc_per_node={options.processes}"]
    words = [*launcher, TRAIN.name, *cell.arguments, f"--out_dir={cell.folder}"]
    return f"OMP_NUM_THREADS={options.threads} {shlex.join(words)}"


# ---- what there is of a cell ---------------------------------------------------------------------


def check_same(cell, knobs, where):
    """Raises RunError unless the run at `where`, which had `knobs`, is one of this cell.

    A knob that train.py did not have when the run started has to stand at its default.
    """
    now, then = knobs_of(*cell.arguments), {**knobs_of(), **knobs}
    changed = [
        f"{knob}: {then[knob]!r} -> {value!r}"
        for knob, value in now.items()
        if knob not in IGNORED and then[knob] != value
    ]
    if changed:
        raise RunError(
            f"{where} is a run with other knobs than {cell.name} has now ({', '.join(changed)}). "
            "Give this study another --name=…, or move what is there"
        )


def result_of(cell):
    """The content of the cell's file in results/, or None. RunError if its knobs are others."""
    if not cell.result.exists():
        return None
    try:
        result = json.loads(cell.result.read_text())
    except ValueError as error:
        raise RunError(
            f"{cell.result} is damaged ({error}); without it the cell runs again"
        ) from error
    check_same(cell, result["knobs"], cell.result)
    return result
