"""The `cdpo` command."""
