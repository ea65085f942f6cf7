"""Numbers over several runs: means over folds, and over all test cases with intervals that know of patients."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class OverCases(NamedTuple):
    """One metric over test cases; `low` and `high` bound the mean with 95 % confidence."""

    cases: int
    mean: float
    median: float
    low: float
    high: float


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n − 1); NaN where there are too few values for them."""
    if not values:
        return math.nan, math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def over_cases(rows: Iterable[Mapping[str, str]], metric: str, seed: int = 0) -> OverCases:
    """A metric over the rows of one or several cases.csv.

    A case that was tested in several runs (of several seeds) counts once, with its mean. The interval is a percentile
    bootstrap that draws whole patients: images of one patient are no independent evidence.

    Args:
        rows: of cases.csv, with "dataset", "id", "patient" and the metric.
        metric: a column, such as "refined_dice".
        seed: of the resampling.
    """
    values: dict[tuple[str, str], list[float]] = {}
    patients: dict[tuple[str, str], Hashable] = {}
    for row in rows:
        case = (row["dataset"], row["id"])
        values.setdefault(case, []).append(float(row[metric]))
        patients[case] = (row["dataset"], row["patient"]) if row["patient"] else case
    if not values:
        return OverCases(0, *[math.nan] * 4)
    means = {case: float(np.mean(found)) for case, found in values.items()}
    position = {patient: i for i, patient in enumerate(dict.fromkeys(patients.values()))}
    sums, counts = np.zeros(len(position)), np.zeros(len(position))
    for case, value in means.items():
        sums[position[patients[case]]] += value
        counts[position[patients[case]]] += 1
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [0.025, 0.975])
    found = list(means.values())
    return OverCases(len(found), float(np.mean(found)), float(np.median(found)), float(low), float(high))
