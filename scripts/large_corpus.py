"""Index a large corpus once, reopen it in new processes, and say what that costs, in one run.

    python scripts/large_corpus.py                      # 400,000 tokens, the default base, bf16, int8 and int4
    python scripts/large_corpus.py --tokens 20000       # in small
    python scripts/large_corpus.py --file book.txt      # of your own text instead of made sentences

Each phase is a process of its own. *Prefill* is what a process without a store does: the chunk pass over all tokens,
and then the question. Peak memory is the process's largest resident size less that before the memory was opened, to
be set beside the budget and 1.5 GB. Files that were just written are in the system's cache when they are read. Ratios
are of phases of one run; absolute times are this machine's, and those of whatever runs beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

QUESTION = "What is the pass key?"
WORDS = (
    *("river", "stone", "garden", "letter", "winter", "morning", "captain", "window", "market", "silver", "bridge"),
    *("doctor", "candle", "forest", "shadow", "mirror", "village", "sister", "lantern", "harbor", "kitchen"),
    *("teacher", "mountain", "blanket", "journey", "soldier", "orchard", "chimney", "pocket", "thunder"),
)


def made_text(tokens: int, file: Path | None, key: str) -> str:
    """Return a text of about so many tokens, all chunks different, with a pass key in its middle."""
    rng, lines = random.Random(0), []
    own = file.read_text(encoding="utf-8") if file is not None else ""
    characters = int(tokens * 4.2)
    while not own and sum(map(len, lines[-1:])) * len(lines) < characters * 1.05:
        lines.append(f"The {' '.join(rng.choice(WORDS) for _ in range(9))} {rng.randrange(10_000)}. ")
    text = (own or "".join(lines))[:characters]
    middle = text.find(". ", len(text) // 2) + 2
    return f"{text[:middle]}The pass key is {key}. Remember it. {key} is the pass key. {text[middle:]}"


def index(settings: dict[str, Any]) -> dict[str, Any]:
    """Read the corpus into a store."""
    from focus_core import Document, FocusEngine
    from focus_core.store.database import Store
    from focus_core.store.indexing import index_documents

    engine = FocusEngine.from_pretrained(settings["base"], settings["adapter"]).with_config(kv_format=settings["form"])
    text = Path(settings["text"]).read_text(encoding="utf-8")
    began = time.perf_counter()
    store = Store(settings["store"])
    index_documents(store, "default", engine.encoder, [Document("corpus", text)])
    seconds = time.perf_counter() - began
    files = [path.stat().st_size for path in Path(settings["store"]).rglob("*") if path.is_file()]
    chunks = engine.load_memory(settings["store"])
    return {"seconds": seconds, "tokens": chunks.tokens, "chunks": len(chunks), "bytes": sum(files)}


def ask(settings: dict[str, Any]) -> dict[str, Any]:
    """Open the store and ask for the pass key."""
    from focus_core import FocusEngine

    engine = FocusEngine.from_pretrained(settings["base"], settings["adapter"])
    engine = engine.with_config(memory_budget=settings["budget"])
    engine.answer(QUESTION, engine.remember(["The sky is blue. " * 40]), max_tokens=2)  # so that all code is loaded
    process, stop, most = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.02):
            most[0] = max(most[0], process.memory_info().rss)

    before, began = process.memory_info().rss, time.perf_counter()
    threading.Thread(target=watch, daemon=True).start()
    memory = engine.load_memory(settings["store"])
    opened = time.perf_counter()
    pieces, times = [], []
    for token in engine.stream(QUESTION, memory, max_tokens=settings["answer"]).tokens():
        times.append(time.perf_counter())
        pieces.append(token.text)
    stop.set()
    return {
        "opening": opened - began,
        "first": times[0] - opened,
        "token": (times[-1] - times[0]) / max(1, len(times) - 1),
        "peak": most[0] - before,
        "found": settings["key"] in "".join(pieces),
    }


def phase(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run a phase in a process of its own."""
    command = [sys.executable, __file__, "--phase", name]
    ran = subprocess.run(command, input=json.dumps(settings), capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{name} failed:\n{ran.stderr}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Run all phases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400_000, help="about so many")
    parser.add_argument("--file", type=Path, help="a text, instead of made sentences")
    parser.add_argument("--formats", default="base,int8,int4")
    parser.add_argument("--budget", type=float, default=4.0, help="GiB of memory for chunk KV")
    parser.add_argument("--answer", type=int, default=8, help="tokens of the answer")
    parser.add_argument("--base", help="of FocusEngine.from_pretrained; the installed default if not given")
    parser.add_argument("--adapter", help="the shipped one if not given")
    parser.add_argument("--phase", choices=("index", "ask"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        print(json.dumps({"index": index, "ask": ask}[arguments.phase](json.load(sys.stdin))))
        return 0
    key, budget = "73914", int(arguments.budget * (1 << 30))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the run; budget {budget / 1e9:.2f} GB")
    print(
        "| format | tokens | chunks | index s | opening s | first token s | prefill / opened | token s | peak GB |"
        " within budget + 1.5 GB | bytes a token | pass key |\n|" + "---|" * 12
    )
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "corpus.txt"
        text.write_text(made_text(arguments.tokens, arguments.file, key), encoding="utf-8")
        for form in arguments.formats.split(","):
            store = str(Path(folder) / form)
            settings = {"text": str(text), "store": store, "form": form, "budget": budget, "key": key}
            settings |= {"answer": arguments.answer, "base": arguments.base, "adapter": arguments.adapter}
            read, asked = phase("index", settings), phase("ask", settings)
            ratio = (read["seconds"] + asked["first"]) / (asked["opening"] + asked["first"])
            print(
                f"| {form} | {read['tokens']:,} | {read['chunks']:,} | {read['seconds']:.1f} | "
                f"{asked['opening']:.2f} | {asked['first']:.1f} | {ratio:.1f} | {asked['token']:.2f} | "
                f"{asked['peak'] / 1e9:.2f} | "
                f"{'yes' if asked['peak'] <= budget + 1.5e9 else 'NO'} | {read['bytes'] / read['tokens']:,.0f} | "
                f"{'found' if asked['found'] else 'not found'} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
