"""Servers that answer as vLLM and SGLang do for a toy model, or as broken ones do."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from factories import byte_tokenizer, merged_model
from transformers import LlamaForCausalLM

Fault = Callable[["Handler", dict[str, Any]], None]
"""What a server does instead of answering."""


class ToyServer(ThreadingHTTPServer):
    """A toy model behind HTTP. faults: by the number of the request to /v1/completions, from 0, what happens to it."""

    daemon_threads = True

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        name: str = "toy",
        context: int = 256,
        key: str | None = None,
        at: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        super().__init__(at, Handler)
        self.model, self.name, self.context, self.key = model, name, context, key
        self.adapters: dict[str, LlamaForCausalLM] = {}
        self.tokenizer = byte_tokenizer()
        self.lock = threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.managed: list[str] = []
        self.asleep = False
        self.faults: Callable[[int], Fault | None] = lambda number: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def manage(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What a server of vLLM does in its development mode."""
        what, _, how = path.removeprefix("/").partition("?")
        self.managed.append(what)
        if what == "sleep":
            assert how == "level=1&mode=wait"
        if what == "pause":
            assert how == "mode=wait&clear_cache=true"
        if what == "collective_rpc":
            assert self.managed[-2] == "pause", self.managed
            assert body["method"] == "reload_weights"
            self.model = LlamaForCausalLM.from_pretrained(body["kwargs"]["weights_path"], dtype=torch.float32).eval()
        if what in ("sleep", "wake_up"):
            self.asleep = what == "sleep"
        return {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some tests want."""


class Handler(BaseHTTPRequestHandler):
    server: ToyServer
    protocol_version = "HTTP/1.1"
    counted = "/v1/completions"

    def log_message(self, *args: Any) -> None:
        pass

    def say(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.say_bytes(json.dumps(body).encode(), status, headers)

    def say_bytes(self, text: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(text)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def allowed(self) -> bool:
        key = self.server.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        # some servers repeat what they were given
        self.say({"error": {"message": f"bad key: {self.headers.get('Authorization')}"}}, 401)
        return False

    def do_GET(self) -> None:
        if self.path == "/health":
            self.say({})
        elif self.allowed():
            entry = {"id": self.server.name, "max_model_len": self.server.context, "parent": None}
            beside = [{"id": name, "parent": self.server.name} for name in self.server.adapters]
            self.say({"object": "list", "data": [entry, *beside]})

    def tokens_of(self, body: dict[str, Any]) -> list[int]:
        """Of a text, or of a conversation in the model's own chat template."""
        tokenizer = self.server.tokenizer
        if "prompt" in body:
            return tokenizer(body["prompt"], add_special_tokens=False).input_ids
        generate = body["add_generation_prompt"]
        return tokenizer.apply_chat_template(
            body["messages"],
            add_generation_prompt=generate,
            tokenize=True,
            return_dict=False,
            **body.get("chat_template_kwargs", {}),
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        if not self.allowed():
            return
        if self.path == "/tokenize":
            self.say({"tokens": self.tokens_of(body)})
            return
        if self.path == "/v1/load_lora_adapter":
            self.server.adapters[body["lora_name"]] = merged_model(self.server.model.name_or_path, body["lora_path"])
            self.say({})
            return
        if self.path == "/v1/unload_lora_adapter":
            del self.server.adapters[body["lora_name"]]
            self.say({})
            return
        if self.path.startswith(("/pause", "/resume", "/collective_rpc", "/sleep", "/wake_up")):
            self.say(self.server.manage(self.path, body))
            return
        if self.path != self.counted:
            self.say({"detail": "Not Found"}, 404)
            return
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(body)
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        try:
            fault = self.server.faults(number)
            if fault is None:
                self.say(self.answer(body))
            else:
                fault(self, body)
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        assert not self.server.asleep, "asked while it sleeps"
        model = self.server.model if body["model"] == self.server.name else self.server.adapters[body["model"]]
        with self.server.lock:  # one forward pass at a time, as the tests run on one thread
            return {"choices": [scores(model, body) if "prompt_logprobs" in body else response(model, body)]}


@torch.no_grad()
def scores(model: LlamaForCausalLM, body: dict[str, Any]) -> dict[str, Any]:
    """The log-probability of each token of a prompt, and of the likeliest beside it."""
    ids = torch.tensor(body["prompt"])
    every = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    found: list[dict[str, Any] | None] = [None]
    for place in range(1, len(ids)):
        row = every[place - 1]
        chosen = [int(ids[place]), *row.topk(body["prompt_logprobs"]).indices.tolist()]
        found.append({str(t): {"logprob": float(row[t]), "rank": 1, "decoded_token": "?"} for t in chosen})
    return {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": found}


@torch.no_grad()
def response(model: LlamaForCausalLM, body: dict[str, Any]) -> dict[str, Any]:
    """A response, drawn by the request's seed."""
    generator = torch.Generator().manual_seed(body["seed"])
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body["stop_token_ids"]):
        row = model(input_ids=torch.tensor([body["prompt"] + tokens])).logits[0, -1].double()
        row = (row / body["temperature"]).log_softmax(-1)
        tokens.append(int(torch.multinomial(row.exp(), 1, generator=generator)))
        logprobs.append(float(row[tokens[-1]]))
    finish = "stop" if tokens[-1] in body["stop_token_ids"] else "length"
    return {
        "index": 0,
        "text": "",
        "finish_reason": finish,
        "token_ids": tokens,
        "logprobs": {"token_logprobs": logprobs},
    }


@contextmanager
def serving(model: LlamaForCausalLM, *, kind: type[ToyServer] = ToyServer, **options: Any) -> Iterator[ToyServer]:
    server = kind(model, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def status(code: int, **headers: str) -> Fault:
    def fault(handler: Handler, body: dict[str, Any]) -> None:
        handler.say({"error": {"message": "not now", "code": code}}, code, headers)

    return fault


def reset(handler: Handler, body: dict[str, Any]) -> None:
    """The connection is torn down."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def hang(handler: Handler, body: dict[str, Any]) -> None:
    """Nothing comes for longer than anybody waits."""
    time.sleep(3)


def drip(handler: Handler, body: dict[str, Any]) -> None:
    """A byte now and then, so that no single read takes too long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def truncated(handler: Handler, body: dict[str, Any]) -> None:
    """JSON that ends in its middle, with a length that fits."""
    handler.say_bytes(json.dumps(handler.answer(body)).encode()[:-20])


def cut_off(handler: Handler, body: dict[str, Any]) -> None:
    """Fewer bytes than were promised."""
    text = json.dumps(handler.answer(body)).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    handler.wfile.write(text[:-20])
    handler.close_connection = True


def rubbish(handler: Handler, body: dict[str, Any]) -> None:
    handler.say_bytes(b"<html>502 Bad Gateway</html>")


def other_form(handler: Handler, body: dict[str, Any]) -> None:
    handler.say([1, 2, 3])


def changed(change: Callable[[dict[str, Any]], None]) -> Fault:
    """The right answer but for one change to its choice."""

    def fault(handler: Handler, body: dict[str, Any]) -> None:
        answer = handler.answer(body)
        change(answer["choices"][0])
        handler.say(answer)

    return fault


class SglangHandler(Handler):
    counted = "/generate"

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            super().do_GET()
        elif self.allowed():
            cards = [{"id": self.server.name, "max_model_len": self.server.context, "parent": None}]
            cards += [{"id": n, "max_model_len": None, "parent": self.server.name} for n in self.server.adapters]
            self.say({"object": "list", "data": cards})

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        model = self.server.adapters[body["lora_path"]] if "lora_path" in body else self.server.model
        assert body["return_logprob"] is True
        with self.server.lock:
            return sglang_scores(model, body) if "logprob_start_len" in body else sglang_response(model, body)


class SglangServer(ToyServer):
    """A toy model behind HTTP. faults: by the number of the request to /generate, from 0, what happens to it."""

    def __init__(self, model: LlamaForCausalLM, **options: Any) -> None:
        super().__init__(model, **options)
        self.RequestHandlerClass = SglangHandler

    def adapt(self, name: str, folder: str, base: str) -> None:
        """Hold an adapter beside the model."""
        self.adapters[name] = merged_model(base, folder)


def entries(row: torch.Tensor, ids: list[int]) -> list[list[Any]]:
    return [[float(row[i]), i, None] for i in ids]


@torch.no_grad()
def sglang_scores(model: LlamaForCausalLM, body: dict[str, Any]) -> dict[str, Any]:
    """Of each token of a prompt its log-probability, whatever the temperature; the vocabulary's last id goes by 0."""
    assert body["logprob_start_len"] == 0
    assert body["sampling_params"]["max_new_tokens"] == 0
    ids, top = body["input_ids"], body["top_logprobs_num"]
    every = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    last = model.config.vocab_size - 1
    own: list[list[Any]] = [[None, ids[0] if ids[0] < last else 0, None]]
    likeliest: list[Any] = [None]
    for place in range(1, len(ids)):
        row = every[place - 1]
        own.append([float(row[ids[place]]), ids[place] if ids[place] < last else 0, None])
        likeliest.append(entries(row, row.topk(top).indices.tolist()) if top else None)
    meta: dict[str, Any] = {
        "id": "x",
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": len(ids),
        "completion_tokens": 0,
        "input_token_logprobs": own,
        "output_token_logprobs": [],
    }
    return {"text": "", "output_ids": [], "meta_info": meta | ({"input_top_logprobs": likeliest} if top else {})}


@torch.no_grad()
def sglang_response(model: LlamaForCausalLM, body: dict[str, Any]) -> dict[str, Any]:
    """A response, drawn by the request's seed; the stop token is part of it."""
    asked = body["sampling_params"]
    generator = torch.Generator().manual_seed(asked["sampling_seed"])
    tokens: list[int] = []
    own: list[list[Any]] = []
    while len(tokens) < asked["max_new_tokens"] and not (tokens and tokens[-1] in asked["stop_token_ids"]):
        row = model(input_ids=torch.tensor([body["input_ids"] + tokens])).logits[0, -1].double()
        row = (row / asked["temperature"]).log_softmax(-1)
        tokens.append(int(torch.multinomial(row.exp(), 1, generator=generator)))
        own += entries(row, tokens[-1:])
    stopped = tokens[-1] in asked["stop_token_ids"]
    reason = {"type": "stop", "matched": tokens[-1]} if stopped else {"type": "length", "length": len(tokens)}
    return {"text": "", "output_ids": tokens, "meta_info": {"finish_reason": reason, "output_token_logprobs": own}}


def sglang_changed(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Fault:
    """The right answer but for one change to it, or to its meta_info."""

    def fault(handler: Handler, body: dict[str, Any]) -> None:
        answer = handler.answer(body)
        change(answer, answer["meta_info"])
        handler.say(answer)

    return fault
