"""A server that answers as SGLang does for a toy model."""

from collections.abc import Callable
from typing import Any

import torch
from factories import merged_model
from transformers import LlamaForCausalLM
from vllm_like import Fault, Handler, ToyServer


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
            return scores(model, body) if "logprob_start_len" in body else response(model, body)


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
def scores(model: LlamaForCausalLM, body: dict[str, Any]) -> dict[str, Any]:
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
def response(model: LlamaForCausalLM, body: dict[str, Any]) -> dict[str, Any]:
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


def changed(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Fault:
    """The right answer but for one change to it, or to its meta_info."""

    def fault(handler: Handler, body: dict[str, Any]) -> None:
        answer = handler.answer(body)
        change(answer, answer["meta_info"])
        handler.say(answer)

    return fault
