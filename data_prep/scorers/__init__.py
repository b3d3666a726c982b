"""Scorers: what judges a response, and what is known of its judgement."""
