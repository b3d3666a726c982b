"""A fitted policy judged afresh, and taken away."""
