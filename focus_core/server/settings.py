"""Hold what a server is told at its start, checked."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from focus_core.errors import ConfigError


@dataclass(frozen=True)
class ServerSettings:
    """How a server listens, whom it lets in, and how much it takes on.

    Args:
        store: folder of the named memories.
        host: address to listen on; anything but loopback needs ``keys``.
        port: 0 takes a free one.
        keys: file of API keys (:func:`focus_core.server.access.read_keys`); ``None`` lets everybody on this machine in.
        model: id of the model as clients name it; made from the base's name if not given.
        origins: of web pages that may call the server (CORS); none by default.
        running: answers that are made at the same time; those beyond it wait.
        waiting: answers that may wait; one more is refused with 429.
        answer_bytes: most bytes of suffixes of all running answers together; ``None`` for a quarter of free memory.
        body_bytes: most bytes of a request's body.
        document_bytes: most bytes of one uploaded document.
        prompt_tokens: most tokens of a request's messages and attached files.
        seconds: most seconds of an answer.
        grace: seconds that a shutdown waits for running answers.

    Raises:
        ConfigError: a value is out of its bounds, or the address is open to others without keys.
    """

    store: Path
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    model: str | None = None
    origins: tuple[str, ...] = ()
    running: int = 16
    waiting: int = 64
    answer_bytes: int | None = None
    body_bytes: int = 64 << 20
    document_bytes: int = 32 << 20
    prompt_tokens: int = 1_000_000
    seconds: float = 600.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name in ("running", "body_bytes", "document_bytes", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.waiting < 0:
            raise ConfigError(f"waiting must be at least 0; got {self.waiting}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535; got {self.port}")
        if self.seconds <= 0 or self.grace < 0:
            raise ConfigError(f"seconds must be above 0 and grace at least 0; got {self.seconds} and {self.grace}")
        if self.keys is None and not is_loopback(self.host):
            raise ConfigError(
                f"{self.host} can be reached from other machines, and there are no API keys; give --keys FILE "
                "(make one with `focusllm serve-key`), or listen on 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine as it alone can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
