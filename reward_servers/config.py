"""The configuration file of ``python -m reward_servers``: YAML to text values that know where they were written.

    host: 0.0.0.0
    tls_certificate: server.pem
    scorers:
      seam:
      crop_clip: {scorer: clip_score, view: mask_crop}
    limits: {max_queue_items: 1024}

Nothing is constructed from the YAML: its scalars are taken as they are typed, just like flags. The only file here
that imports yaml.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from reward_servers.errors import SetupError, did_you_mean

SCORERS, LIMITS = "scorers", "limits"
NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Written:
    """A value as a person wrote it."""

    where: str
    """``--port``, or ``server.yaml:3: port``."""
    text: str


@dataclass(frozen=True)
class Config:
    """What a configuration file says."""

    options: Mapping[str, Written] = field(default_factory=dict)
    scorers: Mapping[str, Mapping[str, Written]] = field(default_factory=dict)
    """Name for clients to settings, with ``scorer`` among them where the scorer has another name."""
    limits: Mapping[str, Written] = field(default_factory=dict)


def read_config(path: Path, options: Collection[str], limits: Collection[str]) -> Config:
    """Read a configuration file.

    Args:
        path: the file.
        options: the keys it may have, besides ``scorers`` and ``limits``.
        limits: the keys that ``limits`` may have.

    Raises:
        SetupError: the file cannot be read, is no YAML, or has an unknown, repeated or empty key.
    """
    try:
        root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise SetupError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise SetupError(f"The configuration {path} is not YAML: {error}") from error
    keys = _inside(_Entry(path, "", 1, root), [*options, SCORERS, LIMITS])
    scorers = {name: _texts(_inside(entry)) for name, entry in _inside(keys.pop(SCORERS, None)).items()}
    limits_given = _texts(_inside(keys.pop(LIMITS, None), limits))
    return Config(_texts(keys), scorers, limits_given)


@dataclass(frozen=True)
class _Entry:
    path: Path
    key: str
    """Dotted, such as ``scorers.seam``; empty for the whole file."""
    line: int
    node: yaml.Node | None

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}: {self.key}" if self.key else f"The configuration {self.path}"


def _inside(entry: _Entry | None, allowed: Collection[str] | None = None) -> dict[str, _Entry]:
    """The entries of a mapping, none for nothing; any key will do where ``allowed`` is left out."""
    if entry is None or entry.node is None or entry.node.tag == NULL:
        return {}
    if not isinstance(entry.node, yaml.MappingNode):
        raise SetupError(f"{entry.where} must be a mapping of KEY: VALUE, found {_found(entry.node)}.")
    entries: dict[str, _Entry] = {}
    for key, value in entry.node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else _found(key)
        dotted = f"{entry.key}.{name}" if entry.key else name
        inner = _Entry(entry.path, dotted, key.start_mark.line + 1, value)
        if allowed is not None and name not in allowed:
            raise SetupError(
                f"{inner.where} is an unknown key.{did_you_mean(name, allowed)} Allowed here: {', '.join(allowed)}."
            )
        if name in entries:
            raise SetupError(f"{inner.where} is there twice. Keep one.")
        entries[name] = inner
    return entries


def _texts(entries: Mapping[str, _Entry]) -> dict[str, Written]:
    return {name: _text(entry) for name, entry in entries.items()}


def _text(entry: _Entry) -> Written:
    if not isinstance(entry.node, yaml.ScalarNode):
        raise SetupError(f"{entry.where} must be a single value, found {_found(entry.node)}.")
    if entry.node.tag == NULL:
        raise SetupError(f"{entry.where} has no value. Give one, or leave the key out for its default.")
    return Written(entry.where, entry.node.value)


def _found(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a list"
