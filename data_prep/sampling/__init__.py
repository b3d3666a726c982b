"""Responses of a policy and their log-probabilities."""
