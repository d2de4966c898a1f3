"""
Kernel launches and bytes of one transformer layer on an H100, counted on a machine without one.

    pip install triton==3.7.1             # beside g++ and the CPU build of torch 2.13
    python -m dev.h100.report --mixers=tbp                  # tbp beside the residual model
    python -m dev.h100.report --mixers=identity,kronecker,tbp,rtbp,permutation,sinkhorn
    python -m dev.h100.report --mixers=tbp --cubin          # and registers and spills, on sm_90
    python -m dev.h100.report --mixers=tbp --verbose        # and each pass over the streams
    python -m dev.h100.report --mixers=tbp dynamic=False n_streams=8 --json=h100.json

What is counted: torch.compile compiles a training step (forward, loss, backward) of
`GPT(GPTConfig(...))`, under bfloat16 autocast, for a pretended H100; nothing is executed. Launches
are counted in the Triton code that Inductor generates, and bytes in Inductor's scheduler: each
buffer that a kernel reads or writes counts once, the least that the kernel can move. A layer is the
difference between a model with one layer more and a model without it, so embedding, head and loss
cancel. The figure to quote is the ratio to the residual model, which is counted in the same way.

What is not seen: time, and all that is decided by timing on the GPU: autotuning, cuBLAS's choice of
kernels, padding of matrix products. Registers are those of each kernel's first configuration.

Words that end the command, key=value, are fields of GPTConfig or options of a mixer. A mixer is
compiled twice, in a minute or two; sinkhorn takes longer.
"""

import argparse
import ast
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from mixers import OPTIONS, find_mixer
from model import OF_STREAMS, GPTConfig
from runtime import provenance

BASELINE = "residual"
ONE_LAYER = {"n_layer": 1}  # of GPTConfig's defaults only this is changed
NOT_OF_BASELINE = ("n_streams", "mix_scale", *OF_STREAMS)  # what the residual model does not take


def main():
    arguments = parse(sys.argv[1:])
    if lacking := missing_tool():
        sys.exit(lacking)
    try:
        settings = parse_settings(arguments.settings)
        mixers = list(dict.fromkeys([BASELINE, *arguments.mixers.split(",")]))
        configs = {mixer: model_config(mixer, settings) for mixer in mixers}
        refuse_unused(settings, configs)
    except ValueError as error:
        sys.exit(str(error))

    layers = {}
    for mixer, config in configs.items():
        print(f"counting {mixer} ...", file=sys.stderr, flush=True)
        layers[mixer] = count_layer(config, arguments)
    print_table(layers, configs, arguments)
    if arguments.json:
        write_json(arguments.json, layers, configs, arguments)


def parse(words):
    parser = argparse.ArgumentParser(
        description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixers", default="tbp", help="names, with commas between them")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences in a step")
    parser.add_argument("--cubin", action="store_true", help="count registers and spills")
    parser.add_argument("--verbose", action="store_true", help="print each pass over the streams")
    parser.add_argument("--json", metavar="FILE", help="write the counts, and what made them")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    return parser.parse_args(words)


def missing_tool():
    """What this machine lacks, as a sentence, or None."""
    if not torch.__version__.startswith("2.13.") or torch.version.cuda is not None:
        return (
            "dev/h100 relies on private names of the CPU build of torch 2.13, and this is torch "
            f"{torch.__version__}; requirements.txt says how to install the CPU build"
        )
    if importlib.util.find_spec("triton") is None:
        return "dev/h100 needs triton, to generate a GPU's code: pip install triton==3.7.1"
    if shutil.which("g++") is None:
        return "dev/h100 needs g++, to compile fake_cuda.cpp"
    return None


# ---- from the command line to models -------------------------------------------------------------


def parse_settings(words):
    """["dynamic=False", ...] -> {"dynamic": False, ...}. ValueError for a key nobody knows."""
    known = [field.name for field in dataclasses.fields(GPTConfig)]
    known = [name for name in known if name not in ("mixer", "options")] + list(OPTIONS)
    settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise ValueError(f"{word!r} is not key=value with one of the keys {', '.join(known)}")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value  # a string without quotes
    return settings


def model_config(mixer, settings):
    """The fields of a GPTConfig. ValueError for what the mixer does not allow.

    The residual model takes no field that says how several streams are handled, and a mixer only
    its own options.
    """
    one_stream = find_mixer(mixer).one_stream
    own_options = find_mixer(mixer).options
    config = {**ONE_LAYER, "mixer": mixer, "options": {}}
    for key, value in settings.items():
        if key in own_options:
            config["options"][key] = value
        elif key not in OPTIONS and not (one_stream and key in NOT_OF_BASELINE):
            config[key] = value
    if one_stream:
        config["n_streams"] = 1
    GPTConfig(**config)
    return config


def refuse_unused(settings, configs):
    """ValueError for a setting that reached none of the models."""
    for key, value in settings.items():
        if not any(
            {**config, **config["options"]}.get(key) == value for config in configs.values()
        ):
            raise ValueError(f"{key} is a setting of none of the mixers {', '.join(configs)}")


# ---- counting ------------------------------------------------------------------------------------


def count_layer(config, arguments):
    """{"forward": {"triton": 17, "extern": 7, "bytes": ...}, "backward": ...} of one layer.

    With --cubin also "registers", the most of any kernel, and "local_memory", how many kernels use
    it: spilled registers lie there.
    """
    deeper = {**config, "n_layer": config["n_layer"] + 1}
    without = count_model(config, arguments, details=False)
    with_layer = count_model(deeper, arguments, details=True)
    layer = {}
    for direction, counts in with_layer.items():
        layer[direction] = dict(counts)
        for key in ("triton", "extern", "bytes"):
            layer[direction][key] -= without[direction][key]
    return layer


def count_model(config, arguments, details):
    """The counts of a whole model, by count.py. Exits with what it said where it fails."""
    settings = {
        "config": config,
        "batch_size": arguments.batch_size,
        "cubin": details and arguments.cubin,
        "verbose": details and arguments.verbose,
    }
    command = [sys.executable, "-m", "dev.h100.count", json.dumps(settings)]
    # Nothing is compiled but Python code: Inductor need not start processes to compile in.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"counting {config['mixer']} failed:\n{done.stderr[-3000:]}")
    if settings["verbose"]:
        print(done.stderr, file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# ---- results -------------------------------------------------------------------------------------


def total(layer, key):
    return layer["forward"][key] + layer["backward"][key]


def launches(layer):
    return total(layer, "triton") + total(layer, "extern")


def bytes_ratio(layer, baseline):
    return total(layer, "bytes") / total(baseline, "bytes")


def print_table(layers, configs, arguments):
    sizes = GPTConfig(**list(configs.values())[-1])
    print(
        f"One layer and its gradients on an H100: {sizes.n_streams} streams of {sizes.n_embd} "
        f"channels, {arguments.batch_size} sequences of {sizes.block_size} tokens, bfloat16"
    )
    head = ["mixer", "launches", "GB", f"times {BASELINE}"]
    if arguments.cubin:
        head += ["most registers, forward and backward", "kernels with local memory"]
    print_row(head)
    print_row(["---"] * len(head))
    for mixer, layer in layers.items():
        row = [mixer, launches(layer), f"{total(layer, 'bytes') / 1e9:.2f}"]
        row.append(f"{bytes_ratio(layer, layers[BASELINE]):.3f}")
        if arguments.cubin:
            row.append(f"{layer['forward']['registers']}, {layer['backward']['registers']}")
            row.append(total(layer, "local_memory"))
        print_row(row)


def print_row(cells):
    print(f"| {' | '.join(map(str, cells))} |")


def write_json(path, layers, configs, arguments):
    results = {
        mixer: {
            "config": configs[mixer],
            "launches": launches(layer),
            "bytes": total(layer, "bytes"),
            "bytes_ratio": bytes_ratio(layer, layers[BASELINE]),
            **layer,
        }
        for mixer, layer in layers.items()
    }
    made_by = {**provenance(), "triton": importlib.metadata.version("triton")}
    document = {"made_by": made_by, "batch_size": arguments.batch_size, "one_layer": results}
    Path(path).write_text(json.dumps(document, indent=2) + "\n")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
