"""`selfeval serve` under load, on loopback: throughput and latency, and mixed requests with clients that leave.

python benchmarks/serve.py [--run RUN] [--requests 10000] [--minutes 60] [--load 96]

The load is compared with sequential calls, and with `transformers serve` on the merged export of the same policy, which is left
out if it cannot start. Without --run, a run of the embedded model is made at a small size. In the mixed part every reply is
compared with the one that a single client received for the same request before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from common import SMALL, selfeval, write

TOKENS, CLIENTS, TOKEN = 32, 16, "benchmark"
QUESTIONS = [
    f"{name} has {count} pens. {name} buys {more} more. How many pens does {name} have now?"
    for name in ("Tom", "Mia", "Ben", "Sue")
    for count, more in ((3, 2), (4, 5), (7, 1), (2, 6))
]
REPLIES = ["The answer is 5.", "The answer is 9.", "Well, 6"]


@contextlib.contextmanager
def server(command: list[str], ready: Callable[[str], str | None]) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server; yield its address and its process once it is ready."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, text=True)
        try:
            end = time.monotonic() + 300
            while True:
                out.seek(0)
                text = out.read()
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{command[:3]} did not start: {text[-2000:]}")
                if (address := ready(text)) is not None:
                    break
                time.sleep(0.2)
            yield address, psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:  # next to many busy processes; the figures must not be lost
                process.kill()
                process.wait()


def ours(run: Path) -> contextlib.AbstractContextManager[tuple[str, psutil.Process]]:
    def ready(text: str) -> str | None:
        found = re.search(r"at (http://\S+)/v1", text)
        return found[1] if found else None

    # Clients of the benchmark leave and come back at once, which is no overload.
    return server(["-m", "selfeval", "serve", str(run), "--port", "0", "--token", TOKEN, "--queue", "1024"], ready)


def theirs(model: Path, port: int = 8977) -> contextlib.AbstractContextManager[tuple[str, psutil.Process]]:
    address = f"http://127.0.0.1:{port}"

    def ready(_: str) -> str | None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health", trust_env=False).status_code == 200:
                return address
        return None

    command = ["-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    return server([*command, "--device", "cpu", "--dtype", "float32"], ready)


def client(address: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return httpx.AsyncClient(base_url=address, headers=headers, timeout=300, limits=limits, trust_env=False)


# -- load ---------------------------------------------------------------------------------------------------------------


async def load(address: str, model: str, requests: int, clients: int) -> dict[str, Any]:
    """Send greedy chat requests from so many clients; return throughput and latency."""
    seconds: list[float] = []
    tokens = 0
    numbers = iter(range(requests))

    async def one_client(http: httpx.AsyncClient) -> None:
        nonlocal tokens
        for number in numbers:
            messages = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
            body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": TOKENS}
            begun = time.monotonic()
            response = await http.post("/v1/chat/completions", json=body)
            response.raise_for_status()
            seconds.append(time.monotonic() - begun)
            tokens += response.json()["usage"]["completion_tokens"]

    begun = time.monotonic()
    async with client(address) as http:
        await asyncio.gather(*(one_client(http) for _ in range(clients)))
    wall = time.monotonic() - begun
    cuts = statistics.quantiles(seconds, n=20)
    return {
        "clients": clients,
        "requests": requests,
        "tokens": tokens,
        "requests_per_second": requests / wall,
        "tokens_per_second": tokens / wall,
        "p50_seconds": statistics.median(seconds),
        "p95_seconds": cuts[18],
    }


async def loads(address: str, model: str, requests: int) -> list[dict[str, Any]]:
    """Measure one client, which calls sequentially, and several."""
    await load(address, model, 4, 2)  # the first requests allocate the cache
    return [await load(address, model, requests, clients) for clients in (1, CLIENTS)]


# -- mixed requests -----------------------------------------------------------------------------------------------------


def mixed() -> list[tuple[str, dict[str, Any]]]:
    """Return the requests: greedy and sampled chats, completions with several choices, streams, scores and rankings."""
    found: list[tuple[str, dict[str, Any]]] = []
    for index, question in enumerate(QUESTIONS):
        chat = {"model": "policy", "messages": [{"role": "user", "content": question}], "max_tokens": 12}
        found.append(("/v1/chat/completions", {**chat, "temperature": 0}))
        found.append(("/v1/chat/completions", {**chat, "seed": index, "stream": index % 2 == 0}))
        found.append(("/v1/completions", {"model": "base", "prompt": question, "seed": index, "n": 2, "max_tokens": 8}))
        if index % 4 == 0:
            found.append(("/v1/score", {"question": question, "replies": REPLIES}))
            found.append(("/v1/rerank", {"model": "evaluator", "query": question, "documents": REPLIES}))
    return found


def content(body: dict[str, Any], text: str) -> Any:
    """Return what a response says, without ids and times; scores to four decimals."""
    if body.get("stream"):
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert text.rstrip().endswith("data: [DONE]"), text[-200:]
        return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    values = json.loads(text)
    if "choices" in values:
        return [choice.get("text") or choice["message"]["content"] for choice in values["choices"]]
    if "data" in values:
        return [round(score, 4) for score in values["data"][0]["scores"]]
    return [(result["index"], round(result["relevance_score"], 4)) for result in values["results"]]


def same(found: Any, expected: Any) -> bool:
    """Compare contents: texts exactly; scores may differ in the last decimal, because their passes have other neighbours."""
    if isinstance(expected, list) and expected and isinstance(expected[0], float):
        return all(abs(a - b) < 1e-3 for a, b in zip(found, expected, strict=True))
    if isinstance(expected, list) and expected and isinstance(expected[0], tuple):
        return all(abs(a[1] - b[1]) < 1e-3 for a, b in zip(sorted(found), sorted(expected), strict=True))
    return bool(found == expected)


async def mix(address: str, process: psutil.Process, requests: int, minutes: float) -> dict[str, Any]:
    """Send mixed requests from many clients, of which a tenth leave before their reply; check every reply.

    Stops early after so many minutes; the result has the number of requests that were sent.
    """
    kinds, outcomes = mixed(), Counter[str]()
    memory: list[int] = []
    async with client(address) as http:
        expected = [content(body, (await http.post(path, json=body)).text) for path, body in kinds]
        begun = time.monotonic()
        numbers = (number for number in range(requests) if time.monotonic() < begun + 60 * minutes)

        async def one_client(chance: random.Random) -> None:
            for number in numbers:
                index, leaves = chance.randrange(len(kinds)), chance.random() < 0.1
                outcomes[await _one(http, kinds[index], leaves, chance, expected[index])] += 1
                if number % max(1, requests // 40) == 0:
                    memory.append(process.memory_info().rss)

        await asyncio.gather(*(one_client(random.Random(seed)) for seed in range(2 * CLIENTS)))
        wall = time.monotonic() - begun
        health = (await http.get("/health")).json()
        for _ in range(100):
            if health["running"] + health["waiting"] + health["scoring"] == 0:
                break
            await asyncio.sleep(0.1)
            health = (await http.get("/health")).json()
    return {
        "requests": outcomes.total(),
        "clients": 2 * CLIENTS,
        "seconds": wall,
        "outcomes": dict(outcomes),
        "left_over": health["running"] + health["waiting"] + health["scoring"],
        "rss_mib": [round(value / 2**20, 1) for value in memory],
    }


async def _one(
    http: httpx.AsyncClient, asked: tuple[str, dict[str, Any]], leaves: bool, chance: random.Random, expected: Any
) -> str:
    path, body = asked
    if leaves:
        task = asyncio.ensure_future(http.post(path, json=body))
        await asyncio.wait({task}, timeout=chance.uniform(0.0, 0.05))
        if task.cancel():
            await asyncio.gather(task, return_exceptions=True)
            return "client left"
        response = task.result()
    else:
        response = await http.post(path, json=body)
    if response.status_code != 200:
        return f"status {response.status_code}"
    return "right" if same(content(body, response.text), expected) else "wrong"


# -- both ---------------------------------------------------------------------------------------------------------------


def made_run(folder: Path) -> Path:
    settings = [part for size in SMALL for part in ("--set", size)]
    selfeval("run", "--output", str(folder / "run"), "--quiet", *settings)
    return folder / "run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="run folder with a policy and an evaluator")
    parser.add_argument("--requests", type=int, default=10_000, help="mixed requests")
    parser.add_argument("--minutes", type=float, default=60, help="time limit of the mixed requests")
    parser.add_argument("--load", type=int, default=96, help="requests of each load")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = arguments.run or made_run(folder)
        figures: dict[str, Any] = {"max_tokens": TOKENS}
        with ours(run) as (address, _):
            figures["ours"] = asyncio.run(loads(address, "policy", arguments.load))
        exported = folder / "policy"
        selfeval("export", str(run), "--role", "policy", "--merge", "--precision", "fp32", "--to", str(exported), "--quiet")
        try:
            with theirs(exported) as (address, _):
                figures["transformers_serve"] = asyncio.run(loads(address, str(exported), arguments.load))
        except (RuntimeError, httpx.HTTPError, KeyError) as error:
            figures["transformers_serve"] = None
            print(f"transformers serve is left out: {str(error)[-600:]}", file=sys.stderr)
        with ours(run) as (address, process):
            figures["mixed"] = asyncio.run(mix(address, process, arguments.requests, arguments.minutes))
        command = f"python benchmarks/serve.py --requests {arguments.requests} --minutes {arguments.minutes:g}"
        write("serve", f"{command} --load {arguments.load}", figures)


if __name__ == "__main__":
    main()
