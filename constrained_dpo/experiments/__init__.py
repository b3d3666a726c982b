"""Several runs: sweeps, comparisons, pre-alignment."""
