"""Pseudo-preferences: scores under λ, pairs and groups, the pool they are drawn from."""
