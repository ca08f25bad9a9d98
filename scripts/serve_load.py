"""Load a running server: every answer must equal the same question asked alone; print throughput and memory as JSON.

    focusllm serve --store STORE --port 8123 &
    python scripts/serve_load.py http://127.0.0.1:8123 --clients 16 --requests 200

Three memories of real text are made on the server. The first round asks each question alone; the second asks them
from many clients. In bfloat16 an answer may part from the one made alone where the two best tokens were close: such
answers are counted, with the margin (in nats) between the two tokens where they part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
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


async def _together(client: httpx.AsyncClient, bodies: list[dict[str, Any]], clients: int) -> tuple[list[Any], float]:
    room = asyncio.Semaphore(clients)

    async def one(body: dict[str, Any]) -> Any:
        async with room:
            return await _ask(client, body)

    started = time.monotonic()
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


async def main() -> None:
    """Read the arguments, load the server, print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--throughput", default="1,8,32", help="questions at once, measured one after the other")
    arguments = parser.parse_args()
    limits = httpx.Limits(max_connections=256)
    async with httpx.AsyncClient(base_url=arguments.url, timeout=3600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        chunks = await _fill(client)
        different = _bodies(model, len(MEMORIES) * len(QUESTIONS), arguments.tokens)
        alone = [await _ask(client, body) for body in different]
        before = await _resident(client)
        met, seconds = await _together(client, _bodies(model, arguments.requests, arguments.tokens), arguments.clients)
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
        for many in map(int, arguments.throughput.split(",")):
            bodies = [different[0]] * 32
            _, seconds = await _together(client, bodies, many)
            report["answers_per_second_at_once"][many] = round(len(bodies) / seconds, 3)
            print(json.dumps(report, indent=1), flush=True)  # a run that is cut off has said what it knew


if __name__ == "__main__":
    asyncio.run(main())
