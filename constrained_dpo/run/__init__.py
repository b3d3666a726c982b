"""A run: its folder, its rounds, where it stands."""
