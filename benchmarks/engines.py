"""How sampling and scoring grow with the number of engines, and what the driver and Ray cost a rollout.

    .venv/bin/python benchmarks/engines.py

Engines are stand-ins: each answers `--slots` requests at once, each after `--service-s` seconds, whatever is asked; so two cores
can show what many engines would wait for. Linear is what the engines could give if the driver cost nothing. The driver's own cost
is measured with engines that answer at once; Ray's with a rank that has its scores ready.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import ray

from opd.config import EpisodesConfig, RemoteConfig
from opd.distributed.backend import RankTeachers
from opd.episodes.player import EpisodePlayer, one_turn
from opd.models.loading import load_tokenizer
from opd.records import HiddenPart, HiddenScore, Prompt, Rollout, SampledScore, Score, ScoredRollout, TopKScore, Turn
from opd.remote.client import Client, Endpoint, StaticDeployment
from opd.remote.sampler import RemoteSampler
from opd.remote.teacher import RemoteTeacher
from opd.text.chat import Chat
from opd.text.template import turn_end

STUDENT = "models/smollm2-135m-instruct"
TOKENS, PROMPT, END = 256, 64, 2
WIDTH = 576  # of a teacher's hidden states


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
        text = said(tuple(body["prompt"]), body["prompt_logprobs"]) if "prompt_logprobs" in body else response()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@functools.cache  # the driver is what is timed
def said(tokens: tuple[int, ...], top: int) -> bytes:
    """Scores of a prompt: each token's own, and those of `top` others."""
    each = {"logprob": -0.5123456, "rank": 1, "decoded_token": " word"}
    named = [{str(t): each} | {str(40000 + other): each for other in range(top)} for t in tokens[1:]]
    return json.dumps({"choices": [{"finish_reason": "stop", "prompt_logprobs": [None, *named]}]}).encode()


@functools.cache
def response() -> bytes:
    made = [7] * (TOKENS - PROMPT - 1) + [END]
    choice = {"finish_reason": "stop", "token_ids": made, "logprobs": {"token_logprobs": [-0.5123456] * len(made)}}
    return json.dumps({"choices": [choice]}).encode()


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


def player() -> EpisodePlayer:
    loaded = load_tokenizer(STUDENT)
    end = turn_end(loaded.tokenizer, loaded.generation_config, who="the student")
    assert END in end.ids
    return EpisodePlayer(Chat(loaded.tokenizer), EpisodesConfig(), end_ids=end.ids, make_environment=one_turn)


def measured(what: str, engines: int, slots: int, service_s: float, count: int, top: int = 0) -> float:
    """Rollouts sampled or scored a second; top: how many tokens a score names beside each."""
    servers = start(engines, slots, service_s)
    try:
        urls = tuple(f"http://127.0.0.1:{int(s.stdout.readline())}" for s in servers if s.stdout is not None)
        client = Client(RemoteConfig(max_in_flight=2 * slots))
        model = StaticDeployment(Endpoint("the model", urls, "m"))
        if what == "score":
            teacher, items = RemoteTeacher("t", model, "m", client, top=top), rollouts(count)
            teacher.score(items[: 2 * engines])  # connections are there
            begun = time.perf_counter()
            found = teacher.score(items)
            seconds = time.perf_counter() - begun
            assert all(isinstance(item.score, TopKScore if top else SampledScore) for item in found)
        else:
            sampler = RemoteSampler(
                model, client, temperature=1.0, max_new_tokens=TOKENS, context=None, player=player()
            )
            prompts = [Prompt(f"p{i}", ({"role": "user", "content": "?"},), "t", "task") for i in range(count)]
            sampler.sample(prompts[: 2 * engines], num_samples=1, seed=(0,))
            begun = time.perf_counter()
            made = sampler.sample(prompts, num_samples=1, seed=(1,))
            seconds = time.perf_counter() - begun
            assert all(item.failure is None and item.num_actions == TOKENS - PROMPT for item in made)
        client.close()
        return count / seconds
    finally:
        for server in servers:
            server.kill()
            server.communicate()


class ReadyRank:
    """A rank whose scores are there when it is asked."""

    def score(self, items: list[Rollout], teacher_of: Callable[[Any], Any]) -> list[ScoredRollout]:
        return [ScoredRollout(item, self.one(item, teacher_of(None))) for item in items]

    def one(self, item: Rollout, keep_hidden: bool) -> Score:
        logprobs = np.full(TOKENS, -0.5, dtype=np.float32)
        if not keep_hidden:
            return SampledScore("t", logprobs)
        hidden = np.zeros((item.num_actions, WIDTH), dtype=np.float32)
        return HiddenScore("t", logprobs, (HiddenPart("t", 1.0, hidden),))


class ReadyGroup:
    """One such rank, asked as `opd.distributed.backend` asks its ranks."""

    size = 1

    def __init__(self) -> None:
        self.actor = ray.remote(ReadyRank).options(num_cpus=0).remote()

    def each(self, method: str, args: list[tuple[object, ...]]) -> list[object]:
        return [ray.get(getattr(self.actor, method).remote(*args[0]))]


def through_ray(count: int, *, keep_hidden: bool) -> tuple[float, float]:
    """Milliseconds a rollout to a rank and back with its score, and the MB by which this process has grown meanwhile."""
    teachers = RankTeachers(ReadyGroup(), lambda _: keep_hidden)  # type: ignore[arg-type]  # a stand-in for a group
    items = rollouts(count)
    teachers.score(items[:1])
    before = resident_mb()
    begun = time.perf_counter()
    found = teachers.score(items)
    seconds = time.perf_counter() - begun
    assert len(found) == count
    return 1000 * seconds / count, resident_mb() - before


def resident_mb() -> float:
    """What this process holds, shared memory of Ray's store included."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


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
    print("| | engines | rollouts a second | of linear |\n|---|---|---|---|")
    for what in ("sample", "score"):
        for engines in (1, 2, 4):
            linear = engines * options.slots / options.service_s
            rates = [
                measured(what, engines, options.slots, options.service_s, 20 * engines * options.slots)
                for _ in range(options.rounds)
            ]
            shares = sorted(rate / linear for rate in rates)
            middle, low, high = statistics.median(shares), shares[0], shares[-1]
            said = f"{statistics.median(rates):.1f} | {middle:.3f} [{low:.3f}, {high:.3f}]"
            print(f"| {what} | {engines} | {said} |", flush=True)
    print("\n| | rollouts at once | ms each, driver and stand-in on two cores | driver's peak, MB |\n|---|---|---|---|")
    for what, top in (("sample", 0), ("score", 0), ("score", 20)):
        for count in (64, 256, 1024):
            rate = measured(what, 1, 64, 0.0, count, top)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            name = f"{what}, {top} tokens named" if top else what
            print(f"| {name} | {count} | {1000 / rate:.2f} | {peak:.0f} |", flush=True)
    print("\n| to a rank and back with | rollouts at once | ms each | MB |\n|---|---|---|---|")
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=1)
    for keep_hidden, name in ((False, "sampled scores"), (True, f"hidden states of width {WIDTH}")):
        for count in (64, 256, 1024):
            milliseconds, grown = through_ray(count, keep_hidden=keep_hidden)
            print(f"| {name} | {count} | {milliseconds:.2f} | {grown:.0f} |", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
