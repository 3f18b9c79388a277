"""How scorers become one utility, one file each; `combine: {name: caen}` in a recipe's rewards loads `caen.py`."""
