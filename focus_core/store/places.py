"""Find where a memory is saved: a folder, a name in the user's own store, or an address where it was published."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from focus_core.errors import StoreError
from focus_core.files import is_store
from focus_core.store.database import Store
from focus_core.store.migration import DEFAULT_NAME
from focus_core.store.published import is_address, open_published


@dataclass(frozen=True)
class Place:
    """A collection in a store.

    Args:
        folder: of the store.
        name: of the collection.
        tenant: whose it is.
        published: what was opened at an address.
    """

    folder: Path
    name: str = DEFAULT_NAME
    tenant: str = ""
    published: Store | None = field(default=None, compare=False, repr=False)

    def open(self, *, read_only: bool = True) -> Store:
        """Open the store; raises ``StoreError`` where there is none to read, or a published one is to be changed."""
        if self.published is not None:
            if not read_only:
                raise StoreError(
                    f"{self.name!r} is published and can only be read; change the collection it was published from, "
                    "and publish that again"
                )
            return self.published
        return Store(self.folder, tenant=self.tenant, read_only=read_only)


def own_store() -> Path:
    """Return the user's own store: ``FOCUSLLM_STORE``, or ``focusllm/store`` in the folder of the user's data."""
    default = Path(os.environ.get("XDG_DATA_HOME", "") or Path.home() / ".local" / "share") / "focusllm" / "store"
    return Path(os.environ.get("FOCUSLLM_STORE", "") or default)


def find_place(place: str | Path | Place, name: str | None = None) -> Place:
    """Return what is meant by a folder, a name or an address.

    Args:
        place: folder of a store, or the name of a collection in the user's own store (a folder goes first), or an
            address like ``s3://bucket/contracts`` that a collection was published at.
        name: of the collection in the folder; its only one if not given.

    Raises:
        StoreError: there is neither.
    """
    if isinstance(place, Place):
        return place
    if is_address(place):
        store, found = open_published(str(place))
        return Place(store.folder, found, published=store)
    folder = Path(place)
    if is_store(folder):
        return Place(folder, name or _only(folder))
    own = own_store()
    if is_store(own) and Store(own, read_only=True).has(str(place)):
        return Place(own, str(place))
    if folder.is_dir() or len(folder.parts) != 1:
        raise StoreError(f"no saved memory in {folder}; make one with `focusllm index`")
    raise StoreError(
        f"no saved memory {str(place)!r}: there is no folder of this name with one, and no collection in {own}; "
        f"`focusllm list` shows the collections, `focusllm index PATH --name {folder.name}` makes one"
    )


def _only(folder: Path) -> str:
    names = [info.name for info in Store(folder, read_only=True).collections()]
    return names[0] if len(names) == 1 else DEFAULT_NAME
