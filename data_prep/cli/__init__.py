"""The commands of `data-prep`, which are `cdpo data` too."""
