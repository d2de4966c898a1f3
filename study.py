"""
An ablation: a grid of training runs with paired seeds, and the table of what they say.

    python study.py config/laptop.py --mixers=all --seeds=5              # every mixer
    python study.py config/laptop.py --mixers=residual,tbp --sweep learning_rate=1e-3,2e-3,4e-3
    python study.py config/studies/mixers.py --jobs=2                    # a study, two runs at once
    python study.py config/studies/mixers.py --arms=residual,tbp --seeds=1   # a part of it
    python study.py config/studies/mixers.py --list                      # the cells, their state
    python study.py config/studies/mixers.py --table                     # the table alone
    python study.py config/studies/mixers.py --cell=tbp/learning_rate=0.008/seed1    # run it again

A study is a file with a question, a rule of decision and a grid (grid.py); config files of train.py
with --mixers are one too. Every other --knob=value is train.py's, in all cells. The same command
again skips what is finished and continues what was cut off. Ctrl-C or SIGTERM lets every run write
a checkpoint. If a cell's folder has a run with other knobs, the command is refused.

    out/studies/NAME/CELL/           checkpoints, metrics and log of a run
    results/NAME/CELL.json           what is kept of it, a few kB: losses, step time, commit, knobs
    results/NAME/table.md and .csv   what the runs say so far (comparison.py), after each run

A run has diverged if train.py gave it up after max_bad_steps steps that were not finite, or if its
last validation loss is not finite. That is a result. A run that fails otherwise is named at the
end, and runs again with the next call.
"""

import argparse
import ast
import difflib
import itertools
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint
import comparison
from configurator import is_study, read_source
from data import DataError, write_atomic, write_json
from grid import (
    DEFAULTS,
    TRAIN,
    Cell,
    Study,
    cells,
    check_knobs,
    check_same,
    command,
    read_study,
    result_of,
)
from mixers import MIXERS
from progress import duration
from runtime import RunError, StopSignal, run_script

# ---- results -------------------------------------------------------------------------------------


def state(cell):
    """How far a cell is, in words. Raises RunError for a result with other knobs."""
    if result := result_of(cell):
        return "diverged" if result["diverged"] else f"loss {result['final_loss']:.4f}"
    step = comparison.last_step(cell.folder)
    return f"at step {step}" if step else "not begun"


def keep_result(cell, options, gave_up):
    """Write the cell's file in results/ from its run; -> its content."""
    config, records = comparison.read_run(cell.folder)
    provenance = config.pop("provenance", {})
    provenance.pop("command", None)  # the result has the cell's command
    result = {
        "arm": cell.arm,
        "axes": cell.axes,
        "seed": cell.seed,
        "command": command(cell, options),
        "provenance": {**provenance, "hardware": comparison.hardware(config["device"])},
        **comparison.summary(records, config["total_batch_tokens"], gave_up),
        "knobs": config,
    }
    cell.result.parent.mkdir(parents=True, exist_ok=True)
    write_json(cell.result, result)
    return result


# ---- running -------------------------------------------------------------------------------------


class Run(NamedTuple):
    cell: Cell
    begun: int  # the step of the checkpoint from which it goes on, or 0
    steps: int  # the step at which it ends
    process: subprocess.Popen | None = None  # None before it starts

    def share(self, step):
        """How much this call has done of the run when it is at `step`: 1 is a whole run."""
        return max(0, step - self.begun) / max(1, self.steps)


def planned(cell, options):
    """-> the cell's Run, not started yet. RunError for knobs that train.py refuses, and for knobs
    other than those with which the run began."""
    try:
        knobs = check_knobs(cell, options.processes)
    except (RunError, ValueError) as error:
        raise RunError(f"{' '.join(options.files)}: {cell.name}: {error}") from error
    config, _ = comparison.read_run(cell.folder)
    if config:
        check_same(cell, config, cell.folder)
    saved = [int(path.stem.removeprefix("ckpt_")) for path in checkpoint.checkpoints(cell.folder)]
    return Run(cell, max(saved, default=0), knobs["max_iters"])


def start(run, options, slot):
    """Start a run in the background -> the Run with its process.

    slot: 0 to options.jobs - 1. Each has one run at a time, and its GPUs (gpus_of_slot).
    """
    cell, launcher = run.cell, []
    if options.processes > 1:
        processes = f"--nproc_per_node={options.processes}"
        launcher = ["-m", "torch.distributed.run", "--standalone", processes]
    words = [sys.executable, *launcher, str(TRAIN), *cell.arguments]
    words += [f"--out_dir={cell.folder}", "--init_from=auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    if torch.cuda.device_count():
        environment["CUDA_VISIBLE_DEVICES"] = gpus_of_slot(slot, options.processes)
    say(f"{cell.name}: from step {run.begun}: {command(cell, options)}")
    cell.folder.mkdir(parents=True, exist_ok=True)
    with open(cell.folder / "log.txt", "ab") as log:
        # A session of its own: Ctrl-C reaches only this process, which then stops the runs.
        streams = {"stdout": log, "stderr": log}
        process = subprocess.Popen(words, env=environment, start_new_session=True, **streams)
    return run._replace(process=process)


def gpus_of_slot(slot, processes):
    """The CUDA_VISIBLE_DEVICES of a run with so many processes. Each slot gets the next GPUs; where
    there are too few, slots share them."""
    count = torch.cuda.device_count()
    everything = ",".join(str(device) for device in range(count))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", everything).split(",")
    places = range(slot * processes, (slot + 1) * processes)
    return ",".join(visible[place % count] for place in places)


def settle(run, options, stopping):
    """Keep the result of a run that ended -> the result in words. RunError if the run failed."""
    config, records = comparison.read_run(run.cell.folder)
    step, failed = comparison.last_step(run.cell.folder), run.process.returncode != 0
    gave_up = failed and comparison.ends_in_bad_steps(records, config)
    if gave_up or (not failed and step >= run.steps):
        result = keep_result(run.cell, options, gave_up)
        if result["diverged"]:
            return f"diverged, at step {step}"
        return f"loss {result['final_loss']:.4f}, {result['ms_per_step']:.0f} ms a step"
    if stopping or not failed:
        return f"cut off at step {step} of {run.steps}"
    log = run.cell.folder / "log.txt"
    end = "\n    ".join(log.read_text(errors="replace").splitlines()[-5:])
    raise RunError(f"failed; {log} ends with\n    {end}")


def run_grid(study, todo, options):
    """Run the cells `todo`, options.jobs at a time; -> the names of those that failed.

    SIGTERM or Ctrl-C lets every run write a checkpoint, and ends it.
    """
    stop, stopping = StopSignal(group=None), False
    waiting = [planned(cell, options) for cell in todo]
    running, failed = {}, []  # running: slot -> Run
    total = sum(run.share(run.steps) for run in waiting)  # in whole runs, as `done`
    done, began = 0.0, time.time()

    try:
        while running or (waiting and not stopping):
            for slot in range(options.jobs):
                if slot not in running and waiting and not stop.received:
                    running[slot] = start(waiting.pop(0), options, slot)
            time.sleep(0.5)
            if stop.received and not stopping:
                stopping = True
                say("stopping: every run is asked for a checkpoint; the same command goes on there")
                for run in running.values():
                    run.process.terminate()

            for slot, run in list(running.items()):
                if run.process.poll() is None:
                    continue
                del running[slot]
                share = run.share(run.steps)
                try:
                    outcome = settle(run, options, stopping)
                    done += share
                except RunError as error:
                    outcome = str(error)
                    failed.append(run.cell.name)
                    total -= share  # it did not take the time of a whole run
                left = time_left(time.time() - began, done, total, running.values())
                say(f"{run.cell.name}: {outcome} | {len(waiting) + len(running)} to go, {left}")
                write_table(study, options)
    finally:
        for run in running.values():  # after an error: each writes a checkpoint and ends
            run.process.terminate()
    return failed


def time_left(seconds, done, total, running):
    """How long the rest will take, in words. `seconds` have passed, in which `done` of `total` runs
    were done, and parts of those that are `running`."""
    done += sum(run.share(comparison.last_step(run.cell.folder)) for run in running)
    if not done:
        return "the time left is not known yet"
    return f"about {duration(seconds * (total - done) / done)}"


def run_again(study, cell, options):
    """Run a finished cell again, in another folder. RunError unless all its losses are the same."""
    first = result_of(cell)
    if first is None:
        raise RunError(f"{cell.name} has no result yet that a second run could be compared with")
    number = 1
    while Path(f"{cell.folder}-again{number}").exists():
        number += 1
    folder = Path(f"{cell.folder}-again{number}")
    again = cell._replace(folder=folder, result=folder / "result.json")
    run_grid(study, [again], options)
    second = result_of(again)
    if second is None:
        raise RunError(f"{cell.name} was not run to its end; see {folder}/log.txt")
    then = [(evaluation["step"], evaluation["val"]) for evaluation in first["evaluations"]]
    now = [(evaluation["step"], evaluation["val"]) for evaluation in second["evaluations"]]
    if then != now:
        changed = " The first run was made with changes that its commit does not have."
        raise RunError(
            f"not the same losses. Then, by step: {then}, {first['provenance']}. "
            f"Now: {now}, {second['provenance']}."
            + (changed if first["provenance"].get("clean") is False else "")
        )
    say(f"the same loss at all {len(now)} evaluations, the last is {second['final_loss']}")


def write_table(study, options):
    """Write table.md and table.csv from what results/ has of the study -> the text of table.md."""
    folder, plan = Path(options.results, study.name), cells(study, options)
    results = [result for cell in plan if (result := result_of(cell))]
    # A file in the folder itself is analyze.py's; those of cells lie in folders below it.
    strangers = set(folder.glob("*/**/*.json")) - {cell.result for cell in plan}
    text = comparison.report(study, results, len(plan), sorted(map(str, strangers)))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "table.md", text.encode())
    write_atomic(folder / "table.csv", comparison.table_csv(results, study.references).encode())
    return text


def say(text):
    print(text, flush=True)


# ---- the command line ----------------------------------------------------------------------------


MOST_NAMES = 20  # the most that a refusal lists; of more it shows those like the wrong one
SWEEP_HELP = "values with commas between; may be repeated; of a study, those of its values to run"


def parse_command_line():
    """-> the options, and the knobs of train.py: {knob: text}."""
    parser = argparse.ArgumentParser(
        description=__doc__.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("files", nargs="+", help="a study (config/studies/*.py), or config files of train.py")
    add("--arms", "--mixers", default="all", help="names with commas between, or all")
    add("--seeds", help="5: seeds 1 to 5; 2,3: these; 2,: 2 alone (default: the study's, else 5)")
    add("--sweep", action="append", default=[], metavar="KNOB=VALUES", help=SWEEP_HELP)
    add("--name", help="of the study's folders in out/studies and results (default: the file's)")
    add("--jobs", type=int, default=1, help="runs at a time; each takes the next GPUs")
    add("--threads", type=int, default=1, help="CPU threads of a process (OMP_NUM_THREADS)")
    add("--processes", type=int, default=1, help="processes of a run; above 1 under torchrun")
    add("--list", action="store_true", help="show the cells and their state; run nothing")
    add("--dry_run", action="store_true", help="show the commands; run nothing")
    add("--table", action="store_true", help="write the table; run nothing")
    add("--cell", help="the name of a finished cell: run it again, elsewhere; compare the losses")
    path = os.path.expanduser  # a shell leaves the ~ of --out=~/studies
    add("--results", type=path, default="results", help="folder for results and tables")
    add("--out", type=path, default="out/studies", help="folder for checkpoints and logs")
    options, rest = parser.parse_known_args()
    for name in ("jobs", "threads", "processes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    for word in rest:
        if not word.startswith("--") or "=" not in word:
            parser.error(f"{word}: write files first, then --knob=value in one word")
    return options, dict(word[2:].split("=", 1) for word in rest)


def parse_values(text):
    """'7e-4,True,english' -> [0.0007, True, 'english']."""
    values = []
    for word in filter(None, text.split(",")):
        try:
            values.append(ast.literal_eval(word))
        except (ValueError, SyntaxError):
            values.append(word)
    return values


def parse_seeds(text):
    """'5' -> [1, 2, 3, 4, 5]; '2,3' -> [2, 3]; '2,' -> [2]."""
    seeds = parse_values(text)
    numbers = all(isinstance(seed, int) for seed in seeds)
    if not seeds or not numbers or ("," not in text and seeds[0] < 1):
        raise RunError(f"--seeds={text}: give how many, such as 5, or which, such as 2,3")
    return seeds if "," in text else list(range(1, seeds[0] + 1))


def parse_sweep(axes):
    """['n_streams=2,4'] -> {'n_streams': [2, 4]}."""
    sweep = {}
    for axis in axes:
        knob, _, values = axis.partition("=")
        sweep[knob] = parse_values(values)
        if not sweep[knob]:
            raise RunError(f"--sweep {axis}: write --sweep knob=value,value")
    return sweep


def choose(what, wanted, known, remedy=""):
    """The `wanted` ones, in the order of `known`; all that are known where `wanted` is None.

    Raises RunError for one that is not known; `what` says in the message what they are: "arm"."""
    if wanted is None:
        return list(known)
    if missing := [str(one) for one in wanted if one not in known]:
        there = [str(one) for one in known]
        if len(there) > MOST_NAMES:
            near = [difflib.get_close_matches(one, there, 3, 0.4) for one in missing]
            remedy = f", …: --list shows all {len(there)}{remedy}"
            there = list(dict.fromkeys(itertools.chain(*near))) or there[:3]
        listed = ", ".join(there) or "none"
        raise RunError(f"there is no {what} {', '.join(missing)}; there are {listed}{remedy}")
    return [one for one in known if one in wanted]


def study_of_mixers(options, names, seeds, sweep):
    """Config files of train.py with --mixers, as a study without a question."""
    arms = {name: {"mixer": name} for name in choose("mixer", names, MIXERS)}
    for name, knobs in arms.items():
        if MIXERS[name].one_stream:
            knobs["n_streams"] = 1
    words = [*options.files, f"--mixers={options.arms}", f"--seeds={options.seeds or 5}"]
    words += [word for axis in options.sweep for word in ("--sweep", axis)]
    return Study(
        name=Path(options.files[-1]).stem,
        command=f"python study.py {shlex.join(words)}",
        question="",
        decision="",
        files=options.files,
        knobs={},
        arms=arms,
        seeds=seeds,
        sweep=sweep,
        references=DEFAULTS["references"],
    )


def read_command_line():
    """-> the options, the whole study, and the part of it that the options name."""
    options, knobs = parse_command_line()
    file = options.files[0]
    names = None if options.arms == "all" else options.arms.split(",")
    seeds = parse_seeds(options.seeds) if options.seeds else None
    sweep = parse_sweep(options.sweep)
    if not any(is_study(read_source(path, TRAIN)) for path in options.files):
        study = study_of_mixers(options, names, seeds or [1, 2, 3, 4, 5], sweep)
        arms_are = "--mixers"
    elif len(options.files) > 1:
        raise RunError(f"a study stands alone, not among {', '.join(options.files)}")
    else:
        study = read_study(file)
        arms_are = f"the arms in {file}"
    for knob in knobs:
        if knob in study.sweep:
            raise RunError(f"--{knob}: the study sweeps it; write --sweep {knob}={knobs[knob]}")
        if all(knob in own for own in study.arms.values()):
            raise RunError(
                f"--{knob}: every arm of the study sets {knob} itself; change {arms_are}"
            )
    more = [f"--{knob}={value}" for knob, value in knobs.items()]
    if options.name:
        more.insert(0, f"--name={options.name}")
    study = study._replace(
        name=options.name or study.name,
        command=" ".join([study.command, *map(shlex.quote, more)]),
        knobs={**study.knobs, **knobs},
    )
    choose("swept knob", list(sweep), study.sweep, f"; add it to {file}")  # refuses another one
    part = study._replace(
        arms={name: study.arms[name] for name in choose("arm", names, study.arms)},
        seeds=choose("seed", seeds, study.seeds, f"; for more, raise seeds in {file}"),
        sweep={
            knob: choose(f"value of {knob}", sweep.get(knob), values, f"; add it to {file}")
            for knob, values in study.sweep.items()
        },
    )
    return options, study, part


def main():
    options, study, part = read_command_line()
    if options.cell:
        by_name = {cell.name: cell for cell in cells(study, options)}
        (name,) = choose("cell", [options.cell], by_name)
        return run_again(study, by_name[name], options)

    wanted = cells(part, options)
    if options.list:
        for cell in wanted:
            say(f"{cell.name}: {state(cell)}")
        return
    todo = [cell for cell in wanted if result_of(cell) is None]
    if options.dry_run:
        for cell in todo:
            say(command(planned(cell, options).cell, options))
        return

    failed = []
    if not options.table:
        say(f"{len(wanted) - len(todo)} of {len(wanted)} runs are finished, {len(todo)} to do")
        failed = run_grid(study, todo, options)
    say(write_table(study, options))
    if failed:
        raise RunError(f"{len(failed)} runs failed, as said above: {', '.join(failed)}")


if __name__ == "__main__":
    run_script(main, expected=(RunError, DataError, OSError))
