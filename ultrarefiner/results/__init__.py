"""What came out of a run, from plain data: metrics, statistics, tables and pictures."""
