"""The JSON Schema of recipes, which makes editors complete and check their keys; ``json_schema.py`` says how.

    python -m ds_inpaint.recipe_schema [FILE]

FILE is where to write it; without one, ``recipes/schema.json``, which the shipped recipes name in their first line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ds_inpaint.json_schema import Json, json_schema
from ds_inpaint.recipe import Recipe


def recipe_schema() -> Json:
    """The schema of a recipe; equal on every machine."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Recipe of ds_inpaint",
        **json_schema(Recipe),
    }


def text() -> str:
    """The schema as its file holds it."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "recipes/schema.json")
    target.write_text(text(), encoding="utf-8")
    print(target)
