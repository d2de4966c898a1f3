"""
The lines of metrics.jsonl, sent on to TensorBoard and to Weights & Biases as they are written.

    python train.py --tensorboard=True          # then: tensorboard --logdir=out
    python train.py --wandb_project=streams     # after: wandb login

A resumed run goes on in the same log. Neither package is imported unless its knob asks for it.
"""

import importlib.util
import secrets
from pathlib import Path

from data import as_number
from runtime import RunError

PACKAGES = {"tensorboard": "tensorboard", "wandb_project": "wandb"}  # knob: the package it needs


def check_packages(config):
    """Raises ValueError where a knob asks for a package that is not there."""
    for knob, package in PACKAGES.items():
        if config[knob] and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{knob} is {config[knob]!r}, and the package {package} is not installed: "
                f"pip install {package}, or leave the knob out; metrics.jsonl has every number"
            )


def open_trackers(config, step, provenance):
    """-> the trackers that the knobs ask for.

    step: of the checkpoint from which the run goes on; None: the run begins. Raises RunError.
    """
    trackers = []
    if config["tensorboard"]:
        trackers.append(TensorBoard(config["out_dir"], step))
    if config["wandb_project"]:
        about = {**config, "provenance": provenance}
        trackers.append(WeightsAndBiases(config["out_dir"], step, config["wandb_project"], about))
    return trackers


class TensorBoard:
    """Event files in out_dir/tensorboard: a scalar for each name in a line."""

    def __init__(self, out_dir, step):
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote beyond its checkpoint is removed, as from metrics.jsonl.
        beyond = 0 if step is None else step + 1
        self.writer = SummaryWriter(str(Path(out_dir) / "tensorboard"), purge_step=beyond)

    def write(self, line):
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name, as_number(value), line["step"])
        self.writer.flush()  # else a kill loses up to two minutes


class WeightsAndBiases:
    """A run of a project there. out_dir/wandb_id keeps its id, for when the run is resumed."""

    def __init__(self, out_dir, step, project, about):
        import wandb

        id_file = Path(out_dir) / "wandb_id"
        if step is None or not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        try:
            self.run = wandb.init(
                project=project,
                name=Path(out_dir).name,
                id=id_file.read_text(),
                resume="allow",
                config=about,
                allow_val_change=True,
                dir=out_dir,
            )
        except wandb.Error as error:
            raise RunError(
                f"Weights & Biases could not begin a run of {project} ({error}). Run wandb login, "
                "or set WANDB_MODE=offline, or leave --wandb_project out"
            ) from error
        # wandb's own step can never go back, and a run that is resumed after a kill does.
        self.run.define_metric("*", step_metric="step")

    def write(self, line):
        self.run.log({name: as_number(value) for name, value in line.items()})
