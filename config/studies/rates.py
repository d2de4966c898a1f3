# Rates of learning, deep and thin: 24 layers of 64 channels, as config/studies/constraint.py.
# python prepare_data.py && python study.py config/studies/rates.py --jobs=2
question = "Is the free M's lead over the exact one a matter of the rate at which they learn?"
decision = """\
Each arm counts at its own best rate, and a best rate at the edge of the grid decides nothing. The
lead stands if the 95 % interval of hc minus tbp leaves out 0 there. tbp_fast, whose connections
learn at four times the rate, says whether a bounded M is only slow: it explains the part of the
lead that it closes, if its interval against tbp leaves out 0. A number a sublayer without mixing
(residual_scale) and beside signs (orthogonal_scale) are judged as hc: their leads over tbp in
config/studies/constraint.py are not a matter of the rate if they stand at the best rates.
Added after tbp at .004, seed 1, which is .15 below tbp at .002: rates up to .016, and identity.
Added after residual at .008, seed 1, which is .06 below the best tbp: tbp_slow, whose connections
learn at a quarter of the rate. If its best is below tbp's, connections ask for a rate of their own,
and mixers are compared with the best of both. M helps at all only if tbp or tbp_slow at its best
rate is below residual at its own (95 % interval of the paired difference).
Added after five seeds of residual, tbp_slow and hc at .008: hc_slow and identity_slow, since slow
connections may suit every mixer. If hc_slow's best is below hc's, the constraint costs hc_slow's
lead over tbp_slow instead, and a quarter becomes the default rate of connections if it is better or
as good (paired interval) for each of tbp, identity and hc."""

files = ["config/laptop.py", "config/deep.py"]
seeds = 5
sweep = {"learning_rate": [4e-3, 8e-3, 2e-3, 16e-3, 1e-3]}
references = ["residual", "tbp", "tbp_slow"]
arms = {
    "residual": {"mixer": "residual", "n_streams": 1},
    "tbp": {"mixer": "tbp"},
    "hc": {"mixer": "hc"},
    "identity": {"mixer": "identity"},
    "residual_scale": {"mixer": "residual", "n_streams": 1, "mix_scale": "sublayer"},
    "orthogonal_scale": {"mixer": "orthogonal", "mix_scale": "sublayer"},
    "tbp_slow": {"mixer": "tbp", "connection_lr": 0.25},
    "hc_slow": {"mixer": "hc", "connection_lr": 0.25},
    "identity_slow": {"mixer": "identity", "connection_lr": 0.25},
    "tbp_fast": {"mixer": "tbp", "connection_lr": 4.0},
}
