"""Learners: what fits, samples and scores for a run."""
