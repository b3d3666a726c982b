"""Turns prompts, a policy and scorers into validated tables. Never imports `constrained_dpo`."""
