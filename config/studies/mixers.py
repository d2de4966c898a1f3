# All mixers, each at the best of three learning rates: 4 layers of 128 channels, 4.1M tokens;
# --n_layer=24 --n_head=2 --n_embd=64 --name=mixers-deep for deep and thin.
# python prepare_data.py && python study.py config/studies/mixers.py --jobs=2
question = "Do the mixers differ in loss, from the plain residual model and among themselves?"
decision = """\
A mixer differs from residual, or from identity, if the 95 % interval of the paired difference over
the seeds leaves out 0, each arm at its own best rate. Where it holds 0, the bound is the answer. A
best rate at the edge of the grid decides nothing: the grid is widened, for all arms, and run again.
Differences below .01 need ten seeds."""

files = ["config/laptop.py"]
seeds = 5
sweep = {"learning_rate": [2e-3, 1e-3, 4e-3]}
arms = {
    "residual": {"mixer": "residual", "n_streams": 1},
    "identity": {"mixer": "identity"},
    "tbp": {"mixer": "tbp"},
    "hc": {"mixer": "hc"},
    "sinkhorn": {"mixer": "sinkhorn"},
    "rtbp": {"mixer": "rtbp"},
    "permutation": {"mixer": "permutation"},
    "kronecker": {"mixer": "kronecker"},
    "residual_scalars": {"mixer": "residual", "n_streams": 1, "x0_scalars": True},
}
