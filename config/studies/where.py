# Where mixing matters: the number of streams, the token, both ends, deep and thin.
# python prepare_data.py && python study.py config/studies/where.py --jobs=2
# --n_layer=48 --name=where-48 for twice the depth, --n_layer=4 --n_head=4 --n_embd=128
# --name=where-shallow for a shallow model. What M is worth by layer: analyze.py of any run.
question = "What does an exact mixer's gain come from: streams, tokens, or the two ends?"
decision = """\
An arm differs from tbp if the 95 % interval of the paired difference leaves out 0. More streams
help if n_8 is below tbp; the token matters if static is above it; the ends matter if ends is below
it. tbp earns what identity does not if the interval of their difference leaves out 0. The answer
holds for a depth, and is given for 24 layers, for 48 and for 4.
Each arm counts at the better of two rates, and connections learn at a quarter of the rate: so tbp
was at its best in config/studies/rates.py, at .008, where residual is too.
Added after seed 1 of ends, .063 below tbp, where trained mixers of equal streams had not mixed at
all: identity_ends, which says whether M has a part in it (ends minus identity_ends), and
ends_start_.4, whose M is free to move."""
references = ["residual", "tbp", "identity"]

files = ["config/laptop.py", "config/deep.py"]
knobs = {"connection_lr": 0.25}
seeds = 5
sweep = {"learning_rate": [8e-3, 4e-3]}
_ends = {"mixer": "tbp", "readout": "learned", "stream_start": "learned"}
arms = {
    "residual": {"mixer": "residual", "n_streams": 1, "connection_lr": 1.0},  # without connections
    "tbp": {"mixer": "tbp"},
    "identity": {"mixer": "identity"},
    "static": {"mixer": "tbp", "dynamic": False},
    "identity_static": {"mixer": "identity", "dynamic": False},
    "ends": _ends,
    "read_out": {"mixer": "tbp", "readout": "learned"},
    "identity_ends": {"mixer": "identity", "readout": "learned", "stream_start": "learned"},
    "ends_start_.4": {**_ends, "mix_start": 0.4},
    "n_2": {"mixer": "tbp", "n_streams": 2},
    "n_8": {"mixer": "tbp", "n_streams": 8},
    "n_16": {"mixer": "tbp", "n_streams": 16},
}
