"""
The knobs of a training run, checked before it begins: by train.py, and by study.py for each cell.

    check(config)                               # ValueError for what no run can have
    model_config = gpt_config(config, vocab_size=50304)

config is {knob: value}, with all knobs of train.py and all options of the mixers.
"""

import math
from dataclasses import fields

from configurator import at_least
from mixers import options_of
from model import GPTConfig


def check(config):
    """Raises ValueError for knobs that no run can have, but for those of the model: gpt_config."""
    at_least(config, 1, "batch_size", "block_size", "total_batch_tokens", "max_bad_steps")
    at_least(config, 1, "eval_interval", "log_interval", "checkpoint_interval", "keep_checkpoints")
    at_least(config, 0, "grad_clip", "weight_decay", "connection_lr", "max_iters", "warmup_iters")
    at_least(config, 0, "seed", "min_lr")
    rate, lowest = config["learning_rate"], config["min_lr"]
    if not lowest <= rate < math.inf:
        raise ValueError(
            f"learning_rate = {rate} falls to min_lr = {lowest}, so it must be the higher of the "
            "two, and finite; name both, such as --learning_rate=3e-5 --min_lr=3e-6"
        )
    for name in ("beta1", "beta2"):
        if not 0 <= config[name] < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, not {config[name]}")
    if not 0 < config["hang_minutes"] < 1e6:
        raise ValueError(
            f"hang_minutes must be above 0 and below a million, not {config['hang_minutes']}"
        )
    if not config["out_dir"]:
        raise ValueError("out_dir is empty; give the run a folder, such as --out_dir=out/tbp")
    if not 0 <= config["activation_memory_budget"] <= 1:
        raise ValueError(
            "activation_memory_budget must lie between 0 and 1, not "
            f"{config['activation_memory_budget']}"
        )


def gpt_config(config, **others):
    """The GPTConfig that the knobs mean. others: fields that are no knobs, such as vocab_size.

    Raises ValueError for a model that cannot be.
    """
    own = {field.name: config[field.name] for field in fields(GPTConfig) if field.name in config}
    return GPTConfig(options=options_of(config["mixer"], config), **own, **others)
