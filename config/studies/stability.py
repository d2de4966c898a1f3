# Stability: rates up to eight times the best one, deep and thin: 24 layers of 64 channels.
# python prepare_data.py && python study.py config/studies/stability.py --jobs=2
# --n_layer=48 --name=stability-48 and --n_layer=4 --name=stability-4 for other depths.
question = "Does the free M break where exact ones hold: at high rates, and with depth?"
decision = """\
For each mixer and rate: how many seeds diverged (losses or gradients that are not finite until
train.py gives up), the largest composite gain and the largest norm of a gradient. Exact mixers are
more stable if hc diverges in more runs than tbp over all rates and depths by Fisher's exact test at
5 %, or if hc's last loss rises above residual's at a rate where tbp's does not (95 % interval of
the paired difference). If nothing diverges, the table says up to which rate and depth.
Added after config/studies/rates.py, where residual and hc are best at .008: rates from there to
eight times that, and tbp_slow, tbp's best recipe there."""
references = ["residual", "tbp"]

files = ["config/laptop.py", "config/deep.py"]
seeds = 5
sweep = {"learning_rate": [32e-3, 16e-3, 8e-3, 64e-3]}
arms = {
    "hc": {"mixer": "hc"},
    "tbp": {"mixer": "tbp"},
    "residual": {"mixer": "residual", "n_streams": 1},
    "tbp_slow": {"mixer": "tbp", "connection_lr": 0.25},
    "tbp_scale": {"mixer": "tbp", "mix_scale": "sublayer"},
    "orthogonal": {"mixer": "orthogonal"},
    "sinkhorn": {"mixer": "sinkhorn"},
    "identity": {"mixer": "identity"},
}
