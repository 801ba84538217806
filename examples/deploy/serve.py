"""One base in memory, several adapters, swapped in place between requests.

Usage: `python serve.py BASE NAME=ADAPTER[@WEIGHT]... [--port 8000]`

    GET /generate?adapter=NAME&tokens=1,5,7&count=8    what the model goes on with, and the score of each token
    GET /status                                        what is loaded and active, and what swapping costs

`adapter=none` asks the base. An answer has the same bits as that of a folder that `loratool merge` wrote: the
parameters are those of the merge, and nothing is added on the way through the model.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from transformers import AutoModelForCausalLM

import loratool

NONE = "none"  # the base as it is


class Service:
    """A model, and the adapter that its parameters hold now.

    One lock goes around swap and forward pass: loratool makes swaps wait for each other, but a forward pass in the
    middle of one would see half of each adapter. Requests that find "their" adapter active cost no swap; a service
    with more traffic would sort those that wait by adapter.
    """

    def __init__(self, base: Path, adapters: dict[str, tuple[Path, float]]) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True).eval()
        self.adapters = adapters
        self.lock = threading.Lock()
        self.handle: loratool.Handle | None = None
        self.active = NONE
        self.requests, self.swaps, self.seconds = 0, 0, 0.0
        for name in (*adapters, NONE):
            self.activate(name)  # one that does not fit stops the service here, and not at a request

    def activate(self, name: str) -> None:
        """Make the parameters hold this adapter. On an error they, and `active`, stay as they were."""
        if name == self.active:
            return
        started = time.perf_counter()
        if name == NONE:
            assert self.handle is not None
            self.handle.remove()
            self.handle = None
        else:
            adapter, weight = self.adapters[name]
            if self.handle is None:
                self.handle = loratool.apply(self.model, adapter, weight=weight)
            else:
                self.handle.swap(adapter, weight=weight)  # from one to the other in one pass
        self.active, self.swaps, self.seconds = name, self.swaps + 1, time.perf_counter() - started

    @torch.inference_mode()
    def generate(self, adapter: str, tokens: list[int], count: int) -> dict[str, Any]:
        """The likeliest next tokens, one after the other."""
        scores = []
        with self.lock:
            self.activate(adapter)
            self.requests += 1
            for _ in range(count):
                logits = self.model(torch.tensor([tokens])).logits[0, -1].float()  # [vocabulary]
                best = int(logits.argmax())
                tokens, scores = [*tokens, best], [*scores, float(logits[best])]
        return {"adapter": adapter, "tokens": tokens, "scores": scores}

    def status(self) -> dict[str, Any]:
        """Numbers of this moment: it does not wait for whoever has the model."""
        handle = self.handle
        return {
            "active": self.active,
            "adapters": {name: {"path": str(path), "weight": weight} for name, (path, weight) in self.adapters.items()},
            "requests": self.requests,
            "swaps": self.swaps,
            "last_swap_seconds": self.seconds,
            "undo_bytes": handle.report.undo_bytes if handle else 0,  # what the base's bits cost, beside the model
        }

    def limits(self) -> tuple[int, int]:
        """How many tokens there are, and how many may be in a row."""
        return self.model.config.vocab_size, self.model.config.max_position_embeddings


class Handler(BaseHTTPRequestHandler):
    service: Service
    timeout = 5  # seconds that a client has to send its request: one that says nothing does not stop a shutdown

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        try:
            if address.path == "/status":
                self.reply(200, self.service.status())
            elif address.path == "/generate":
                self.reply(200, self.service.generate(*self.asked(query)))
            else:
                self.reply(404, {"error": f"no such page: {address.path}"})
        except LookupError as error:
            self.reply(404, {"error": str(error.args[0])})
        except ValueError as error:
            self.reply(400, {"error": str(error)})
        except loratool.LoratoolError as error:
            self.reply(500, {"error": error.message, "problems": [problem.to_json() for problem in error.problems]})

    def asked(self, query: dict[str, str]) -> tuple[str, list[int], int]:
        adapter, known = query.get("adapter", NONE), self.service.adapters
        if adapter != NONE and adapter not in known:
            raise LookupError(f"no adapter {adapter!r}; there are {', '.join(known)} and {NONE}")
        tokens, count = [int(token) for token in query.get("tokens", "").split(",")], int(query.get("count", 1))
        vocabulary, longest = self.service.limits()
        if not all(0 <= token < vocabulary for token in tokens) or not 0 < count <= longest - len(tokens):
            raise ValueError(f"tokens are below {vocabulary}, and at most {longest} with those to come")
        return adapter, tokens, count

    def reply(self, code: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: object) -> None:
        """No line for each request."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("adapters", nargs="+", metavar="NAME=ADAPTER[@WEIGHT]")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
    given = parser.parse_args()
    adapters = {}
    for text in given.adapters:
        name, _, place = text.partition("=")
        path, at, weight = place.rpartition("@")
        adapters[name] = (Path(path), float(weight)) if at else (Path(place), 1.0)
    try:
        Handler.service = Service(given.base, adapters)
    except loratool.LoratoolError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    server = ThreadingHTTPServer(("127.0.0.1", given.port), Handler)
    server.daemon_threads = False  # the end waits for requests that are being answered
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"http://127.0.0.1:{server.server_port} with {', '.join(adapters)}", flush=True)
    server.serve_forever()
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
