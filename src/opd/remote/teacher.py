"""Teachers behind servers: their model, whether its tokens and its chat template are the student's, and their scores."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opd.config import Config
from opd.config.teachers import ServerKind
from opd.episodes.player import EpisodePlayer
from opd.errors import ModelError
from opd.records import FailedScore, Prompt, Rollout, SampledScore, Score, ScoredRollout, TopKScore
from opd.remote.client import BadAnswer, Client, Deployment, Endpoint, Refused, Request, StaticDeployment
from opd.remote.protocol_base import Scores, ServerProtocol
from opd.remote.protocols import protocol_of
from opd.remote.sampler import RemoteSampler
from opd.remote.vllm import VllmProtocol
from opd.roles import Limit, OtherTemplate, Teacher, TeacherFacts
from opd.text.chat import Chat
from opd.text.template import clock_of, variables_of
from opd.text.tokenizer import PROBE

_HASHED_WHOLE = 2**28  # bytes
_FIRST_S = 20.0  # for answers that need no computation


@dataclass(frozen=True)
class RemoteTeacher:
    """A model behind servers with the student's tokens. identity: its name there, or its weights. context: the longest sequence
    that it scores, in tokens. top: how many of its likeliest tokens it returns at each place (0: none). unknown: why its tokenizer
    could not be compared with the student's, "" where it was. template: both renderings of a prompt, where its chat template may
    differ from the student's."""

    name: str
    deployment: Deployment
    identity: str
    client: Client
    context: int | None = None
    top: int = 0
    unknown: str = ""
    protocol: ServerProtocol = field(default_factory=VllmProtocol)
    template: OtherTemplate | None = None

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """The scores of rollouts in order, requested all at once. A FailedScore says why the server gave none."""
        fits = [i for i, r in enumerate(rollouts) if self.context is None or len(r.token_ids) <= self.context]
        with self.deployment.in_use():
            endpoint = self.deployment.latest()
            requests = [self._request(endpoint, rollouts[i].token_ids) for i in fits]
            answers = self.client.send_to(self.deployment, requests)
        found: dict[int, ScoredRollout] = {}
        for i, answer in zip(fits, answers, strict=True):
            if answer.value is None:
                score: Score = FailedScore(self.name, answer.reason, lost=True)
            else:
                score = self._score(rollouts[i], answer.value)
            found[i] = ScoredRollout(rollouts[i], score, retries=answer.retries)
        return [found[i] if i in found else self._too_long(r) for i, r in enumerate(rollouts)]

    def sampler(self, config: Config, player: EpisodePlayer) -> RemoteSampler:
        """A sampler of this teacher, which reads prompts as the player writes them."""
        return RemoteSampler(
            self.deployment,
            self.client,
            temperature=config.temperature,
            max_new_tokens=config.sampling.max_new_tokens,
            context=None,
            player=player,
            protocol=self.protocol,
        )

    def _request(self, endpoint: Endpoint, token_ids: np.ndarray) -> Request[Scores]:
        ids = token_ids.tolist()
        body = self.protocol.score_body(endpoint, ids, top=self.top)
        read = partial(self.protocol.read_scores, token_ids=ids, top=self.top)
        return Request(endpoint, self.protocol.path, body, read, decoder=self.protocol.score_decoder)

    def _score(self, rollout: Rollout, found: Scores) -> Score:
        mask = rollout.loss_mask
        logprobs = np.where(mask, found.logprobs, np.float32(0))
        if not self.top:
            return SampledScore(self.name, logprobs)
        return TopKScore(self.name, logprobs, found.ids[mask], found.top_k_logprobs[mask])

    def _too_long(self, rollout: Rollout) -> ScoredRollout:
        reason = f"{len(rollout.token_ids)} tokens exceed the context of teacher '{self.name}' ({self.context})"
        return ScoredRollout(rollout, FailedScore(self.name, reason))


class LocalAndRemoteTeachers:
    """Teachers behind servers and teachers in process; both kinds score at the same time."""

    def __init__(self, local: Teacher, remote: Mapping[str, RemoteTeacher]) -> None:
        self._local = local
        self._remote = dict(remote)

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Each rollout with its own teacher's score, in the order given."""
        local = [i for i, r in enumerate(rollouts) if r.prompt.teacher not in self._remote]
        remote: dict[str, list[int]] = {}
        for i, r in enumerate(rollouts):
            if r.prompt.teacher in self._remote:
                remote.setdefault(r.prompt.teacher, []).append(i)
        with ThreadPoolExecutor(max(1, len(remote)), thread_name_prefix="opd-remote") as pool:
            waiting = [
                (places, pool.submit(self._remote[name].score, [rollouts[i] for i in places]))
                for name, places in remote.items()
            ]
            found = dict(zip(local, self._local.score([rollouts[i] for i in local]) if local else [], strict=True))
            for places, scored in waiting:
                found |= dict(zip(places, scored.result(), strict=True))
        return [found[i] for i in range(len(rollouts))]


def identities_of(remote: Mapping[str, RemoteTeacher]) -> dict[str, str]:
    """The models at servers, which must not change during a run."""
    return {f"teacher '{name}'": f"served model '{teacher.identity}'" for name, teacher in remote.items()}


def with_servers(facts: TeacherFacts, remote: Mapping[str, RemoteTeacher]) -> TeacherFacts:
    """The facts of the other teachers, and of those behind servers."""
    contexts = {name: None if t.context is None else Limit(t.context) for name, t in remote.items()}
    templates = {name: t.template for name, t in remote.items() if t.template is not None}
    return replace(
        facts,
        contexts={**facts.contexts, **contexts},
        without_distributions=facts.without_distributions | remote.keys(),
        unknown_tokenizers={name: t.unknown for name, t in remote.items()},
        templates={**facts.templates, **templates},
    )


def connect_all(config: Config, tokenizer: Any, client: Client) -> dict[str, RemoteTeacher]:
    """The teachers with a url, checked against their servers. Raises ModelError."""
    found: dict[str, RemoteTeacher] = {}
    for name, teacher in config.teachers.items():
        if teacher.url is not None:
            endpoint = Endpoint(f"teacher '{name}'", teacher.urls, teacher.served_model or "", teacher.api_key_env)
            connected = connect(name, endpoint, client, tokenizer, top=_top(config), kind=teacher.server)
            found[name] = compare_templates(connected, tokenizer, own=teacher.template == "own")
    return found


def connect_started(
    config: Config, tokenizer: Any, client: Client, deployments: Mapping[str, Deployment]
) -> dict[str, RemoteTeacher]:
    """The teachers at engines that this run started, checked against them; teachers of one model share a deployment."""
    found: dict[str, RemoteTeacher] = {}
    for name, deployment in deployments.items():
        with deployment.in_use():
            endpoint = replace(deployment.latest(), who=f"teacher '{name}'")
            endpoint, context, unknown = discover(endpoint, client, tokenizer)
        teacher = config.teachers[name]
        # an adapter is merged into the student's base
        sources = [config.student, teacher.adapter] if teacher.adapter else [teacher.model or endpoint.model]
        identity = " with ".join(map(_weights_of, sources))
        connected = RemoteTeacher(name, deployment, identity, client, context, _top(config), unknown)
        found[name] = compare_templates(connected, tokenizer, own=teacher.template == "own")
    return found


def compare_templates(teacher: RemoteTeacher, tokenizer: Any, *, own: bool) -> RemoteTeacher:
    """The teacher with the result of comparing chat templates: its server and the student each render a question. A remote teacher
    scores the student's prompts in any case.

    Raises ModelError when the renderings differ and the recipe wants the teacher's own prompts (`own`).
    """
    question = Prompt("?", ({"role": "user", "content": "?"},), teacher=teacher.name, task="")
    with teacher.deployment.in_use():
        endpoint = teacher.deployment.latest()
        body = {"model": endpoint.model, "messages": list(question.messages), "add_generation_prompt": True}
        if variables := variables_of(tokenizer):
            body["chat_template_kwargs"] = variables
        first = replace(endpoint, urls=endpoint.urls[:1])
        reason, theirs = teacher.unknown or ("it writes the time" if clock_of(tokenizer) else ""), None
        if not reason:
            [answer] = teacher.client.send([Request(first, "/tokenize", body, _tokens, attempts=2, timeout_s=_FIRST_S)])
            reason, theirs = answer.reason, answer.value
    if theirs is None:  # a recipe that wants the student's prompts needs no comparison
        return replace(teacher, template=OtherTemplate(False, unknown=reason)) if own else teacher
    ours = Chat(tokenizer).encode_prompt(question)
    if theirs == ours:
        return teacher
    found = OtherTemplate(False, tokenizer.decode(ours), tokenizer.decode(theirs))
    if own:
        raise ModelError(
            f"{endpoint.who}: its chat template renders a question as {found.teacher!r}, the student's as {found.student!r}, and a "
            f"server scores the student's own prompts; load it in process (model), or set teachers.{teacher.name}.template = "
            "'student' to score it in them"
        )
    return replace(teacher, template=found)


def _weights_of(source: str) -> str:
    """A model's folder with a hash that changes with its weights: of every file's name and size, and of the content of small files
    (an adapter's). A hub id stays as it is."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*.json"), *folder.glob("*.safetensors"))):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        if size <= _HASHED_WHOLE:
            digest.update(file.read_bytes())
    return f"{source}+{digest.hexdigest()[:32]}"


def _top(config: Config) -> int:
    """How many of its likeliest tokens a server returns at each place."""
    return config.objective.top_k if config.objective.type == "top_k" else 0


def connect(
    name: str, endpoint: Endpoint, client: Client, tokenizer: Any, *, top: int = 0, kind: ServerKind = "vllm"
) -> RemoteTeacher:
    """A teacher at servers that this run did not start. Raises ModelError (`discover`)."""
    named, context, unknown = discover(endpoint, client, tokenizer)
    return RemoteTeacher(name, StaticDeployment(named), named.model, client, context, top, unknown, protocol_of(kind))


def discover(endpoint: Endpoint, client: Client, tokenizer: Any) -> tuple[Endpoint, int | None, str]:
    """The endpoint with the model's name; the longest sequence that it scores, in tokens; why its tokenizer could not be compared
    with the student's, "" where the two agree.

    Raises ModelError when a server does not answer, when it has several models and the recipe names none, when servers of one
    teacher hold different models, and when its tokenizer differs from the student's.
    """
    found: dict[str, _ServedModel] = {}
    for url in endpoint.urls:
        one = replace(endpoint, urls=(url,))
        read = partial(_served_model, wanted=endpoint.model)
        [answer] = client.send([Request(one, "/v1/models", None, read, timeout_s=_FIRST_S)])
        if answer.value is None:
            raise ModelError(f"{answer.reason}; {answer.fix or 'start the server, or fix its url'}")
        found[url] = answer.value
    models = {served.model for served in found.values()}
    if len(models) > 1:
        each = ", ".join(f"{url}: '{served.model}'" for url, served in found.items())
        raise ModelError(f"{endpoint.who}: its servers hold different models ({each}); make one teacher of each model")
    named = replace(endpoint, model=models.pop(), adapter=any(served.adapter for served in found.values()))
    unknown = [_compare_tokens(replace(named, urls=(url,)), client, tokenizer) for url in endpoint.urls]
    limits = [served.context for served in found.values() if served.context is not None]
    # vLLM samples one token after the scored ones, and SGLang needs room for one
    context = min(limits) - 1 if limits else None
    return replace(named, context=min(limits, default=None)), context, next(filter(None, unknown), "")


class _ServedModel(NamedTuple):
    """The model's name at a server, the longest sequence that it takes in tokens, and whether it is an adapter."""

    model: str
    context: int | None
    adapter: bool


def _served_model(answer: Mapping[str, Any], *, wanted: str) -> _ServedModel:
    """The server's entry of the wanted model, or of its only one."""
    every = {entry["id"]: entry for entry in answer["data"]}
    holds = f"holds {', '.join(map(repr, every)) or 'no model'}"
    # with adapters beside it, the base may not be the model that the user means
    if not wanted and len(every) != 1:
        raise Refused(holds, "name one with served_model")
    name = wanted or next(iter(every))
    if name not in every:
        raise Refused(f"{holds}, not '{name}'", "fix served_model")
    entry = every[name]
    parent = every.get(entry.get("parent") or "", {})
    context = entry.get("max_model_len") or parent.get("max_model_len")
    if context is not None and (not isinstance(context, int) or context < 2):
        raise BadAnswer(f"max_model_len = {context!r}")
    return _ServedModel(name, context, entry.get("parent") is not None)


def _compare_tokens(endpoint: Endpoint, client: Client, tokenizer: Any) -> str:
    """Why a server's tokenizer could not be compared; "" where it gives the student's tokens. Raises ModelError for others."""
    text = PROBE + "".join(tokenizer.all_special_tokens)
    body = {"model": endpoint.model, "prompt": text, "add_special_tokens": False}
    [answer] = client.send([Request(endpoint, "/tokenize", body, _tokens)])
    if answer.value is None:
        return answer.reason
    ours = list(tokenizer(text, add_special_tokens=False).input_ids)
    if answer.value != ours:
        pairs = zip(ours, answer.value, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(answer.value)))
        raise ModelError(
            f"{endpoint.who}: '{endpoint.model}' at {endpoint.urls[0]} has another tokenizer than the student (a text of "
            f"{len(ours)} tokens has {len(answer.value)} there; they differ first at place {first}). A remote teacher scores the "
            "student's own tokens: load this one in process (model)"
        )
    return ""


def _tokens(answer: Mapping[str, Any]) -> list[int]:
    return [int(token) for token in answer["tokens"]]
