"""What ``python -m reward_servers`` can be told, by flags and by a configuration file; each option is declared once.

The field ``metrics_port`` is the flag ``--metrics-port`` and the key ``metrics_port`` of the file. Flags win.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from reward_servers.config import Config, Written, read_config
from reward_servers.errors import SetupError
from reward_servers.limits import Limits

SERVED_NAME = re.compile(r"[A-Za-z0-9_-]+")


def option(default: Any, doc: str, *, at_least: float = 0, at_most: float = math.inf) -> Any:
    """Declare an option; the range is that of a number."""
    return field(default=default, metadata={"doc": doc, "at_least": at_least, "at_most": at_most})


@dataclass(frozen=True)
class Choice:
    """A scorer to serve."""

    scorer: str
    """Name of its file."""
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Options:
    """Everything the server is told."""

    scorers: Mapping[str, Choice]
    """By the name that clients use; at least one."""
    limits: Limits
    scorers_from: Path | None = option(None, "look for scorers in this folder too")
    device: str = option("cpu", "where scorers compute: cpu, cuda or cuda:N")
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(50051, "port to listen on, 0 for a free one", at_most=65535)
    tls_certificate: Path | None = option(None, "PEM of this server's certificate and those between it and a root")
    tls_key: Path | None = option(None, "PEM of its private key")
    tls_client_ca: Path | None = option(None, "PEM of the roots that must have signed a client's certificate")
    token_file: Path | None = option(None, "file with the bearer token that clients must send, with health checks too")
    insecure: bool = option(False, "let other machines connect without encryption or without a proof of who they are")
    reflection: bool = option(False, "describe the service to tools such as grpcurl; not with TLS")
    metrics_port: int | None = option(
        None, "serve Prometheus metrics on 127.0.0.1 and this port, 0 for a free one", at_most=65535
    )
    grace_seconds: float = option(10.0, "time for requests to finish when the server is stopped", at_most=3600)
    exit_with_parent: bool = option(False, "stop when stdin closes, as when the parent dies")
    log_json: bool = option(False, "log one JSON object a line")


KEYS = {entry.name: entry for entry in dataclasses.fields(Options) if "doc" in entry.metadata}
"""The options that are flags and keys alike."""


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line, and the file that ``--config`` names.

    argparse exits with code 2 on an unknown flag.

    Raises:
        SetupError: any other mistake, such as a value of the wrong type or a scorer named twice.
    """
    flags = vars(_parser().parse_args(arguments))
    limits = [entry.name for entry in dataclasses.fields(Limits)]
    config = read_config(flags["config"], KEYS, limits) if flags["config"] else Config()
    given = {name: Written(_flag(name), str(flags[name])) for name in KEYS if name in flags}
    return Options(
        scorers=_scorers(config.scorers, flags["scorers"], flags["set"]),
        limits=Limits(**_typed(Limits, config.limits)),
        **_typed(Options, {**config.options, **given}),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reward_servers",
        description="Serve scorers over gRPC.",
        epilog="`python -m reward_servers convert --help` tells how to turn published weights into safetensors.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "scorers",
        nargs="*",
        default=[],
        metavar="SCORER",
        help="NAME of a file in reward_servers/scorers, or SERVED=NAME to serve it under another name",
    )
    parser.add_argument("--set", action="append", default=[], metavar="SERVED.KEY=VALUE", help="a scorer's setting")
    parser.add_argument(
        "--config",
        type=Path,
        default=None,
        metavar="FILE",
        help="YAML with these flags as keys, `scorers: {SERVED: {scorer: NAME, KEY: VALUE}}` and `limits: {KEY: "
        "VALUE}`; flags win, and scorers of the command line are served besides those of the file",
    )
    for name, entry in KEYS.items():
        if entry.type == "bool":
            parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=entry.metadata["doc"])
        else:
            default = "" if entry.default is None else f" (default: {entry.default})"
            parser.add_argument(_flag(name), metavar="VALUE", help=entry.metadata["doc"] + default)
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _scorers(
    from_file: Mapping[str, Mapping[str, Written]], from_flags: Sequence[str], changes: Sequence[str]
) -> dict[str, Choice]:
    settings = {served: {key: value.text for key, value in entries.items()} for served, entries in from_file.items()}
    names = {served: entries.pop("scorer", served) for served, entries in settings.items()}
    for text in from_flags:
        served, equals, name = text.partition("=")
        if equals and not name:
            raise SetupError(f"{text} must read NAME or SERVED=NAME.")
        if served in names:
            raise SetupError(f"The scorer {served} is named twice. Serve one of them as ANOTHER_NAME={name or served}.")
        names[served], settings[served] = name if equals else served, {}
    if not names:
        raise SetupError("There is no scorer to serve. Name one, such as: python -m reward_servers seam")
    for served in names:
        if not SERVED_NAME.fullmatch(served):
            raise SetupError(f"{served!r} is no name to serve a scorer under: use letters, digits, _ and -.")
    for text in changes:
        target, equals, value = text.partition("=")
        served, dot, key = target.partition(".")
        if not equals or not dot or served not in names:
            raise SetupError(f"--set {text} must read SERVED.KEY=VALUE, with a scorer among {', '.join(names)}.")
        settings[served][key] = value
    return {served: Choice(name, settings[served]) for served, name in names.items()}


def _true_or_false(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


READERS: Mapping[type, tuple[Callable[[str], Any], str]] = {
    bool: (_true_or_false, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "text"),
    Path: (Path, "a path"),
}
"""Each type of an option: how it is read, and its name in a sentence."""


def _typed(cls: type, written: Mapping[str, Written]) -> dict[str, Any]:
    """Values of fields of ``cls``, checked against their types and ranges."""
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    values = {}
    for name, value in written.items():
        kind = next(iter(get_args(hints[name])), hints[name])  # of `int | None`, int
        bounds = fields[name].metadata
        values[name] = _read(kind, value, bounds.get("at_least", 0), bounds.get("at_most", math.inf))
    return values


def _read(kind: type, written: Written, low: float, high: float) -> Any:
    read, words = READERS[kind]
    try:
        value = read(written.text)
        if kind in (int, float) and not low <= value <= high:
            raise ValueError
    except (KeyError, ValueError):
        if kind in (int, float):
            words += f" of at least {low:g}" if high == math.inf else f" from {low:g} to {high:g}"
        raise SetupError(f"{written.where} must be {words}, found {written.text!r}.") from None
    return value
