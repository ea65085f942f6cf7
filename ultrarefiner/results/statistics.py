"""Numbers over runs and cases: means with intervals that know of patients, paired differences, and their tests."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ultrarefiner.files import number

RESAMPLES = 2000
MARGIN = 0.01
"""A case is worse or better if its Dice changed by more than this."""

Row = Mapping[str, Any]


class Value(NamedTuple):
    """One metric of one case, and whose image it is."""

    patient: Hashable
    value: float


Values = dict[tuple[str, str], Value]
"""(dataset, id) -> value."""


class OverCases(NamedTuple):
    """One metric over test cases; `low` and `high` bound the mean with 95 % confidence."""

    cases: int
    mean: float
    median: float
    low: float
    high: float


class Paired(NamedTuple):
    """The difference after − before over the same cases.

    Attributes:
        cases, patients: that have both values.
        left_out: cases that have one of them.
        mean, median: of the differences of the cases.
        low, high: bound the mean with 95 % confidence.
        p: of Wilcoxon's signed-rank test, two-sided, over the patients' mean differences.
        worse, better: shares of cases that changed by more than the margin, in [0, 1].
    """

    cases: int
    patients: int
    left_out: int
    mean: float
    median: float
    low: float
    high: float
    p: float
    worse: float
    better: float


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n − 1); NaN where there are too few values for them."""
    if not values:
        return math.nan, math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def values(rows: Iterable[Row], metric: str) -> Values:
    """A metric of each case in the rows of one or several cases.csv.

    A case that was tested in several runs (of several seeds) counts once, with its mean. Rows in which the metric is
    blank or NaN, because it is not defined (both masks are empty), are left out.

    Args:
        rows: with "dataset", "id", "patient" (blank where unknown: then each case counts as a patient) and the metric.
        metric: a column, such as "refined_dice".
    """
    found: dict[tuple[str, str], list[float]] = {}
    patients: dict[tuple[str, str], Hashable] = {}
    for row in rows:
        value, case = number(row[metric]), (row["dataset"], row["id"])
        if not math.isnan(value):
            found.setdefault(case, []).append(value)
            patients[case] = (row["dataset"], row["patient"]) if row.get("patient") else case
    return {case: Value(patients[case], float(np.mean(some))) for case, some in found.items()}


def over_cases(rows: Iterable[Row], metric: str, seed: int = 0, intervals: bool = True) -> OverCases:
    """A metric over the cases of `values`.

    The interval is a percentile bootstrap that draws whole patients: images of one patient are no independent evidence.

    Args:
        rows: see `values`.
        metric: see `values`.
        seed: of the resampling.
        intervals: False leaves `low` and `high` NaN, which is much quicker.
    """
    cases = list(values(rows, metric).values())
    if not cases:
        return OverCases(0, *[math.nan] * 4)
    numbers = np.array([case.value for case in cases])
    low, high = _interval(*_by_patient(cases), seed) if intervals else (math.nan, math.nan)
    return OverCases(len(cases), float(numbers.mean()), float(np.median(numbers)), low, high)


def over_runs(runs: Iterable[Iterable[Row]], metric: str) -> dict[str, float]:
    """A metric of several runs of one setting.

    Args:
        runs: the rows of each run's cases; those that did not measure it do not count.
        metric: see `values`.

    Returns:
        "runs": how many; "mean" and "sd" of their means; "cases", "case_mean", "case_median", "case_low" and
        "case_high" of all their cases together, see `over_cases`.
    """
    measured = [list(rows) for rows in runs]
    measured = [rows for rows in measured if rows and metric in rows[0]]
    means = [over_cases(rows, metric, intervals=False).mean for rows in measured]
    mean, sd = mean_sd([value for value in means if not math.isnan(value)])
    over = over_cases([row for rows in measured for row in rows], metric)
    named = {"case_mean": over.mean, "case_median": over.median, "case_low": over.low, "case_high": over.high}
    return {"runs": len(measured), "mean": mean, "sd": sd, "cases": over.cases} | named


def paired(
    before: Values, after: Values, margin: float = MARGIN, higher_is_better: bool = True, seed: int = 0
) -> Paired:
    """What changed from one mask to another, or from one setting to another, over the cases that both have.

    Of one run, refined − coarse: ``paired(values(rows, "coarse_dice"), values(rows, "refined_dice"))``; of two runs the
    same metric of their rows.

    Args:
        before, after: see `values`.
        margin: how much a case must change to be called worse or better, in the unit of the metric.
        higher_is_better: false for distances.
        seed: of the resampling.
    """
    both = [case for case in before if case in after]
    left_out = len(before.keys() ^ after.keys())
    if not both:
        return Paired(0, 0, left_out, *[math.nan] * 7)
    cases = [Value(after[case].patient, after[case].value - before[case].value) for case in both]
    change = np.array([case.value for case in cases])
    sums, counts = _by_patient(cases)
    low, high = _interval(sums, counts, seed)
    gain = change if higher_is_better else -change
    return Paired(
        cases=len(both),
        patients=len(sums),
        left_out=left_out,
        mean=float(change.mean()),
        median=float(np.median(change)),
        low=low,
        high=high,
        p=wilcoxon(sums / counts),
        worse=float((gain < -margin).mean()),
        better=float((gain > margin).mean()),
    )


def change(rows: Iterable[Row], before: str, after: str) -> Paired:
    """`paired` of two columns of the same rows, such as "coarse_dice" and "refined_dice"; a distance's margin is 1."""
    rows = list(rows)
    distance = "_hd95" in after or "_assd" in after
    margin = 1.0 if distance else MARGIN
    return paired(values(rows, before), values(rows, after), margin, higher_is_better=not distance)


def wilcoxon(differences: Float[np.ndarray, " n"]) -> float:
    """Two-sided p of the signed-rank test; differences of 0 say nothing and are dropped, and none at all is p = 1."""
    from scipy import stats

    differences = differences[differences != 0]
    return float(stats.wilcoxon(differences).pvalue) if differences.size else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Each p corrected for there being several (Holm 1979); NaN stays NaN and does not count."""
    corrected = np.array(p, dtype=float)
    order = np.argsort(corrected)[: np.count_nonzero(~np.isnan(corrected))]  # NaN are sorted to the end
    corrected[order] = np.minimum(np.maximum.accumulate(corrected[order] * np.arange(len(order), 0, -1)), 1)
    return [float(value) for value in corrected]


def groups(rows: Iterable[Row], column: str) -> dict[str, list[Row]]:
    """The rows by what stands in a column, such as "label" or "device", in alphabetical order; without the blank."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row.get(column) or ""), []).append(row)
    return {name: found[name] for name in sorted(found) if name}


def terciles(rows: Iterable[Row], column: str = "lesion_px") -> dict[str, list[Row]]:
    """The rows by the size of their lesion, "small", "medium" and "large", a third each; without normal images."""
    sized = [(number(row[column]), row) for row in rows if number(row[column]) > 0]
    if not sized:
        return {}
    bounds = np.quantile([size for size, _ in sized], [1 / 3, 2 / 3])
    names = ("small", "medium", "large")
    found: dict[str, list[Row]] = {name: [] for name in names}
    for size, row in sized:
        found[names[int(np.searchsorted(bounds, size))]].append(row)
    return found


def breakdowns(rows: Iterable[Row], columns: Iterable[str]) -> dict[str, dict[str, list[Row]]]:
    """column → group → its rows: "size" (`terciles`), and each of some columns that tells at least two groups apart."""
    rows = list(rows)
    found = {"size": terciles(rows) if rows and "lesion_px" in rows[0] else {}}
    found |= {column: groups(rows, column) for column in columns}
    return {column: some for column, some in found.items() if len(some) > 1}


def _by_patient(cases: Sequence[Value]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The sum of the values of each patient, and how many there are."""
    position = {patient: i for i, patient in enumerate(dict.fromkeys(case.patient for case in cases))}
    where = [position[case.patient] for case in cases]
    return np.bincount(where, [case.value for case in cases]), np.bincount(where).astype(float)


def _interval(sums: Float[np.ndarray, " n"], counts: Float[np.ndarray, " n"], seed: int) -> tuple[float, float]:
    """95 % of the means of resampled patients."""
    drawn = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)
