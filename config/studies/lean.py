# What the coefficients must see, deep and thin: 24 layers of 64 channels, bytes.
# python prepare_data.py && python study.py config/studies/lean.py --jobs=2
# --n_layer=4 --n_head=4 --n_embd=128 --name=lean-shallow for a shallow model.
question = "Does a form that moves fewer bytes learn as well as the faithful one?"
decision = """\
A lean form is as good as tbp if the 95 % interval of their paired difference lies within .01 of 0,
and worse if it leaves out 0 on the upper side. The ends of the scale are tbp, whose coefficients
see all streams, and identity. tbp_ends separates what a learned read-out and a learned start of the
streams earn, since every lean form has the former. tbp_lean_fast separates what coefficients see
from how fast they learn: phi with n times fewer columns moves its logits n times less a step.
Added after config/studies/constraint.py: a number a sublayer (tbp_lean_scale,
orthogonal_lean_scale) may not need what the coefficients of M need. Such a form is as good as its
faithful one, in that study, by the same rule.
Added after config/studies/rates.py, where .002 was far too low, tbp was best at .004, and tbp_slow,
whose connections learn at a quarter of the rate, was as good at .008: each arm counts at the best
of its rates, and is compared with tbp_slow. phi of a lean form has n times fewer columns, so its
logits are slower already, and tbp_lean may not need a lower rate for them.
identity and hc are judged in the same way, identity with slow connections and hc with fast ones, as
each was best in config/studies/rates.py: their lean forms against the faithful ones.
Added after seed 1 of the shallow model at .004 and .008, where hc was behind and tbp_slow broke at
the higher one: a rate of .001, for a wider model learns best at a lower rate.
Added after config/studies/mixers.py, where slow connections were better for hc in that model:
hc_slow and hc_lean_slow. There hc is judged by the better of its two.
Left out after five seeds of tbp_lean_slow, which lost nothing: arms whose coefficients saw the mean
of the streams, or shares of each, beside u or instead of it. There was nothing for them to win."""
references = ["residual", "tbp_slow"]

files = ["config/laptop.py", "config/deep.py"]
seeds = 5
sweep = {"learning_rate": [8e-3, 4e-3, 2e-3, 1e-3]}

_lean = {"sees": "input", "readout": "learned"}
arms = {
    "residual": {"mixer": "residual", "n_streams": 1},
    "tbp_slow": {"mixer": "tbp", "connection_lr": 0.25},
    "tbp": {"mixer": "tbp"},
    "tbp_lean": {"mixer": "tbp", **_lean},
    "tbp_lean_slow": {"mixer": "tbp", **_lean, "connection_lr": 0.25},
    "tbp_lean_fast": {"mixer": "tbp", **_lean, "connection_lr": 4.0},
    "tbp_lean_scale": {"mixer": "tbp", **_lean, "mix_scale": "sublayer"},
    "orthogonal_lean_scale": {"mixer": "orthogonal", **_lean, "mix_scale": "sublayer"},
    "tbp_lean_block": {"mixer": "tbp", "wraps": "block", **_lean},
    "tbp_block": {"mixer": "tbp", "wraps": "block"},
    "tbp_ends": {"mixer": "tbp", "readout": "learned", "stream_start": "learned"},
    "identity": {"mixer": "identity"},
    "identity_slow": {"mixer": "identity", "connection_lr": 0.25},
    "identity_lean_slow": {"mixer": "identity", **_lean, "connection_lr": 0.25},
    "hc": {"mixer": "hc"},
    "hc_lean": {"mixer": "hc", **_lean},
    "hc_slow": {"mixer": "hc", "connection_lr": 0.25},
    "hc_lean_slow": {"mixer": "hc", **_lean, "connection_lr": 0.25},
}
