# Deep and thin: 24 layers of 64 channels, bytes of Python's sources (--dataset=NAME
# --name=constraint-NAME for others). About 7 minutes a run on one thread.
# python prepare_data.py && python study.py config/studies/constraint.py --jobs=2
question = (
    "What does a doubly stochastic M cost against a free one, and what is it in a free M that pays?"
)
decision = """\
The constraint costs something if tbp's loss minus hc's has a 95 % interval above 0 over the five
seeds. A variant between them explains the part of the gap that it closes, if its interval against
tbp leaves out 0: gates (hc_bounded, tbp_free, identity_free), writes without an upper bound while
the composite gain stays 1 (tbp_exp, identity_exp), one number a sublayer or a stream beside an
exact M (tbp_scale, tbp_stream_scale, diagonal), sums of rows or of columns alone (rows, columns),
signs (orthogonal). A mixer helps at all only if it is below residual_wide, which has as many
parameters as tbp, and below residual_scalars, which costs nothing. Intervals that hold 0 are
reported with their bound, not as "the same".
Added after seed 1 of residual, residual_scalars, tbp and hc: hc's first two matrices do little but
scale the embedding up, and the others can be replaced by I. So the embedding times sqrt(C) = 8
(residual_embed, tbp_embed, hc_embed): the free M is worth no more than that factor if the interval
of hc_embed minus tbp_embed lies below half of the gap between tbp and hc.
Added after seed 3 of residual, tbp and hc: tbp_scale closes most of the gap, and a number times an
exact M is that M with smaller or larger writes (LOG.md). So the same number without any mixing
(residual_scale, identity_scale), and beside signs (orthogonal_scale): mixing matters beside the
scale if the interval of tbp_scale minus residual_scale lies below 0, and scale and signs together
explain the free M if the interval of hc minus orthogonal_scale holds 0. Whether that number must
depend on the token (residual_scale_static), and whether it is a larger embedding
(residual_scale_embed), counts against residual_scale in the same way."""

files = ["config/laptop.py", "config/deep.py"]
# The rate of its runs; config/studies/rates.py found a better one later.
knobs = {"learning_rate": 2e-3, "min_lr": 2e-4}
seeds = 5

# residual_wide: a dynamic connection of n = 4 streams of C = 64 channels makes 4 + 4 + 9 numbers
# (read, write, logits of tbp), each from 4 * 64 channels and a bias, and has 3 alphas
_connection = (4 + 4 + 9) * (4 * 64 + 1) + 3  # 4,372 parameters, twice a layer
_n_mlp = 4 * 64 + round(2 * _connection / (2 * 64))  # a hidden unit has 2 * 64 weights: 324

_scale = {"mixer": "residual", "n_streams": 1, "mix_scale": "sublayer"}

references = ["residual", "identity", "tbp", "hc"]
# The most telling arms come first: a study that is cut short has them.
arms = {
    "residual": {"mixer": "residual", "n_streams": 1},
    "hc": {"mixer": "hc"},
    "tbp": {"mixer": "tbp"},
    "identity": {"mixer": "identity"},
    "residual_embed": {"mixer": "residual", "n_streams": 1, "embed_scale": 8.0},
    "hc_embed": {"mixer": "hc", "embed_scale": 8.0},
    "tbp_embed": {"mixer": "tbp", "embed_scale": 8.0},
    "hc_bounded": {"mixer": "hc", "gates": "bounded"},
    "tbp_free": {"mixer": "tbp", "gates": "free"},
    "tbp_scale": {"mixer": "tbp", "mix_scale": "sublayer"},
    "residual_scale": _scale,
    "residual_scale_static": {**_scale, "dynamic": False},
    "residual_scale_embed": {**_scale, "embed_scale": 8.0},
    "identity_scale": {"mixer": "identity", "mix_scale": "sublayer"},
    "orthogonal_scale": {"mixer": "orthogonal", "mix_scale": "sublayer"},
    "tbp_scale_embed": {"mixer": "tbp", "mix_scale": "sublayer", "embed_scale": 8.0},
    "tbp_exp": {"mixer": "tbp", "gates": "exp"},
    "diagonal": {"mixer": "identity", "mix_scale": "stream"},
    "rows": {"mixer": "rows"},
    "columns": {"mixer": "columns"},
    "orthogonal": {"mixer": "orthogonal"},
    "identity_free": {"mixer": "identity", "gates": "free"},
    "identity_exp": {"mixer": "identity", "gates": "exp"},
    "tbp_stream_scale": {"mixer": "tbp", "mix_scale": "stream"},
    "residual_wide": {"mixer": "residual", "n_streams": 1, "n_mlp": _n_mlp},
    "residual_scalars": {"mixer": "residual", "n_streams": 1, "x0_scalars": True},
    "sinkhorn": {"mixer": "sinkhorn"},
    "permutation": {"mixer": "permutation"},
    "kronecker": {"mixer": "kronecker"},
    "rtbp": {"mixer": "rtbp"},
}
