"""What a reward server takes on: how large a request may be, how much may wait, how much is computed at a time.

The queue is bounded, but gRPC receives a message before anything here can refuse it. So each connection that gets past
certificates and token may hold up to ``MAX_CALLS_PER_CONNECTION * max_message_bytes`` more, for as long as it sends.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from reward_servers.errors import SetupError

MAX_CALLS_PER_CONNECTION = 64
"""Calls that one connection may have under way at a time; clients hold back what is beyond that."""

LARGEST_MESSAGE_BYTES = 2**31 - 1
"""What gRPC and protobuf can take at most."""


@dataclass(frozen=True)
class Limits:
    """The bounds of one server.

    Raises:
        SetupError: one is not positive, messages may be larger than gRPC can take, or a request that is small enough
            would never fit into the queue.
    """

    max_message_bytes: int = 256 << 20
    """Largest request and response."""
    max_items_per_request: int = 64
    max_pixels_per_image: int = 4096 * 4096
    max_prompt_bytes: int = 16384
    """Of a single prompt, in UTF-8."""
    max_queue_items: int = 256
    """Items that may wait or be computed at a time; a request beyond that is pushed back."""
    max_queue_bytes: int = 1 << 30
    """The same in bytes of images and masks; gRPC holds about as much again until it has sent the answer."""
    max_batch_items: int = 32
    """Items that scorers get at a time; a larger request is computed in slices."""
    max_delay_ms: float = 5.0
    """How long the oldest request waits for others to share its batch, unless the batch is full."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0 or (value == 0 and name != "max_delay_ms"):
                raise SetupError(f"The limit {name} must be positive, found {value}.")
        if self.max_message_bytes > LARGEST_MESSAGE_BYTES:
            raise SetupError(
                f"The limit max_message_bytes is {self.max_message_bytes}; gRPC takes no message of more than "
                f"{LARGEST_MESSAGE_BYTES} bytes. Lower it."
            )
        for small, large in (("max_items_per_request", "max_queue_items"), ("max_message_bytes", "max_queue_bytes")):
            if getattr(self, small) > getattr(self, large):
                raise SetupError(
                    f"The limit {small} is {getattr(self, small)}, more than {large}, which is {getattr(self, large)}: "
                    f"the largest requests would never be taken. Lower {small} or raise {large}."
                )
