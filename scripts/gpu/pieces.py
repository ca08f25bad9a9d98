"""Carry files to and from a machine that takes and gives only small pieces.

A bundle is a tar archive cut into pieces beside a manifest with every piece's sha256, so that pieces may arrive in any
order, twice, or damaged. Only the standard library is used, as nothing may be installed where a bundle is opened.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

MIB = 2**20


class PiecesError(Exception):
    """A piece is damaged, or does not belong to its manifest."""


def cut(name: str, sources: dict[str, Path], output: Path, piece_mib: float) -> Path:
    """Pack files and folders into ``output/name.NNN`` pieces with ``output/name.json``; return the manifest.

    Args:
        name: of the bundle.
        sources: name inside the bundle -> file or folder.
        output: created if absent; older pieces of that name are removed.
        piece_mib: most MiB of a piece.
    """
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob(f"{name}.*"):
        old.unlink()
    archive, pieces = output / f"{name}.tar", []
    with tarfile.open(archive, "w", dereference=True) as tar:
        for inside, path in sources.items():
            tar.add(path, inside)
    with archive.open("rb") as file:
        while data := file.read(int(piece_mib * MIB)):
            piece = output / f"{name}.{len(pieces):03d}"
            piece.write_bytes(data)
            pieces.append({"name": piece.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    archive.unlink()
    manifest = output / f"{name}.json"
    manifest.write_text(json.dumps({"name": name, "pieces": pieces}, indent=1) + "\n", encoding="utf-8")
    return manifest


def take(folder: Path, state: Path) -> dict[str, int]:
    """Take the pieces in ``folder`` into ``state/incoming``; unpack each bundle that is whole to ``state/NAME``.

    Returns:
        Pieces that are still missing, by bundle.

    Raises:
        PiecesError: a piece is not what its manifest says; it is not taken.
    """
    incoming = state / "incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    missing = {}
    for path in sorted(folder.glob("*.json")):
        whole = state / path.name  # the manifest of what was unpacked
        if whole.is_file() and whole.read_bytes() == path.read_bytes():
            missing[path.stem] = 0
        else:
            shutil.copyfile(path, incoming / path.name)
    for path in sorted(incoming.glob("*.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        wanted = {piece["name"]: piece for piece in manifest["pieces"]}
        for source in sorted(folder.glob(f"{manifest['name']}.[0-9]*")):
            _take_piece(source, wanted.get(source.name), incoming)
        missing[manifest["name"]] = sum(not _is_there(incoming / name, piece) for name, piece in wanted.items())
        if not missing[manifest["name"]]:
            _unpack(manifest, incoming, state / manifest["name"])
    return missing


def _take_piece(source: Path, piece: dict[str, Any] | None, incoming: Path) -> None:
    if piece is None or hashlib.sha256(source.read_bytes()).hexdigest() != piece["sha256"]:
        raise PiecesError(f"{source} is not the piece that the manifest names; bring it again")
    partial = incoming / f"{source.name}.partial"
    shutil.copyfile(source, partial)
    partial.replace(incoming / source.name)


def _is_there(path: Path, piece: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == piece["bytes"]


def _unpack(manifest: dict[str, Any], incoming: Path, target: Path) -> None:
    archive, partial = incoming / f"{manifest['name']}.tar", target.with_name(f".{target.name}.partial")
    with archive.open("wb") as out:
        for piece in manifest["pieces"]:
            with (incoming / piece["name"]).open("rb") as file:
                shutil.copyfileobj(file, out)
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    archive.unlink()
    for piece in manifest["pieces"]:
        (incoming / piece["name"]).unlink()
    (incoming / f"{manifest['name']}.json").replace(target.with_name(f"{target.name}.json"))


def give(bundles: Path, output: Path, given: Path, files: int, loose: list[Path]) -> int:
    """Copy pieces that were not given before, and always the newest ``loose`` files; return pieces left for later.

    Args:
        bundles: folder of :func:`cut`.
        output: what travels back in this call.
        given: a JSON file that remembers what was given.
        files: most files of one call.
        loose: small files, logs for instance, that are given each time.
    """
    output.mkdir(parents=True, exist_ok=True)
    seen = set(json.loads(given.read_text(encoding="utf-8"))) if given.is_file() else set()
    for path in loose:
        shutil.copyfile(path, output / path.name)
    left = []
    for manifest in sorted(bundles.glob("*.json")):
        pieces = json.loads(manifest.read_text(encoding="utf-8"))["pieces"]
        left += [(manifest, piece) for piece in pieces if piece["sha256"] not in seen]
    room = files - len(loose)
    for manifest, piece in left:
        cost = 1 + (not (output / manifest.name).exists())
        if cost > room:
            break
        shutil.copyfile(manifest, output / manifest.name)
        shutil.copyfile(bundles / piece["name"], output / piece["name"])
        room -= cost
        seen.add(piece["sha256"])
    given.write_text(json.dumps(sorted(seen)), encoding="utf-8")
    return sum(piece["sha256"] not in seen for _, piece in left)
