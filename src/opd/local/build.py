"""From a configuration to the local backend: which weights are loaded, each once, and which policies use them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from opd.config import AlignmentConfig, ComputeConfig, Config, SftConfig
from opd.episodes.player import MakeEnvironment, one_turn
from opd.errors import ModelError
from opd.local.backend import LocalBackend
from opd.local.sampler import chat_of
from opd.local.teacher import CrossTokenizerPolicy, Part, Policy, Target
from opd.models.loading import load_network
from opd.models.lora import add_adapter, add_student_adapter
from opd.models.network import Network
from opd.remote.client import Client
from opd.remote.teacher import RemoteTeacher, connect_all
from opd.roles import INITIAL_STUDENT
from opd.text.student_text import StudentSide
from opd.text.teacher_prompt import OwnPrompt, same_template
from opd.text.teacher_text import TeacherSide
from opd.text.template import freeze, require_variables, set_variables, turn_end
from opd.text.tokenizer import described_token, difference, ids_without_rows, shared_vocabulary

_INITIAL = "student"  # objective.reference: the student as it was before the first step


def build(
    config: Config,
    make_environment: MakeEnvironment = one_turn,
    *,
    remote: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> LocalBackend:
    """Load the student and every teacher, each set of weights once; `remote=False` leaves out the teachers behind servers.

    say: shows a line before each model that is loaded.

    Adapter teachers live on the student's own base while that base stays as it is (`trainable = "lora"`); when the whole
    student is trained they share one frozen copy. Raises ModelError when a teacher does not fit.
    """
    config = config.started()
    say(f"loading student '{config.student}'")
    network = _student(config)
    lora = config.trainable == "lora"
    loaded: dict[str, Network] = {}
    if lora:
        loaded[_kept_as(config.student, config.compute, config.chat.template_args)] = network
    policies = _policies(config, loaded, say)
    cross_tokenizer = _cross_tokenizer(config, network, policies)
    same_tokenizer = {name: policy for name, policy in policies.items() if name not in cross_tokenizer}
    same_tokenizer |= _with_own_prompts(config, network, same_tokenizer)
    sharing = dict.fromkeys([network, *(policy.network for policy in same_tokenizer.values())])
    narrowest = min(sharing, key=lambda n: n.vocab_size)
    _require_rows(network, narrowest.vocab_size, narrowest.source)
    for each in sharing:
        each.vocab_size = narrowest.vocab_size
    connected = _connected(config, network.tokenizer) if remote else {}
    targets: dict[str, Target] = {
        name: cross_tokenizer.get(name) or _target(config, name, same_tokenizer)
        for name, teacher in config.teachers.items()
        if not teacher.remote
    }
    followed = {name: _extrapolated(config, target, same_tokenizer) for name, target in targets.items()}
    return LocalBackend(
        config,
        Policy(network, "student" if lora else None),
        {name: cross_tokenizer.get(name) or same_tokenizer[name] for name in policies},
        targets,
        followed,
        connected,
        make_environment,
    )


def _policies(config: Config, loaded: dict[str, Network], say: Callable[[str], None]) -> dict[str, Policy]:
    """Every model in process that scores, by name; those that `loaded` lacks are loaded into it."""
    policies: dict[str, Policy] = {}
    for index, (name, teacher) in enumerate(config.teachers.items()):
        if teacher.weights is not None or teacher.remote:
            continue
        source = teacher.model or config.student
        variables = config.chat.template_args if teacher.template_args is None else teacher.template_args
        compute = config.compute
        if teacher.model is not None:
            compute = compute.model_copy(
                update={"dtype": teacher.dtype or compute.dtype, "quantization": teacher.quantization}
            )
        kept_as = _kept_as(source, compute, variables)
        if kept_as not in loaded:
            say(f"loading teacher '{name}': '{source}'")
            loaded[kept_as] = _load(source, config, compute)
            if teacher.template_args is not None:
                tokenizer = loaded[kept_as].tokenizer
                require_variables(tokenizer, variables, key=f"teachers.{name}.template_args", source=source)
                set_variables(tokenizer, variables)
        adapter = None
        if teacher.adapter is not None:
            adapter = f"teacher{index}"  # a name of our own: peft refuses some, and a teacher may be called "student"
            add_adapter(loaded[kept_as], teacher.adapter, teacher=name, name=adapter)
        policies[name] = Policy(loaded[kept_as], adapter)
    if config.objective.reference == _INITIAL:
        student = _kept_as(config.student, config.compute, config.chat.template_args)
        if student not in loaded:
            loaded[student] = _load(config.student, config, config.compute)
        # A fresh adapter changes nothing before the first step: its base is the student as it was.
        if config.lora.start is not None:
            add_adapter(loaded[student], config.lora.start, teacher=INITIAL_STUDENT, name="initial")
        policies[INITIAL_STUDENT] = Policy(loaded[student], None if config.lora.start is None else "initial")
    return policies


def _kept_as(source: str, compute: ComputeConfig, variables: Mapping[str, Any]) -> str:
    """The name under which a model is loaded once for all that want the same of it."""
    return json.dumps([source, compute.dtype, compute.quantization, variables], sort_keys=True)


def _connected(config: Config, tokenizer: Any) -> dict[str, RemoteTeacher]:
    """The teachers behind servers, which share one client: closing one closes the connections of all."""
    if not any(teacher.url for teacher in config.teachers.values()):
        return {}
    client = Client(config.remote)
    try:
        return connect_all(config, tokenizer, client)
    except BaseException:
        client.close()
        raise


def _target(config: Config, name: str, policies: Mapping[str, Policy]) -> Target:
    """A teacher's policy, or the policies of a mixture, with weights that sum to one."""
    weights = config.teachers[name].weights or {name: 1.0}
    total = sum(weights.values())
    return tuple(Part(part, policies[part], weight / total) for part, weight in weights.items())


def _extrapolated(config: Config, target: Target, policies: Mapping[str, Policy]) -> Target:
    """lambda log q + (1 - lambda) log pi_ref: with lambda above 1 away from the reference, past the teacher."""
    weight, reference = config.objective.extrapolation, config.objective.reference
    if reference is None or isinstance(target, CrossTokenizerPolicy):
        return target
    name = INITIAL_STUDENT if reference == _INITIAL else reference
    scaled = tuple(replace(part, weight=weight * part.weight) for part in target)
    return (*scaled, Part(name, policies[name], 1.0 - weight))


def _load(source: str, config: Config | SftConfig, compute: ComputeConfig) -> Network:
    """A model with a chat template that reads the run's clock and variables."""
    network = load_network(source, compute)
    set_variables(network.tokenizer, config.chat.template_args)
    if config.template_time is not None:
        freeze(network.tokenizer, config.template_time)
    return network


def build_student(config: Config | SftConfig) -> Policy:
    """The student alone, without teachers: to fine-tune it, or to write it."""
    network = _student(config.started())
    _require_rows(network, network.vocab_size, network.source)
    return Policy(network, "student" if config.trainable == "lora" else None)


def _student(config: Config | SftConfig) -> Network:
    """The network of the student, with its adapter where one trains."""
    if config.compute.threads:
        torch.set_num_threads(config.compute.threads)
    network = _load(config.student, config, config.compute)
    require_variables(network.tokenizer, config.chat.template_args, key="chat.template_args", source=config.student)
    if config.trainable == "lora":
        add_student_adapter(network, config.lora, seed=config.seed)
    if config.compute.activation_checkpointing:
        network.checkpoint_layers()
    return network


def _cross_tokenizer(
    config: Config, student: Network, policies: Mapping[str, Policy]
) -> dict[str, CrossTokenizerPolicy]:
    """The teachers with another tokenizer. Raises ModelError where the recipe needs a teacher that shares the student's."""
    found: dict[str, CrossTokenizerPolicy] = {}
    student_side = None
    for name, policy in policies.items():
        network = policy.network
        what = _other_tokens(config, name, student, network)
        if what is None:
            continue
        if (why := _need_beyond_text(config, name)) is not None:
            raise ModelError(f"teacher '{name}': {what}, {why}")
        student_side = student_side or StudentSide(
            student.tokenizer, generation_config=student.base.generation_config, vocab_size=student.vocab_size
        )
        teacher_side = TeacherSide(
            network.tokenizer,
            name=name,
            generation_config=network.base.generation_config,
            vocab_size=network.vocab_size,
        )
        _require_rows(network, network.vocab_size, network.source, teacher_side.end_ids)
        shared = None
        if config.objective.type == "top_k":
            tags = teacher_side.counterparts(student_side.table)
            shared = shared_vocabulary(
                student_side.table, student_side.end_ids, teacher_side.table, teacher_side.end_ids, tags
            )
        found[name] = CrossTokenizerPolicy(
            network,
            policy.adapter,
            teacher_side,
            student_side,
            config.objective.teacher_logprob_floor,
            mask_non_canonical=config.alignment.non_canonical == "mask",
            shared_vocabulary=shared,
            own_syntax=config.episodes.tool_syntax if config.alignment.tool_calls == "own_syntax" else None,
        )
    if not found and config.alignment != AlignmentConfig():
        raise ModelError(
            "[alignment] has no effect, because no teacher has another tokenizer than the student; remove [alignment]"
        )
    return found


def _other_tokens(config: Config, name: str, student: Network, network: Network) -> str | None:
    """Why a teacher can only be compared by text: another tokenizer, or another token that ends a turn; None where neither."""
    if network is student:
        return None
    gap = difference(student.tokenizer, network.tokenizer)
    if gap is not None:
        return f"'{network.source}' has another tokenizer than '{student.source}' ({gap})"
    if not _reads_own_prompts(config, name, student, network):
        return None
    ours, theirs = (
        turn_end(n.tokenizer, n.base.generation_config, who=f"model '{n.source}'") for n in (student, network)
    )
    if theirs.written in ours.ids:
        return None
    ends = [student.tokenizer.convert_ids_to_tokens(end.written) for end in (theirs, ours)]
    return (
        f"'{network.source}' ends a turn with {ends[0]!r} and '{student.source}' with {ends[1]!r} (teachers.{name}.template = "
        "'student' would ask it in the student's template)"
    )


def _reads_own_prompts(config: Config, name: str, student: Network, network: Network) -> bool:
    """Whether a teacher of the student's vocabulary reads conversations in a chat template of its own."""
    return (
        name in config.teachers
        and config.teachers[name].template == "own"
        and bool(network.tokenizer.chat_template)  # a model without one has no prompt of its own
        and not same_template(student.tokenizer, network.tokenizer)
    )


def _with_own_prompts(config: Config, student: Network, policies: Mapping[str, Policy]) -> dict[str, Policy]:
    """Those of the policies that read the student's tokens after prompts in a chat template of their own."""
    return {
        name: replace(policy, prompts=OwnPrompt(chat_of(policy.network), chat_of(student), name=name))
        for name, policy in policies.items()
        if policy.network is not student and _reads_own_prompts(config, name, student, policy.network)
    }


def _require_rows(network: Network, rows: int, source: str, ends: Sequence[int] | None = None) -> None:
    """Note where a tokenizer has ids for which a model, `source`, has no rows. Raises ModelError where a turn would end with one;
    that no prompt needs one is checked with the prompts.

    ends: the ids that end a turn, where they are not the network's own.
    """
    beyond = ids_without_rows(network.tokenizer, rows)
    if not beyond:
        return
    if ends is None:
        ends = turn_end(network.tokenizer, network.base.generation_config, who=f"model '{network.source}'").ids
    first = described_token(network.tokenizer, beyond[0])
    said = (
        f"the tokenizer of '{network.source}' has {len(beyond)} ids beyond the {rows} rows of '{source}', first {first}"
    )
    unreachable = [index for index in ends if index >= rows]
    if unreachable:
        raise ModelError(
            f"{said}; its turns end with {described_token(network.tokenizer, unreachable[0])}, which could never be sampled: name "
            "another end token (eos_token in tokenizer_config.json, eos_token_id in generation_config.json), or give the model a "
            "row for it (transformers: resize_token_embeddings)"
        )
    note = f"{said}; they are never sampled, and a text that needs one is refused"
    network.notes += [note] if note not in network.notes else []


def _need_beyond_text(config: Config, name: str) -> str | None:
    """Why a recipe needs more of a teacher with another tokenizer than the probability of a text; None where it does not."""
    objective = config.objective
    if objective.tail_residual:
        return "and objective.tail_residual needs the same vocabulary for both models; remove objective.tail_residual"
    if objective.type == "top_k" and config.mask.format_errors != "off":
        return (
            "so part of type = 'top_k' is a sampled log ratio without a baseline, and mask.format_errors would reward errors; "
            "leave it at 'off', or write objective.type = 'immediate' with baseline = 'leave_one_out'"
        )
    if objective.needs_distributions and objective.type != "top_k":
        return (
            f"and the objective needs its distribution over the student's tokens (type = '{objective.type}', baseline = "
            f"'{objective.baseline}'); write objective.type = 'immediate' or 'to_go' with baseline = 'none' or 'leave_one_out', "
            "which follow the text in chunks, or 'top_k', which also compares what the two vocabularies have in common"
        )
    if objective.reference == name or objective.extrapolation != 1.0:
        return "so objective.extrapolation has no common tokens; leave it at 1.0"
    for mixture, teacher in config.teachers.items():
        if name in (teacher.weights or ()):
            return f"so it cannot be a part of teachers.{mixture}.weights, which mixes distributions token by token"
    return None
