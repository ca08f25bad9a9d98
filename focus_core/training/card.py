"""Write an adapter's model card, and put adapters on the hub.

The card says what ``focus_config.json`` and ``export.json`` hold: base, form, what was trained on, losses that were
measured. It claims nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

from focus_core.errors import AdapterError
from focus_core.files import write_atomically
from focus_core.model.bases import base_of, first_line
from focus_core.model.hub import AdapterInfo, read_info

CARD = "README.md"


def write_card(folder: Path) -> Path:
    """Write ``README.md`` into an adapter folder; one that is there already is kept, as somebody wrote it.

    Raises:
        AdapterError: the folder is no adapter.
    """
    info, path = read_info(folder), folder / CARD
    if not path.exists():
        write_atomically(path, _card(info, folder).encode())
    return path


def push_adapter(folder: Path, name: str, *, private: bool = False) -> str:
    """Put an adapter on the hub, its card included, and return its address.

    Args:
        folder: of the adapter.
        name: OWNER/NAME; made if it is not there.
        private: whether a new one is.

    Raises:
        AdapterError: the folder is no adapter, or the hub does not take it.
    """
    write_card(folder)
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        patterns = ["adapter.safetensors", "focus_config.json", "export.json", CARD]
        return str(api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=patterns))
    except Exception as error:  # which HTTP client raises, and what, differs between releases of the hub's library
        raise AdapterError(
            f"{folder} cannot be put on the hub as {name!r} ({first_line(error)}); check the network, the name "
            "(OWNER/NAME) and that `hf auth login` was run"
        ) from error


def _card(info: AdapterInfo, folder: Path) -> str:
    row = base_of(info.base, info.fingerprint)
    base, licence = (row.weights.repository, row.licence) if row is not None else (info.base, "")
    head = ["---", "library_name: focusllm", "tags: [focusllm, long-context]"]
    head += [f"base_model: {base}"] if "/" in base and not Path(base).is_absolute() else []
    head += [f"license: {licence.lower()}"] if licence else []
    form = "whole matrices" if info.rank is None else f"differences of rank {info.rank}"
    focus = info.focus
    lines = [
        *head,
        "---",
        f"# Candidates for {Path(info.base).name}",
        "",
        f"Trained candidate projections (FocusLLM, arXiv 2408.11745) for `{Path(info.base).name}` (weights "
        f"`{info.fingerprint[:12]}`), as {form}. `{focus.positions}` positions, `{focus.local_mode}` local mode, "
        f"{'a' if focus.sink else 'no'} sink; chunks of {focus.chunk_size} tokens by default, a window of "
        f"{focus.window:,}.",
        "",
        "```python",
        "from focus_core import FocusEngine",
        f'engine = FocusEngine.from_pretrained({(row.name if row else Path(info.base).name)!r}, "PATH OR OWNER/NAME")',
        "```",
        "",
        "## Training",
        "",
    ]
    lines += [f"- {name.replace('_', ' ')}: {_shown(value)}" for name, value in info.trained.items()]
    lines += _losses(folder)
    return "\n".join([*lines, "", "Nothing else was measured by the program that wrote this card.", ""])


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)


def _losses(folder: Path) -> list[str]:
    path = folder / "export.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = {"before": "loss as trained", "after": "loss in this form"}
    return [
        f"- {text}: {values[name]['loss']:.4f} nats a target over {values[name]['queries']} held-out local contexts"
        for name, text in names.items()
        if values.get(name)
    ]
