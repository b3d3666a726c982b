"""Files that are damaged on purpose."""

import os


def cut(name: str):
    """Cuts a file of a folder off after its first 200 bytes."""
    return lambda folder: os.truncate(folder / name, 200)
