"""Simulated coarse masks that fail as networks do."""

from ultrarefiner.data.failures.simulator import BINS, FailureSimulator, simulate_failure

__all__ = ["BINS", "FailureSimulator", "simulate_failure"]
