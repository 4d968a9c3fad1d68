"""What a server says of the model that it holds, asked before anything is scored."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from opd.config import Config
from opd.errors import ModelError
from opd.records import Prompt
from opd.remote.client import Answer, Call, Client, Endpoint, Refused, Unusable
from opd.remote.endpoints import Fixed, RemoteModel
from opd.remote.protocol import Form
from opd.remote.sglang import SGLANG
from opd.remote.teacher import RemoteTeacher
from opd.remote.vllm import VLLM
from opd.roles import OtherTemplate
from opd.text.chat import Chat
from opd.text.template import clock_of
from opd.text.tokenizer import PROBE

_READ_WHOLE = 2**28  # bytes
_FIRST_S = 20.0  # for what a server knows without computing


def connect_all(config: Config, tokenizer: Any, client: Client) -> dict[str, RemoteTeacher]:
    """The teachers with a url, each asked who it is."""
    found: dict[str, RemoteTeacher] = {}
    for name, teacher in config.teachers.items():
        if teacher.url is not None:
            endpoint = Endpoint(f"teacher '{name}'", teacher.urls, teacher.served_model or "", teacher.api_key_env)
            form = SGLANG if teacher.server == "sglang" else VLLM
            connected = connect(name, endpoint, client, tokenizer, top=_top(config), form=form)
            found[name] = compared(connected, tokenizer, own=teacher.template == "own")
    return found


def connect_started(
    config: Config, tokenizer: Any, client: Client, models: Mapping[str, RemoteModel]
) -> dict[str, RemoteTeacher]:
    """The teachers at engines that this run started, each asked who it is; teachers of one model are one model."""
    found: dict[str, RemoteTeacher] = {}
    for name, model in models.items():
        with model.using():
            endpoint, context, unknown = described(replace(model.newest(), who=f"teacher '{name}'"), client, tokenizer)
        teacher = config.teachers[name]
        # an adapter is merged into the student's base
        sources = [config.student, teacher.adapter] if teacher.adapter else [teacher.model or endpoint.model]
        said = " with ".join(map(_weights_of, sources))
        connected = RemoteTeacher(name, model, said, client, context, _top(config), unknown)
        found[name] = compared(connected, tokenizer, own=teacher.template == "own")
    return found


def compared(teacher: RemoteTeacher, tokenizer: Any, *, own: bool) -> RemoteTeacher:
    """The teacher with what its server says of its chat template, by which it renders a question. It is scored in the student's
    prompts in any case.

    Raises ModelError when it renders the question otherwise than the student, and the recipe wants it in its own prompts (`own`).
    """
    question = Prompt("?", ({"role": "user", "content": "?"},), teacher=teacher.name, task="")
    with teacher.model.using():
        endpoint = teacher.model.newest()
        body = {"model": endpoint.model, "messages": list(question.messages), "add_generation_prompt": True}
        call = Call(
            replace(endpoint, urls=endpoint.urls[:1]), "/tokenize", body, _tokens, attempts=2, timeout_s=_FIRST_S
        )
        reason, theirs = teacher.unknown or ("it writes the time" if clock_of(tokenizer) else ""), None
        if not reason:
            [answer] = teacher.client.ask([call])
            reason, theirs = answer.reason, answer.value
    if theirs is None:  # who wants the student's prompts has nothing to be told
        return replace(teacher, template=OtherTemplate(False, unknown=reason)) if own else teacher
    ours = Chat(tokenizer).encode_prompt(question)
    if theirs == ours:
        return teacher
    said = OtherTemplate(False, tokenizer.decode(ours), tokenizer.decode(theirs))
    if own:
        raise ModelError(
            f"{endpoint.who}: its chat template renders a question as {said.teacher!r}, the student's as {said.student!r}, and a "
            f"server scores the student's own prompts; load it in process (model), or set teachers.{teacher.name}.template = "
            "'student' to score it in them"
        )
    return replace(teacher, template=said)


def _weights_of(source: str) -> str:
    """A model's folder with what tells its weights from others in the same place: every file's name and size, and what small ones
    (an adapter's) hold. A hub id is known by itself."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*.json"), *folder.glob("*.safetensors"))):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        if size <= _READ_WHOLE:
            digest.update(file.read_bytes())
    return f"{source}+{digest.hexdigest()[:32]}"


def _top(config: Config) -> int:
    """How many of its likeliest tokens a server names at each place."""
    return config.objective.top_k if config.objective.type == "top_k" else 0


def connect(
    name: str, endpoint: Endpoint, client: Client, tokenizer: Any, *, top: int = 0, form: Form = VLLM
) -> RemoteTeacher:
    """A teacher at servers that somebody else started (`described`); vLLM's, unless `form` says otherwise."""
    named, context, unknown = described(endpoint, client, tokenizer)
    return RemoteTeacher(name, Fixed(named), named.model, client, context, top, unknown, form)


def described(endpoint: Endpoint, client: Client, tokenizer: Any) -> tuple[Endpoint, int | None, str]:
    """A teacher that answers, whose model is known and whose tokens are the student's: where it is, with its name there; the
    longest sequence that it scores; why its tokenizer could not be compared, "" where it was.

    Raises ModelError when a server does not answer, when it has several models and none is named, when servers of one teacher
    hold different ones, and when it cuts a text otherwise than the student's tokenizer.
    """
    found: dict[str, _Held] = {}
    for url in endpoint.urls:
        one = replace(endpoint, urls=(url,))
        read = partial(_model, wanted=endpoint.model)
        [answer] = client.ask([Call(one, "/v1/models", None, read, timeout_s=_FIRST_S)])
        found[url] = _value(answer)
    models = {held.model for held in found.values()}
    if len(models) > 1:
        said = ", ".join(f"{url}: '{held.model}'" for url, held in found.items())
        raise ModelError(f"{endpoint.who}: its servers hold different models ({said}); name one of each kind a teacher")
    named = replace(endpoint, model=models.pop(), adapter=any(held.adapter for held in found.values()))
    silent = [_compare_tokens(replace(named, urls=(url,)), client, tokenizer) for url in endpoint.urls]
    limits = [held.context for held in found.values() if held.context is not None]
    # vLLM samples one token behind what it scores, and SGLang wants room for one
    context = min(limits) - 1 if limits else None
    return replace(named, context=min(limits, default=None)), context, next(filter(None, silent), "")


class _Held(NamedTuple):
    """The name of the model to ask, the longest sequence that it takes, and whether it is an adapter on another."""

    model: str
    context: int | None
    adapter: bool


def _model(answer: Mapping[str, Any], *, wanted: str) -> _Held:
    """What a server says of the model that is wanted, or of its only one."""
    every = {entry["id"]: entry for entry in answer["data"]}
    said = f"holds {', '.join(map(repr, every)) or 'no model'}"
    # a base that stands beside adapters may not be who is meant
    if not wanted and len(every) != 1:
        raise Refused(said, "name one with served_model")
    name = wanted or next(iter(every))
    if name not in every:
        raise Refused(f"{said}, not '{name}'", "mend served_model")
    entry = every[name]
    above = every.get(entry.get("parent") or "", {})
    context = entry.get("max_model_len") or above.get("max_model_len")
    if context is not None and (not isinstance(context, int) or context < 2):
        raise Unusable(f"max_model_len = {context!r}")
    return _Held(name, context, entry.get("parent") is not None)


def _compare_tokens(endpoint: Endpoint, client: Client, tokenizer: Any) -> str:
    """Why a server could not be asked how it cuts a text; "" where it cuts it as the student does. Raises ModelError where not."""
    text = PROBE + "".join(tokenizer.all_special_tokens)
    body = {"model": endpoint.model, "prompt": text, "add_special_tokens": False}
    [answer] = client.ask([Call(endpoint, "/tokenize", body, _tokens)])
    if answer.value is None:
        return answer.reason
    ours = list(tokenizer(text, add_special_tokens=False).input_ids)
    if answer.value != ours:
        pairs = zip(ours, answer.value, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(answer.value)))
        raise ModelError(
            f"{endpoint.who}: '{endpoint.model}' at {endpoint.urls[0]} has another tokenizer than the student (a text of "
            f"{len(ours)} tokens has {len(answer.value)} there, the first other one at place {first}); a served teacher scores the "
            "student's own tokens: load this one in process (model)"
        )
    return ""


def _tokens(answer: Mapping[str, Any]) -> list[int]:
    return [int(token) for token in answer["tokens"]]


def _value(answer: Answer[_Held]) -> _Held:
    if answer.value is None:
        raise ModelError(f"{answer.reason}; {answer.fix or 'start the server, or mend its url'}")
    return answer.value
