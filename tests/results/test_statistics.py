"""Statistics over cases against numpy and scipy written out, and whether intervals hold what they promise."""

import numpy as np
import pytest
from scipy import stats

from ultrarefiner.results import statistics
from ultrarefiner.results.statistics import Value, paired, values


def simulated(seed: int, patients: int, effect: float = 0.0) -> list[dict]:
    """Cases of patients with one to four images, whose differences go together."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        shift = rng.normal(effect, 0.05)
        for image in range(rng.integers(1, 5)):
            coarse = rng.uniform(0.6, 0.9)
            refined = coarse + shift + rng.normal(0, 0.01)
            rows.append({"dataset": "d", "patient": f"p{patient}", "id": f"{patient}-{image}"})
            rows[-1] |= {"coarse_dice": str(coarse), "refined_dice": str(refined)}
    return rows


def compare(rows: list[dict], **more) -> statistics.Paired:
    return paired(values(rows, "coarse_dice"), values(rows, "refined_dice"), **more)


def test_paired_equals_its_definition():
    rows = simulated(3, 60, 0.02)
    change = np.array([float(row["refined_dice"]) - float(row["coarse_dice"]) for row in rows])
    patient = np.array([row["patient"] for row in rows])
    found = compare(rows)
    assert (found.cases, found.patients, found.left_out) == (len(rows), 60, 0)
    assert found.mean == pytest.approx(change.mean()) and found.median == pytest.approx(np.median(change))
    assert found.worse == np.mean(change < -0.01) and found.better == np.mean(change > 0.01)
    means = [change[patient == name].mean() for name in np.unique(patient)]
    assert found.p == pytest.approx(stats.wilcoxon(means).pvalue)
    # An independent bootstrap, one patient after the other.
    rng = np.random.default_rng(9)
    blocks = [change[patient == name] for name in np.unique(patient)]
    drawn = [np.concatenate([blocks[i] for i in rng.integers(0, 60, 60)]).mean() for _ in range(3000)]
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.002)


def test_for_distances_less_is_better():
    before = {("d", str(i)): Value(i, 10.0) for i in range(4)}
    after = {("d", str(i)): Value(i, v) for i, v in enumerate((7.0, 9.5, 10.5, 20.0))}
    found = paired(before, after, margin=1, higher_is_better=False)
    assert (found.worse, found.better, found.mean) == (0.25, 0.25, 1.75)


def test_settings_are_compared_on_the_cases_that_both_have():
    one = {("d", name): Value(name, 0.5) for name in "abc"}
    other = {("d", name): Value(name, 0.7) for name in "bcde"}
    found = paired(one, other)
    assert (found.cases, found.left_out) == (2, 3) and found.mean == pytest.approx(0.2)
    nothing = paired(one, {})
    assert (nothing.cases, nothing.left_out) == (0, 3) and np.isnan(nothing.p)


def test_the_same_id_in_two_data_sets_is_two_cases_of_two_patients():
    rows = [{"dataset": d, "id": "1", "patient": "1", "dice": v} for d, v in (("a", 0.2), ("b", 0.4), ("b", 0.6))]
    found = values(rows, "dice")
    assert {case: value.value for case, value in found.items()} == {("a", "1"): 0.2, ("b", "1"): 0.5}
    assert len({value.patient for value in found.values()}) == 2


def test_what_is_not_defined_is_left_out():
    rows = [{"dataset": "d", "id": str(i), "patient": None, "dice": v} for i, v in enumerate(("0.5", "", "nan", 0.7))]
    assert statistics.over_cases(rows, "dice")[:3] == (2, pytest.approx(0.6), pytest.approx(0.6))
    assert statistics.over_cases(rows[1:3], "dice").cases == 0


def coverage(alone: bool, runs: int, patients: int = 60) -> float:
    """How often the interval of simulated data holds the true difference, 0.02."""
    inside = 0
    for seed in range(runs):
        rows = simulated(seed, patients, 0.02)
        if alone:  # as if each image were a patient
            rows = [row | {"patient": ""} for row in rows]
        found = compare(rows)
        inside += found.low <= 0.02 <= found.high
    return inside / runs


def test_intervals_hold_what_they_promise_and_would_not_if_images_were_drawn():
    assert 0.915 <= coverage(alone=False, runs=300) <= 0.98  # 95 %, with the chance of 300 runs
    assert coverage(alone=True, runs=150) < 0.88


def test_p_is_uniform_where_nothing_changed():
    p = np.array([compare(simulated(seed, 40)).p for seed in range(150)])
    assert stats.kstest(p, "uniform").pvalue > 0.001
    assert np.mean([compare(simulated(seed, 40, 0.03)).p < 0.05 for seed in range(30)]) > 0.8


def test_wilcoxon_without_any_change():
    assert statistics.wilcoxon(np.zeros(5)) == 1.0
    assert statistics.wilcoxon(np.array([0.0, 0.1, 0.2, 0.3])) == stats.wilcoxon([0.1, 0.2, 0.3]).pvalue


def test_holm():
    # Worked by hand: 0.005·4, 0.01·3, max(0.03, 0.03·2), max(0.06, 0.04·1).
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.6]) == [1.0, 1.0] and statistics.holm([]) == []
    with_gap = statistics.holm([0.01, float("nan"), 0.03])
    assert with_gap[0::2] == pytest.approx([0.02, 0.03]) and np.isnan(with_gap[1])


def test_holm_rejects_what_the_steps_reject():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.random(rng.integers(1, 9)) ** 3
        rejected, alive = set(), True
        for step, i in enumerate(np.argsort(p)):
            alive = alive and p[i] <= 0.05 / (len(p) - step)
            if alive:
                rejected.add(i)
        assert {i for i, q in enumerate(statistics.holm(list(p))) if q <= 0.05} == rejected


def test_groups_and_terciles():
    rows = [{"label": name, "lesion_px": str(px)} for name, px in zip("bab ", (0, 10, 20, 30), strict=True)]
    rows += [{"label": None, "lesion_px": "40"}, {"label": "a", "lesion_px": "50"}, {"lesion_px": ""}]
    assert {name: len(some) for name, some in statistics.groups(rows, "label").items()} == {" ": 1, "a": 2, "b": 2}
    rows += [{"lesion_px": "60"}]
    sizes = {name: [row["lesion_px"] for row in some] for name, some in statistics.terciles(rows).items()}
    assert sizes == {"small": ["10", "20"], "medium": ["30", "40"], "large": ["50", "60"]}
    assert statistics.terciles(rows[:1]) == {}


def runs_of(*values_of: list[float], metric: str = "refined_dice") -> list[list[dict]]:
    """Rows of several runs, two cases of each patient."""
    return [
        [{"dataset": "d", "id": f"{r}-{i}", "patient": f"{r}-{i // 2}", metric: value} for i, value in enumerate(some)]
        for r, some in enumerate(values_of)
    ]


def test_over_runs_is_over_their_means_and_over_all_cases():
    some = [[0.8, 0.9, 0.7, 0.6], [0.5, 0.9]]
    runs = [*runs_of(*some), [{"dataset": "d", "id": "x", "patient": "", "coarse_dice": 1.0}]]
    found = statistics.over_runs(runs, "refined_dice")
    means = [np.mean(values) for values in some]
    assert (found["runs"], found["cases"]) == (2, 6)
    np.testing.assert_allclose([found["mean"], found["sd"]], [np.mean(means), np.std(means, ddof=1)])
    np.testing.assert_allclose([found["case_mean"], found["case_median"]], [np.mean(np.hstack(some)), 0.75])
    assert statistics.over_runs(runs, "other")["runs"] == 0


@pytest.mark.parametrize(("metric", "better"), [("dice", 2 / 3), ("hd95", 1 / 3)])
def test_change_knows_distances(metric, better):
    rows = [
        {"dataset": "d", "id": str(i), "patient": str(i), f"coarse_{metric}": a, f"refined_{metric}": b}
        for i, (a, b) in enumerate([(5.0, 8.0), (5.0, 5.5), (5.0, 2.0)])
    ]
    found = statistics.change(rows, f"coarse_{metric}", f"refined_{metric}")  # a distance of 0.5 px is no change
    assert found.better == pytest.approx(better) and found.mean == pytest.approx(1 / 6)


def test_breakdowns_leave_out_what_tells_nothing_apart():
    rows = [{"lesion_px": 10 * i, "label": "ab"[i % 2], "device": "one", "empty": ""} for i in range(1, 7)]
    found = statistics.breakdowns(rows, ("label", "device", "empty"))
    assert {name: {k: len(v) for k, v in some.items()} for name, some in found.items()} == {
        "size": {"small": 2, "medium": 2, "large": 2},
        "label": {"a": 3, "b": 3},
    }
    assert statistics.breakdowns([{"label": "a"}, {"label": "b"}], ("label",)).keys() == {"label"}
