"""The dual function on tables of scores: D(λ), λ*, feasibility, sensitivity."""
