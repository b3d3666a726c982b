"""Prompts: rows of files and datasets, their layouts, the split, templates and tokens."""
