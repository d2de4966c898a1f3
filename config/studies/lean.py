# What the coefficients must see, deep and thin: 24 layers of 64 channels, bytes.
# python prepare_data.py && python study.py config/studies/lean.py --jobs=2
question = "Does a form that moves fewer bytes learn as well as the faithful one?"
decision = """\
A lean form is as good as tbp if the 95 % interval of their paired difference lies within .01 of 0,
and worse if it leaves out 0 on the upper side. The ends of the scale are tbp, whose coefficients
see all streams, and identity. tbp_ends separates what a learned read-out and a learned start of the
streams earn, since every lean form has the former."""
references = ["residual", "tbp"]

files = ["config/laptop.py", "config/deep.py"]
seeds = 5

_lean = {"sees": "input", "readout": "learned"}
arms = {
    "residual": {"mixer": "residual", "n_streams": 1},
    "tbp": {"mixer": "tbp"},
    "tbp_lean": {"mixer": "tbp", **_lean},
    "tbp_lean_block": {"mixer": "tbp", "wraps": "block", **_lean},
    "tbp_block": {"mixer": "tbp", "wraps": "block"},
    "tbp_ends": {"mixer": "tbp", "readout": "learned", "stream_start": "learned"},
    "identity": {"mixer": "identity"},
    "hc": {"mixer": "hc"},
    "hc_lean": {"mixer": "hc", **_lean},
}
