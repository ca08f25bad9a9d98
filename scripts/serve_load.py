"""Load a server: every answer must equal the same question asked alone; print throughput and memory as JSON.

    focusllm serve --store STORE --port 8123 &
    python scripts/serve_load.py http://127.0.0.1:8123 --clients 16 --requests 200
    python scripts/serve_load.py --tiny --requests 64 --growth 2000   # a server of its own, over a tiny random model

Three memories of real text are made on the server. The first round asks each question alone; the second asks them
from many clients. In bfloat16 an answer may part from the one made alone where the two best tokens were close: such
answers are counted, with the margin (in nats) between the two tokens where they part. ``--growth`` asks so many
different questions more, whole and streamed, some with an attached file, and says what the server's process held.
How far it is goes to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import httpx

MEMORIES = {
    "statements": (
        "assert",
        "break",
        "continue",
        "del",
        "for",
        "if",
        "import",
        "pass",
        "raise",
        "return",
        "try",
        "while",
    ),
    "types": ("typesmapping", "typesseq", "booleans", "integers", "strings", "lists", "dict", "binary"),
    "classes": ("class", "function", "callable-types", "attribute-access", "objects", "specialnames"),
}
QUESTIONS = (
    "Which statement terminates the nearest enclosing loop?",
    "Which statement is used to raise an exception?",
    "What does the pass statement do?",
    "How is a dictionary displayed?",
    "Which operator concatenates strings?",
    "What does a class definition define?",
    "What is a docstring?",
    "Which statement deletes a name?",
)


async def _fill(client: httpx.AsyncClient) -> dict[str, int]:
    chunks = {}
    for name, wanted in MEMORIES.items():
        await client.post("/v1/memories", json={"name": name})
        documents = [{"id": key, "text": topics[key]} for key in wanted if topics.get(key, "").strip()]
        change = (await client.post(f"/v1/memories/{name}/documents", json={"documents": documents})).json()
        status = "queued"
        while status in ("queued", "in_progress"):
            await asyncio.sleep(0.2)
            status = (await client.get(f"/v1/memories/{name}/indexing/{change['id']}")).json()["status"]
        assert status == "completed", status
        chunks[name] = (await client.get(f"/v1/memories/{name}")).json()["chunks"]
    return chunks


def _bodies(model: str, count: int, tokens: int) -> list[dict[str, Any]]:
    names = list(MEMORIES)
    return [
        {
            "model": model,
            "messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
            "memories": [names[number % len(names)]],
            "template": "question",
            "max_tokens": tokens,
            "logprobs": True,
            "top_logprobs": 2,
        }
        for number in range(count)
    ]


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    content: list[dict[str, Any]] = answer.json()["choices"][0]["logprobs"]["content"]
    return content


async def _together(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], clients: int, what: str
) -> tuple[list[Any], float]:
    room, started, done = asyncio.Semaphore(clients), time.monotonic(), 0

    async def one(body: dict[str, Any]) -> Any:
        nonlocal done
        async with room:
            answer = await _ask(client, body)
        done += 1
        if done % 10 == 0 or done == len(bodies):
            _say(f"{what}: {done} of {len(bodies)} after {time.monotonic() - started:.0f} s")
        return answer

    answers = await asyncio.gather(*(one(body) for body in bodies))
    return answers, time.monotonic() - started


def _margin(alone: list[dict[str, Any]], met: list[dict[str, Any]]) -> float | None:
    """Return how close the two best tokens were where two answers part; ``None`` for equal answers."""
    for one, other in zip(alone, met, strict=False):
        if one["token"] != other["token"]:
            best, second = one["top_logprobs"]
            return float(best["logprob"] - second["logprob"])
    return None if len(alone) == len(met) else 0.0


async def _resident(client: httpx.AsyncClient) -> float:
    text = (await client.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("focusllm_resident_bytes ")]
    return float(lines[0].split()[1]) / 1e6


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def _grow(client: httpx.AsyncClient, model: str, count: int, clients: int) -> list[list[float]]:
    """Ask ``count`` different questions; return [requests, resident MB] as it went, the first after a warm-up."""
    names, seen, done = list(MEMORIES), [], 0
    room = asyncio.Semaphore(clients)

    async def one(number: int) -> None:
        nonlocal done
        parts: list[dict[str, Any]] = [{"type": "text", "text": f"{QUESTIONS[number % len(QUESTIONS)]} ({number})"}]
        if number % 5 == 0:
            data = base64.b64encode(f"Note {number}: the cat sat on the mat. ".encode() * 20).decode()
            parts.append({"type": "file", "file": {"filename": f"note-{number}.txt", "file_data": data}})
        body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 4}
        body |= {"memories": [names[number % len(names)]], "stream": number % 3 == 0}
        async with room:
            answer = await client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        done += 1
        if done % 100 == 0 or done == count:
            seen.append([done, round(await _resident(client), 1)])
            _say(f"growth: {done} of {count}, {seen[-1][1]} MB")

    await asyncio.gather(*(one(number) for number in range(count)))
    return seen


@contextlib.contextmanager
def _tiny_server() -> Iterator[str]:
    """Serve a tiny random model in a process of its own; yield its address."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.conftest import byte_level_tokenizer, tiny_model

    with tempfile.TemporaryDirectory() as folder:
        tiny_model("llama", window=2048).save_pretrained(f"{folder}/base")
        byte_level_tokenizer().save_pretrained(f"{folder}/base")
        command = [sys.executable, "-m", "focus_core.cli", "serve", "--base", f"{folder}/base"]
        command += ["--adapter", "untrained", "--store", f"{folder}/store", "--port", "0", "--waiting", "1000"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            try:
                while not (found := re.search(r"http://[^/]+", line := process.stderr.readline())):
                    assert line, "the server did not start"
                yield found[0]
            finally:
                process.terminate()


async def main() -> None:
    """Read the arguments, load the server, print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--tiny", action="store_true", help="serve a tiny random model instead of naming a server")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--throughput", default="1,8,32", help="questions at once, measured one after the other")
    parser.add_argument("--growth", type=int, default=0, help="different questions more, and what the process held")
    arguments = parser.parse_args()
    if (arguments.url is None) != arguments.tiny:
        parser.error("name a server, or give --tiny")
    with _tiny_server() if arguments.tiny else contextlib.nullcontext(arguments.url) as url:
        await _load(url, arguments)


async def _load(url: str, arguments: argparse.Namespace) -> None:
    limits = httpx.Limits(max_connections=256)
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        chunks = await _fill(client)
        _say(f"chunks: {chunks}")
        different = _bodies(model, len(MEMORIES) * len(QUESTIONS), arguments.tokens)
        alone, _ = await _together(client, different, 1, "alone")
        before = await _resident(client)
        asked = _bodies(model, arguments.requests, arguments.tokens)
        met, seconds = await _together(client, asked, arguments.clients, "together")
        margins = [_margin(alone[number % len(different)], answer) for number, answer in enumerate(met)]
        parted = [margin for margin in margins if margin is not None]
        report: dict[str, Any] = {
            "chunks": chunks,
            "requests": len(met),
            "clients": arguments.clients,
            "requests_per_second": round(len(met) / seconds, 3),
            "equal": len(met) - len(parted),
            "largest_margin_of_those_that_part": round(max(parted, default=0.0), 4),
            "resident_mb_before_and_after": [round(before), round(await _resident(client))],
            "answers_per_second_at_once": {},
        }
        for many in map(int, filter(None, arguments.throughput.split(","))):
            bodies = [different[0]] * 32
            _, seconds = await _together(client, bodies, many, f"{many} at once")
            report["answers_per_second_at_once"][many] = round(len(bodies) / seconds, 3)
            _say(json.dumps(report))  # a run that is cut off has said what it knew
        if arguments.growth:
            report["requests_and_resident_mb"] = await _grow(client, model, arguments.growth, arguments.clients)
        print(json.dumps(report, indent=1), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
