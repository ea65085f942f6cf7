"""Simulated coarse masks that fail as networks do."""

from ultrarefiner.data.failures.simulator import BINS, FailureSimulator, fit_bins, simulate_failure

__all__ = ["BINS", "FailureSimulator", "fit_bins", "simulate_failure"]
