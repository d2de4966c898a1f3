# All mixers, each at its best rate of learning, deep and thin: 24 layers of 64 channels.
# python prepare_data.py && python study.py config/studies/mixers.py --jobs=2
# --n_layer=4 --n_head=4 --n_embd=128 --name=mixers-shallow for a shallow model (there 608, not
# 352, is residual_wide's n_mlp).
question = "Do the mixers differ in loss, from the plain residual model and among themselves?"
decision = """\
A mixer differs from residual, or from identity, if the 95 % interval of the paired difference over
the seeds leaves out 0, each arm at its own best rate. Where it holds 0, the bound is the answer. A
best rate at the edge of the grid decides nothing: the grid is widened, for all arms, and run again.
Differences below .01 need ten seeds.
Added after config/studies/rates.py, before any run: connections learn at a quarter of the rate,
which was better there for tbp and identity; only hc's learn at the full rate, which was better for
hc in all three seeds. Rates go up to .016.
Added after three seeds of all at .008, and hc's lead on code: residual_wide. A lead over residual
is not one of parameters alone where it stands against residual_wide too (95 % interval).
Added with the one of config/studies/lean.py: a rate of .001, for a shallow model. Added after three
seeds of hc in that model, where it was behind residual and tbp: hc_slow, whose connections learn as
slowly as all others. hc counts with the better of the two."""

files = ["config/laptop.py", "config/deep.py"]
knobs = {"connection_lr": 0.25}
seeds = 5
sweep = {"learning_rate": [8e-3, 4e-3, 16e-3, 2e-3, 1e-3]}

_plain = {"mixer": "residual", "n_streams": 1, "connection_lr": 1.0}  # without connections
arms = {
    "residual": _plain,
    "identity": {"mixer": "identity"},
    "tbp": {"mixer": "tbp"},
    "hc": {"mixer": "hc", "connection_lr": 1.0},
    "hc_slow": {"mixer": "hc"},
    "sinkhorn": {"mixer": "sinkhorn"},
    "rtbp": {"mixer": "rtbp"},
    "permutation": {"mixer": "permutation"},
    "kronecker": {"mixer": "kronecker"},
    "residual_scalars": {**_plain, "x0_scalars": True},
    # As many parameters as hc, at 64 channels: 256 + 2 * 6,171 / (2 * 64).
    "residual_wide": {**_plain, "n_mlp": 352},
}
