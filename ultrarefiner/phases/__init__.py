"""The three training phases, their losses, protection and metrics."""
