"""Decide who may do what: API keys with scopes and tenants, compared in constant time.

A key file holds hashes, never keys. Nothing here is logged.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from focus_core.errors import ConfigError
from focus_core.files import write_atomically

Scope = Literal["read", "write", "admin"]
EVERYTHING: frozenset[Scope] = frozenset(get_args(Scope))


@dataclass(frozen=True)
class Caller:
    """Who a request comes from.

    Args:
        name: of the key; also what fairness counts by.
        tenant: whose memories the caller sees; no other tenant's can be named.
        scopes: ``read`` asks and lists, ``write`` also changes memories, ``admin`` also reads metrics.
    """

    name: str
    tenant: str = ""
    scopes: frozenset[Scope] = EVERYTHING


@dataclass(frozen=True)
class _Key:
    caller: Caller
    sha256: bytes = field(repr=False)


class Keys:
    """The keys of a file, or nobody's: then every caller of this machine is let in.

    Args:
        keys: of :func:`read_keys`; ``None`` asks for none.
    """

    def __init__(self, keys: Sequence[_Key] | None) -> None:
        self._keys = keys

    def caller(self, presented: str | None) -> Caller | None:
        """Return whose key was presented, ``None`` for a wrong or missing one; all keys are compared."""
        if self._keys is None:
            return Caller("local")
        digest = hashlib.sha256((presented or "").encode()).digest()
        found: Caller | None = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key.caller
        return found


def read_keys(path: Path | None) -> Keys:
    """Read a key file: a JSON list of ``{"name", "sha256", "tenant", "scopes"}``.

    Raises:
        ConfigError: it cannot be read, or an entry is malformed.
    """
    if path is None:
        return Keys(None)
    return Keys([_key(path, entry) for entry in _entries(path)])


def add_key(path: Path, name: str, tenant: str = "", scopes: Collection[str] = ("read",)) -> str:
    """Make a key, keep its hash in ``path`` and return the key itself, which is shown this once.

    Raises:
        ConfigError: the name is taken, a scope is unknown, or the file cannot be read.
    """
    entries = _entries(path) if path.exists() else []
    if any(entry.get("name") == name for entry in entries):
        raise ConfigError(f"{path} has a key named {name!r} already; choose another name or remove that one")
    key = f"fk-{secrets.token_urlsafe(32)}"
    entry = {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": tenant, "scopes": [*scopes]}
    _key(path, entry)
    write_atomically(path, (json.dumps([*entries, entry], indent=1) + "\n").encode())
    path.chmod(0o600)
    return key


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the API keys in {path} ({error}); make it with `focusllm serve-key`") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path} must hold a JSON list of keys; make it with `focusllm serve-key`")
    return entries


def _key(path: Path, entry: dict[str, Any]) -> _Key:
    name, scopes = entry.get("name"), entry.get("scopes", ["read"])
    unknown = sorted(set(scopes) - EVERYTHING) if isinstance(scopes, list) else [str(scopes)]
    if unknown:
        raise ConfigError(f"key {name!r} in {path} has the unknown scope {unknown[0]!r}; there are read, write, admin")
    try:
        digest = bytes.fromhex(str(entry["sha256"]))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"key {name!r} in {path} has no sha256 in hexadecimal; make it again") from error
    if not isinstance(name, str) or not name or len(digest) != 32:
        raise ConfigError(f"a key in {path} needs a name and 64 hexadecimal digits; got name {name!r}")
    granted: set[Scope] = set(scopes)
    if "admin" in granted:
        granted |= {"read", "write"}
    if "write" in granted:
        granted |= {"read"}
    return _Key(Caller(name, str(entry.get("tenant") or ""), frozenset(granted)), digest)
