# Where training starts and how fast connections learn, deep and thin: 24 layers of 64 channels.
# python prepare_data.py && python study.py config/studies/start.py --jobs=2
question = "Does the start, or the recipe of the connections, hide what an exact mixer can do?"
decision = """\
An arm differs from tbp if the 95 % interval of the paired difference leaves out 0. Each arm changes
one thing of tbp: mix_start (.01) by tens and up to .4, alpha_start (.01), the rate of the
connections, and whether phi decays. If an arm is better, its change becomes the default after it is
tried with sinkhorn and permutation too; a best value at the edge decides nothing: the row goes on.
Where every interval holds 0, the start hides nothing larger than its bound.
Each arm counts at the better of two rates, and connections learn at a quarter of the rate: so tbp
was at its best in config/studies/rates.py, at .008, where residual is too."""
references = ["residual", "tbp"]

files = ["config/laptop.py", "config/deep.py"]
knobs = {"connection_lr": 0.25}
seeds = 5
sweep = {"learning_rate": [8e-3, 4e-3]}
arms = {
    "residual": {"mixer": "residual", "n_streams": 1, "connection_lr": 1.0},  # without connections
    "tbp": {"mixer": "tbp"},
    "start_.1": {"mixer": "tbp", "mix_start": 0.1},
    "start_.4": {"mixer": "tbp", "mix_start": 0.4},
    "start_.001": {"mixer": "tbp", "mix_start": 0.001},
    "alpha_.1": {"mixer": "tbp", "alpha_start": 0.1},
    "alpha_1": {"mixer": "tbp", "alpha_start": 1.0},
    "rate_1": {"mixer": "tbp", "connection_lr": 1.0},
    "rate_.06": {"mixer": "tbp", "connection_lr": 1 / 16},
    "phi_stays": {"mixer": "tbp", "decay_phi": False},
    "sinkhorn": {"mixer": "sinkhorn"},
    "sinkhorn_.1": {"mixer": "sinkhorn", "mix_start": 0.1},
    "permutation": {"mixer": "permutation"},
    "permutation_.1": {"mixer": "permutation", "mix_start": 0.1},
}
