# A factor of the embedding, where config/studies/constraint.py found that much of the free M's lead
# is one: 24 layers of 64 channels.
# python prepare_data.py && python study.py config/studies/embedding.py --jobs=2
question = (
    "At the best factor of the embedding, what is left of the free M's lead over the exact one?"
)
decision = """\
Each arm counts at its own best factor. The lead is that of hc over tbp there, if the 95 % interval
of their paired difference leaves out 0. A best factor at the edge of the grid decides nothing: the
grid is widened, for all arms, and run again. The factor that is best for residual becomes what
other studies compare with, if it earns more there than tbp does without one."""

files = ["config/laptop.py", "config/deep.py"]
# The rate of its runs; config/studies/rates.py found a better one later.
knobs = {"learning_rate": 2e-3, "min_lr": 2e-4}
seeds = 5
sweep = {"embed_scale": [24.0, 64.0, 8.0, 1.0]}
references = ["residual", "tbp"]
arms = {
    "residual": {"mixer": "residual", "n_streams": 1},
    "tbp": {"mixer": "tbp"},
    "hc": {"mixer": "hc"},
}
