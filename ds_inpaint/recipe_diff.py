"""In which keys two recipes differ once every default is filled in."""

from __future__ import annotations

from dataclasses import dataclass

from ds_inpaint import schema, yaml_tree
from ds_inpaint.recipe import Recipe
from ds_inpaint.schema import Loaded


@dataclass(frozen=True)
class Difference:
    """One key that two recipes do not agree on.

    Attributes:
        key: such as ``optimizer.learning_rate``.
        before: its value as YAML on one line; None if the first recipe has no such key, as that of another sampler.
        after: the same of the second recipe.
    """

    key: str
    before: str | None
    after: str | None


def differences(before: Recipe, after: Recipe) -> list[Difference]:
    """Every key that differs, section by section; the keys that both have come first."""
    one, other = _values(before), _values(after)
    order = {section: place for place, section in enumerate(schema.plain(before))}
    keys = sorted(one | other, key=lambda key: order[key.partition(".")[0]])
    return [Difference(key, one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)]


def diff(before: Loaded[Recipe], after: Loaded[Recipe]) -> str:
    """For people: a line ``key: A -> B`` for each difference, with the place that each value comes from."""
    here, there = ({each.key: each.origin for each in loaded.origins()} for loaded in (before, after))
    lines = []
    for each in differences(before.value, after.value):
        one = "absent" if each.before is None else f"{each.before} ({here[each.key]})"
        other = "absent" if each.after is None else f"{each.after} ({there[each.key]})"
        lines.append(f"{each.key}: {one} -> {other}")
    return "\n".join(lines) or "The recipes are equal, key by key."


def _values(recipe: Recipe) -> dict[str, str]:
    """An empty mapping has no entries to compare, so it is no value."""
    return {key: yaml_tree.inline(value) for key, value in schema.flat(recipe).items() if value != {}}
