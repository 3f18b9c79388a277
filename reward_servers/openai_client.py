"""Questions about images to an endpoint that speaks OpenAI's chat protocol; vLLM, SGLang and hosted models do.

A busy endpoint is asked again, with growing random pauses or when it says so, until the deadline. Redirects are not
followed, for they would carry the key to another machine.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reward_servers.errors import SetupError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
"""Seconds."""
MOST_BYTES = 1 << 20
"""Of an answer."""


class CallFailed(Exception):
    """There is no answer, or none that can be used; the phrase says why."""


class _Busy(Exception):
    """The endpoint may answer later, not before ``pause`` seconds."""

    def __init__(self, phrase: str, pause: float = 0) -> None:
        super().__init__(phrase)
        self.pause = pause


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and as whom."""

    base_url: str
    """What ``/chat/completions`` is put after."""
    key: str = field(default="", repr=False)
    """Sent as a bearer token; empty for none."""


def read_key(variable: str, file: str) -> str:
    """The key in an environment variable or in a file, without white space around it; empty where neither is named.

    Raises:
        SetupError: both are named, or the one that is named holds no key.
    """
    if variable and file:
        raise SetupError(f"The key can come from one place only, found key_env={variable} and key_file={file}.")
    if file and not Path(file).is_file():
        raise SetupError(f"The file {file}, named by key_file, does not exist.")
    key = (Path(file).read_text() if file else os.environ.get(variable, "")).strip()
    if (variable or file) and not (key.isascii() and key.isprintable() and key):
        place = f"The file {file}, named by key_file," if file else f"The environment variable {variable} (key_env)"
        raise SetupError(f"{place} must hold a key, one line of ASCII.")
    return key


def image_part(levels_HWC: np.ndarray) -> dict[str, Any]:
    """A picture, uint8 RGB, as a part of a message: a PNG in a data URL."""
    png = io.BytesIO()
    Image.fromarray(levels_HWC).save(png, "PNG", compress_level=1)
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def ask(
    endpoint: Endpoint, model: str, images: Sequence[np.ndarray], question: str, options: Mapping[str, Any], by: float
) -> Any:
    """The first choice of the answer to one question about some images.

    Args:
        endpoint: where to ask.
        model: which model, as the endpoint calls it.
        images: uint8 RGB [H, W, C].
        question: what follows the images.
        options: more fields of the request, such as ``temperature``.
        by: deadline as ``time.monotonic()``. It ends pauses and waiting for a connection or for more bytes.

    Raises:
        CallFailed: the endpoint refused, could not be reached in time, or answered something else.
    """
    content = [*map(image_part, images), {"type": "text", "text": question}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], **options}
    payload = json.dumps(body).encode()
    pauses = 0
    while True:
        left = by - time.monotonic()
        if left <= 0:
            raise CallFailed("there was no time left to ask")
        try:
            return _first_choice(_post(endpoint, payload, left))
        except _Busy as busy:
            # Half of it random, so that those who failed together do not come back together.
            pause = max(busy.pause, min(LONGEST_PAUSE, FIRST_PAUSE * 2**pauses) * random.uniform(0.5, 1))
            if time.monotonic() + pause >= by:
                raise CallFailed(f"{busy}; try {pauses + 1} was the last for which there was time") from None
            time.sleep(pause)
            pauses += 1


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


def _post(endpoint: Endpoint, payload: bytes, seconds: float) -> bytes:
    headers = {"Content-Type": "application/json"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    request = urllib.request.Request(f"{endpoint.base_url.rstrip('/')}/chat/completions", payload, headers)
    try:
        with _opener.open(request, timeout=seconds) as response:
            return response.read(MOST_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            answer = error.read(MOST_BYTES).decode(errors="replace")
        if endpoint.key:  # some quote it when they refuse it
            answer = answer.replace(endpoint.key, "***")
        phrase = f"the endpoint answered HTTP {error.code}: {answer[:200]!r}"
        if error.code == http.HTTPStatus.TOO_MANY_REQUESTS or error.code >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            raise _Busy(phrase, _retry_after(error.headers.get("Retry-After", ""))) from None
        raise CallFailed(phrase) from None
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise CallFailed(f"the endpoint did not answer within {seconds:.1f} s") from None
        raise _Busy(f"the endpoint cannot be reached ({type(cause).__name__}: {cause})") from None


def _retry_after(header: str) -> float:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3), a number or a date; 0 where it says nothing."""
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def _first_choice(answer: bytes) -> Any:
    try:
        return json.loads(answer)["choices"][0]
    except (ValueError, LookupError, TypeError):
        raise CallFailed(f"the endpoint's answer is no chat completion: {answer[:200]!r}") from None
