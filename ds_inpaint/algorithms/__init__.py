"""Training algorithms, one file each; `algorithm: {name: grpo}` in a recipe loads `grpo.py`."""
