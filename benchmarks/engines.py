"""How scoring grows with the number of engines, and what the driver itself costs a rollout.

    .venv/bin/python benchmarks/engines.py

Engines are stand-ins: each answers `--slots` requests at once, each after `--service-s` seconds, whatever is asked; so two cores
can show what many engines would wait for. Linear is what the engines could give if the driver cost nothing. The driver's own cost
is measured with engines that answer at once.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from opd.config import ServedConfig
from opd.records import Prompt, Rollout, Turn
from opd.served.model import Fixed
from opd.served.teacher import ServedTeacher
from opd.served.wire import Endpoint, Wire

TOKENS, PROMPT, END = 256, 64, 2


class Handler(BaseHTTPRequestHandler):
    """Answers like vLLM, with made-up numbers."""

    protocol_version = "HTTP/1.1"
    slots: threading.Semaphore
    service_s: float

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.slots:
            time.sleep(self.service_s)
        choice: dict[str, object] = {"finish_reason": "stop"}
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [None, *({str(t): {"logprob": -0.5, "rank": 1}} for t in body["prompt"][1:])]
        else:
            made = [7] * (TOKENS - PROMPT - 1) + [END]
            choice |= {"token_ids": made, "logprobs": {"token_logprobs": [-0.5] * len(made)}}
        text = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def serve(slots: int, service_s: float) -> None:
    """One engine, until its standard input ends; prints its port."""
    Handler.slots, Handler.service_s = threading.Semaphore(slots), service_s
    ThreadingHTTPServer.request_queue_size = 1024  # many connect at once
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


def start(count: int, slots: int, service_s: float) -> list[subprocess.Popen[str]]:
    command = [sys.executable, __file__, "--serve", "--slots", str(slots), "--service-s", str(service_s)]
    return [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]


def rollouts(count: int) -> list[Rollout]:
    prompt = Prompt("p", ({"role": "user", "content": "?"},), "t", "task")
    turns = (Turn("prompt", 0, PROMPT), Turn("student", PROMPT, TOKENS))
    return [
        Rollout(
            prompt=prompt,
            sample=i,
            token_ids=np.full(TOKENS, 7, dtype=np.int32),
            loss_mask=np.arange(TOKENS) >= PROMPT,
            rollout_logprobs=np.full(TOKENS, -0.5, dtype=np.float32),
            turns=turns,
            messages=prompt.messages,
            finish="end",
            policy_version=0,
        )
        for i in range(count)
    ]


def measured(engines: int, slots: int, service_s: float, count: int) -> float:
    """Rollouts scored a second."""
    servers = start(engines, slots, service_s)
    try:
        urls = tuple(f"http://127.0.0.1:{int(s.stdout.readline())}" for s in servers if s.stdout is not None)
        wire = Wire(ServedConfig(max_in_flight=2 * slots))
        teacher = ServedTeacher("t", Fixed(Endpoint("teacher 't'", urls, "m")), "m", wire)
        items = rollouts(count)
        teacher.score(items[: 2 * engines])  # connections are there
        begun = time.perf_counter()
        found = teacher.score(items)
        seconds = time.perf_counter() - begun
        assert all(hasattr(item.score, "logprobs") for item in found)
        wire.close()
        return count / seconds
    finally:
        for server in servers:
            server.kill()
            server.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="be one engine")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--service-s", type=float, default=0.4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.serve:
        serve(options.slots, options.service_s)
        return
    print(f"{TOKENS} tokens a rollout; engines of {options.slots} slots, {options.service_s} s a request")
    print("| engines | rollouts a second | of linear |\n|---|---|---|")
    for engines in (1, 2, 4):
        linear = engines * options.slots / options.service_s
        rates = [
            measured(engines, options.slots, options.service_s, 20 * engines * options.slots)
            for _ in range(options.rounds)
        ]
        shares = sorted(rate / linear for rate in rates)
        middle, low, high = statistics.median(shares), shares[0], shares[-1]
        print(f"| {engines} | {statistics.median(rates):.1f} | {middle:.3f} [{low:.3f}, {high:.3f}] |", flush=True)
    print("\n| rollouts at once | ms each, driver and stand-in on two cores | driver's peak, MB |\n|---|---|---|")
    for count in (64, 256, 1024):
        rate = measured(1, 64, 0.0, count)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"| {count} | {1000 / rate:.2f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
