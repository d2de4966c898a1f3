# Where training starts with more than 4 streams: 6 layers of 64 channels, 8 and 16 streams.
# python prepare_data.py && python study.py config/studies/start_many.py --jobs=2
question = "Beyond 4 streams, does a start near I hold a chart back?"
decision = """\
Fits of random matrices say so (LOG.md: after 200 steps from mix_start .01 a chart ends far from its
target at n >= 16, and from the uniform matrix near it). For n = 8 and for n = 16: if an arm with
another mix_start is below the one at .01 (95 % interval of the paired difference), the default of
mix_start becomes a function of n that gives the best of these values at n = 8 and 16, and that of
config/studies/start.py at n = 4. If every interval holds 0, it stays a number. sinkhorn shows
whether the start matters to a mixer that can leave it. All arms have the rates that suited tbp in
config/studies/rates.py."""
references = ["n_8", "n_16"]

files = ["config/laptop.py", "config/deep.py"]
knobs = {"n_layer": 6, "connection_lr": 0.25}
seeds = 5
arms = {
    "n_8": {"mixer": "tbp", "n_streams": 8},
    "n_8_start_.4": {"mixer": "tbp", "n_streams": 8, "mix_start": 0.4},
    "n_16": {"mixer": "tbp", "n_streams": 16},
    "n_16_start_.4": {"mixer": "tbp", "n_streams": 16, "mix_start": 0.4},
    "n_8_start_.9": {"mixer": "tbp", "n_streams": 8, "mix_start": 0.9},
    "n_8_start_.1": {"mixer": "tbp", "n_streams": 8, "mix_start": 0.1},
    "n_16_start_.1": {"mixer": "tbp", "n_streams": 16, "mix_start": 0.1},
    "sinkhorn_8": {"mixer": "sinkhorn", "n_streams": 8},
    "sinkhorn_8_start_.4": {"mixer": "sinkhorn", "n_streams": 8, "mix_start": 0.4},
}
