"""The constrained problem and its solution: dual, fit, re-scoring, rounds. Uses `data_prep`."""
