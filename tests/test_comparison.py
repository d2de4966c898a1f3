"""The statistics of paired runs, against published figures and against sums done by hand."""

import csv
import io
import math
import random
import statistics

import pytest

import comparison
import intervals

pytestmark = pytest.mark.quick

REFERENCES = ["residual", "identity"]
# Quantiles of Student's t as printed in statistical tables: degrees of freedom, two-sided level, t
PUBLISHED = [
    (1, 0.95, 12.706),
    (2, 0.95, 4.303),
    (3, 0.95, 3.182),
    (4, 0.95, 2.776),
    (5, 0.95, 2.571),
    (6, 0.95, 2.447),
    (9, 0.95, 2.262),
    (10, 0.95, 2.228),
    (29, 0.95, 2.045),
    (30, 0.95, 2.042),
    (120, 0.95, 1.980),
    (1, 0.99, 63.657),
    (4, 0.99, 4.604),
    (9, 0.99, 3.250),
    (4, 0.80, 1.533),
]


@pytest.mark.parametrize("df, level, t", PUBLISHED)
def test_t_quantiles_are_the_published_ones(df, level, t):
    assert intervals.t_quantile(df, level) == pytest.approx(t, abs=5e-4)


def test_an_interval_is_mean_and_t_times_the_standard_error():
    # mean 2, standard deviation 1, standard error 1 / sqrt(3), t of 2 degrees of freedom 4.3027
    mean, half, n = intervals.interval([1.0, 2.0, 3.0])
    assert (mean, n) == (2.0, 3) and half == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert intervals.interval([0.5]) == (0.5, None, 1)
    assert intervals.interval([]) == (None, None, 0)


def test_95_of_100_intervals_hold_the_truth():
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        mean, half, _ = intervals.interval([draw.gauss(0.3, 2.0) for _ in range(4)])
        held += abs(mean - 0.3) <= half
    assert 0.935 < held / 2000 < 0.965  # three standard errors of the share


@pytest.mark.parametrize(
    "mean, half, leaves_out_0, bound",
    [(-0.002, 0.009, False, 0.011), (-0.010, 0.009, True, 0.019), (-0.002, None, False, None)],
)
def test_an_interval_holds_0_or_leaves_it_out(mean, half, leaves_out_0, bound):
    difference = intervals.Difference(mean, half, 5 if half else 1)
    assert difference.leaves_out_0() == leaves_out_0
    assert difference.bound() == (bound and pytest.approx(bound))


@pytest.mark.parametrize(
    "difference, text",
    [
        ((-0.0571, 0.0105, 5), "**-0.0571 ± 0.0105**"),
        ((-0.0012, 0.0105, 5), "-0.0012 ± 0.0105, within 0.012"),  # .0117, rounded up
        ((0.0012, None, 1), "+0.0012 (one seed)"),
        ((None, None, 0), ""),
    ],
)
def test_differences_are_written_with_what_is_known_of_them(difference, text):
    assert comparison.difference_text(intervals.Difference(*difference)) == text


def test_a_curve_reaches_a_loss_between_two_evaluations():
    curve = [(0, 6.0), (100, 4.0), (200, 3.0)]
    assert comparison.step_at_loss(curve, 5.0) == 50
    assert comparison.step_at_loss(curve, 3.25) == 175
    assert comparison.step_at_loss(curve, 3.0) == 200
    assert comparison.step_at_loss(curve, 7.0) == 0
    assert comparison.step_at_loss(curve, 2.9) is None


def result(arm, seed, losses, ms=10.0, diverged=False, **axes):
    """A run of 200 steps with evaluations at 0, 100 and 200."""
    evaluations = [
        {"step": step, "val": loss, "gain": 1.0, "norm_max": 1.0}
        for step, loss in zip((0, 100, 200), losses)
    ]
    return {
        "arm": arm,
        "axes": axes,
        "seed": seed,
        "diverged": diverged,
        "final_loss": None if diverged else losses[-1],
        "best_loss": min(losses),
        "steps": 200,
        "tokens": 2000,
        "ms_per_step": ms,
        "evaluations": evaluations,
        "provenance": {"commit": "4e260d0", "clean": True, "torch": "2.13.0", "hardware": "a CPU"},
    }


def rows_of(results):
    return list(csv.DictReader(io.StringIO(comparison.table_csv(results, REFERENCES))))


def test_differences_are_paired_by_seed():
    """Seeds differ by 1, arms by -.1, -.2 and -.3: unpaired, nothing would be seen."""
    results = [result("residual", seed, [6, 5, 3.0 + seed]) for seed in (1, 2, 3)]
    results += [result("tbp", seed, [6, 5, 3.0 + seed - seed / 10]) for seed in (1, 2, 3)]
    results += [result("residual", 4, [6, 5, 100.0])]  # has no partner
    row = rows_of(results)[1]
    assert (row["arm"], row["minus_residual_pairs"]) == ("tbp", "3")
    assert float(row["minus_residual"]) == pytest.approx(-0.2)
    assert float(row["minus_residual_half"]) == pytest.approx(
        4.30265 * 0.1 / math.sqrt(3), abs=1e-4
    )
    assert float(row["loss"]) == pytest.approx(statistics.fmean([3.9, 4.8, 5.7]))


def test_speed_up_counts_steps_and_step_time():
    """The arm is at residual's last loss, 4.0, after 150 of 200 steps, each 1.25 times as long."""
    residual, tbp = result("residual", 1, [6, 5, 4.0]), result("tbp", 1, [6, 4.5, 3.5], ms=12.5)
    row = rows_of([residual, tbp])[1]
    assert float(row["speed_up_residual"]) == pytest.approx(200 * 10 / (150 * 12.5))
    # residual was done after 2000 ms, the arm's step 160: its loss is 4.5 - .6 there
    assert float(row["equal_time_residual"]) == pytest.approx(3.9 - 4.0)


def test_a_worse_arm_has_a_speed_up_below_1():
    """Residual is at the arm's last loss, 4.5, after 150 of its 200 steps."""
    residual, tbp = result("residual", 1, [6, 5, 4.0]), result("tbp", 1, [6, 5.5, 4.5])
    row = rows_of([residual, tbp])[1]
    assert float(row["speed_up_residual"]) == pytest.approx(150 / 200)


def test_a_faster_arm_has_its_last_loss_at_equal_time():
    residual, tbp = result("residual", 1, [6, 5, 4.0]), result("tbp", 1, [6, 5, 4.25], ms=5.0)
    assert float(rows_of([residual, tbp])[1]["equal_time_residual"]) == pytest.approx(0.25)


def rates(arm, losses_by_rate):
    return [
        result(
            arm,
            seed,
            [6, 5, 5 if loss is None else loss],
            diverged=loss is None,
            learning_rate=rate,
        )
        for rate, losses in losses_by_rate.items()
        for seed, loss in enumerate(losses, 1)
    ]


@pytest.mark.parametrize(
    "grid, best",
    [
        ({0.001: [4.0, 4.0], 0.002: [3.0, 4.5], 0.004: [4.1, 4.1]}, 0.002),  # by the mean
        (
            {0.001: [4.0, 4.0], 0.002: [3.0, None], 0.004: [4.1, 4.1]},
            0.001,
        ),  # a divergence is worse
        ({0.001: [4.0, 1.0], 0.002: [3.0], 0.004: [4.1, 1.0]}, 0.002),  # by the seed that all have
        # .004 falls out by the first seed, and then .001 by both
        ({0.001: [4.0, 4.6], 0.002: [4.1, 4.1], 0.004: [4.2]}, 0.002),
        ({0.001: [None, None]}, 0.001),
    ],
)
def test_each_arm_is_shown_at_its_best_rate(grid, best):
    points = comparison.gather(rates("tbp", grid))
    (chosen,) = comparison.best_rates(points)
    assert chosen.axes["learning_rate"] == best
    assert comparison.at_edge(chosen, points) == (len(grid) > 1 and best != 0.002)
    marked = [row for row in rows_of(rates("tbp", grid)) if row["best"] == "True"]
    assert len(rows_of(rates("tbp", grid))) == len(grid)
    assert [float(row["learning_rate"]) for row in marked] == [best]


def test_rates_without_a_common_seed_go_by_their_runs():
    few, many = rates("tbp", {0.001: [4.0]}), rates("tbp", {0.002: [None, 5.0, 5.0]})
    (chosen,) = comparison.best_rates(comparison.gather(few + many[1:]))
    assert chosen.axes["learning_rate"] == 0.002


def test_a_best_rate_at_the_edge_of_the_grid_says_so():
    grid = {0.001: [4.0], 0.002: [3.0], 0.004: [3.5]}
    assert "| 0.002 |" in comparison.table_markdown(rates("tbp", grid), REFERENCES)
    grid[0.004] = [2.0]
    assert "| 0.004 (edge) |" in comparison.table_markdown(rates("tbp", grid), REFERENCES)


def test_arms_are_compared_at_their_own_best_rates():
    results = rates("residual", {0.001: [4.0, 4.1], 0.002: [4.2, 4.4]})
    results += rates("tbp", {0.001: [4.3, 4.3], 0.002: [3.9, 4.1]})
    row = next(row for row in rows_of(results) if row["arm"] == "tbp" and row["best"] == "True")
    assert float(row["learning_rate"]) == 0.002
    assert float(row["minus_residual"]) == pytest.approx(-0.05)


def test_a_diverged_run_is_counted_and_has_no_loss():
    results = [result("residual", seed, [6, 5, 4.0]) for seed in (1, 2)]
    results += [result("hc", 1, [6, 5, 3.5]), result("hc", 2, [6, 5, 5], diverged=True)]
    row = rows_of(results)[1]
    assert (row["runs"], row["diverged"], row["loss"]) == ("2", "1", "3.5")
    assert (row["minus_residual"], row["minus_residual_pairs"]) == ("-0.5", "1")
    assert comparison.table_markdown(results, REFERENCES).splitlines()[-1].endswith("| 1 |")


def test_an_arm_without_any_loss_is_in_the_table():
    results = [result("residual", 1, [6, 5, 4.0]), result("hc", 1, [6, 5, 5], diverged=True)]
    assert "| hc | 1 | - |" in comparison.table_markdown(results, REFERENCES)


def test_a_swept_knob_is_compared_at_its_own_value():
    """identity is swept over n_streams as tbp is; residual sets it itself and stands once."""
    results = [result("residual", 1, [6, 5, 4.0])]
    for n, gap in ((2, 0.1), (4, 0.3)):
        results += [result("identity", 1, [6, 5, 4.0 - n / 100], n_streams=n)]
        results += [result("tbp", 1, [6, 5, 4.0 - n / 100 - gap], n_streams=n)]
    tbp = [row for row in rows_of(results) if row["arm"] == "tbp"]
    assert [float(row["minus_identity"]) for row in tbp] == pytest.approx([-0.1, -0.3])
    assert [float(row["minus_residual"]) for row in tbp] == pytest.approx([-0.12, -0.34])
    (residual,) = [row for row in rows_of(results) if row["arm"] == "residual"]
    assert residual["minus_identity"] == ""  # of which of the two?


LINES = [
    {"step": 0, "val": 6.0, "gain": 1.0},
    {"step": 1, "loss": 6.0, "norm": 2.0, "norm_max": 2.0, "skipped": 0, "ms": 9000.0},
    {"step": 2, "loss": 5.8, "norm": 1.0, "norm_max": 3.0, "skipped": 0, "ms": 10.0},
    {"step": 2, "val": 5.0, "gain": 1.5},
    {"step": 3, "loss": 5.5, "norm": None, "norm_max": None, "skipped": 1, "ms": 12.0},
    {"step": 4, "loss": 5.2, "norm": 1.0, "norm_max": 1.0, "skipped": 1, "ms": 500.0},
    {"step": 4, "val": 5.25, "gain": 1.2},
]


def test_what_is_kept_of_a_run():
    kept = comparison.summary(LINES, total_batch_tokens=128, gave_up=False)
    assert (kept["final_loss"], kept["best_loss"], kept["diverged"]) == (5.25, 5.0, False)
    assert (kept["steps"], kept["tokens"], kept["ms_per_step"]) == (4, 512, 12.0)
    assert [e["norm_max"] for e in kept["evaluations"]] == [None, 3.0, 1.0]


@pytest.mark.parametrize("gave_up, last", [(True, 5.25), (False, None)])
def test_a_run_that_was_given_up_or_ends_without_a_finite_loss_diverged(gave_up, last):
    lines = [*LINES[:-1], {"step": 4, "val": last, "gain": None}]
    kept = comparison.summary(lines, total_batch_tokens=128, gave_up=gave_up)
    assert kept["diverged"] and kept["final_loss"] is None and kept["best_loss"] == 5.0


def test_the_columns_of_the_csv_that_gather_many_runs():
    """Three runs, of which one diverged and was cut short, against a reference that is as fast."""
    residual = [result("residual", seed, [6, 5, 4.0], ms=20.0) for seed in (1, 2, 3)]
    tbp = [
        result("tbp", 1, [6, 5, 3.0], ms=10.0),
        result("tbp", 2, [6, 5, 3.5], ms=20.0),
        result("tbp", 3, [6, 5, 5], ms=90.0, diverged=True),
    ]
    tbp[0]["evaluations"][1] |= {"gain": 2.0, "norm_max": 7.0}
    tbp[2] |= {"steps": 100, "tokens": 1000}
    row = rows_of(residual + tbp)[1]
    assert (row["steps"], row["tokens"], row["gain"], row["norm"]) == ("200", "2000", "2.0", "7.0")
    assert float(row["ms_per_step"]) == 20.0  # the median of all three
    assert float(row["loss_std"]) == pytest.approx(0.5 / math.sqrt(2))
    assert float(row["best_loss"]) == pytest.approx(3.25)


def test_the_interval_at_equal_time_is_of_the_losses_at_that_time():
    """The arm takes twice as long for a step: its losses at step 100 count."""
    residual = [result("residual", seed, [6, 5, 4.0]) for seed in (1, 2)]
    tbp = [result("tbp", 1, [6, 5.0, 4.0], ms=20.0), result("tbp", 2, [6, 5.2, 4.0], ms=20.0)]
    row = rows_of(residual + tbp)[1]
    assert float(row["equal_time_residual"]) == pytest.approx(1.1)
    half = 12.7062 * 0.1  # t of 1 degree of freedom, and the standard error
    assert float(row["equal_time_residual_half"]) == pytest.approx(half, abs=1e-4)
    assert float(row["minus_residual_half"]) == 0


def test_the_speed_up_is_of_the_paired_seeds_at_the_steps_that_all_have():
    """Seed 3 of residual has no partner, and seed 2 of the arm one loss that was not finite."""
    residual = [result("residual", seed, [6, 5, 4.0]) for seed in (1, 2)]
    residual.append(result("residual", 3, [6, 1, 1.0]))
    tbp = [result("tbp", seed, [6, 4.0, 3.0]) for seed in (1, 2)]
    tbp[1]["evaluations"][1]["val"] = None
    row = rows_of(residual + tbp)[1]
    # 6 at step 0 and 3 at step 200 are left of the arm's curve: it is at 4.0 after two thirds
    assert float(row["speed_up_residual"]) == pytest.approx(200 / (200 * 2 / 3))


def test_columns_of_time_stand_only_beside_residual():
    results = [result(arm, 1, [6, 5, 4.0]) for arm in ("identity", "tbp")]
    assert "| - identity | ms a step |" in comparison.table_markdown(results, REFERENCES)
    results.append(result("residual", 1, [6, 5, 4.0]))
    assert (
        "| - residual | - identity | equal time | speed-up | ms a step |"
        in comparison.table_markdown(results, REFERENCES)
    )
