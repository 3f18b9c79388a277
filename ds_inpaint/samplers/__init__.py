"""Samplers, one file each; `sampler: {name: ddim}` in a recipe loads `ddim.py`."""
