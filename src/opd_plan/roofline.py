"""Seconds of each phase of a step: the longest of its products, its reads of memory and its messages, at the rates assumed.

Operations: two for each weight of a linear layer and token, four for each query's element and key that it sees, two for each
element of the head and state that is read. Samples of one prompt compute it once at the learner and when sampled, but once each
when an engine scores them.
"""

from math import ceil

from opd.config import Config
from opd_plan.devices import Assumptions
from opd_plan.memory import RankShare, attention_again, bytes_of, kv_bytes_here, rank_share
from opd_plan.shapes import Shape
from opd_plan.work import Pool, Work, flag, share


def layers_flops(shape: Shape, tokens: float, seen: float) -> float:
    """One pass forward through the layers over `tokens` tokens, which look at `seen` keys together."""
    return 2.0 * shape.products * tokens + attention_flops(shape, seen)


def attention_flops(shape: Shape, seen: float) -> float:
    """Of them those of attention: scores and what they weigh."""
    return 4.0 * shape.layers * shape.queries * seen


def head_flops(shape: Shape, states: float) -> float:
    """The logits at so many states."""
    return 2.0 * shape.head * states


def split_s(shape: Shape, tokens: float, passes: float, devices: int, each: int, assumed: Assumptions) -> float:
    """What an engine's devices tell each other: two sums a layer over the width of every token (ring: 2 (n - 1) / n of it)."""
    if devices == 1:
        return 0.0
    volume = 2.0 * shape.layers * tokens * shape.width * each * 2 * (devices - 1) / devices
    return volume / assumed.link(devices) + 2 * shape.layers * passes * assumed.collective_us * 1e-6


def engine_pass_s(
    shape: Shape, flops: float, read: float, tokens: float, devices: int, each: int, assumed: Assumptions
) -> float:
    """One pass of an engine: products or reads, whichever is longer, then messages and what the engine itself takes."""
    products = flops / (devices * assumed.flops(each))
    reads = read / (devices * assumed.memory_rate)
    return max(products, reads) + split_s(shape, tokens, 1, devices, each, assumed) + assumed.step_ms * 1e-3


def sample_s(config: Config, work: Work, engines: int, devices: int, running: int, assumed: Assumptions) -> float:
    """All rollouts at their greatest length, `running` at once at each engine: prompts are read once at every engine that samples
    from them, then all further tokens one by one."""
    shape, each = work.student, bytes_of(config).remote
    given = share(work.rollouts, engines)
    at_once = min(given, running, share(work.in_flight, engines))
    prompts = min(given, ceil(work.rollouts / work.group)) * work.turns
    tokens = prompts * work.prompt
    batched = flag(config.cluster.engine_args, "--max-num-batched-tokens", assumed.device.batched_tokens)
    seen = prompts * work.prompt**2 / 2
    first = _chunked_s(shape, layers_flops(shape, tokens, seen), tokens, batched, devices, each, assumed)
    whole, rest = divmod(given, at_once)
    seconds = whole * work.response * _token_s(config, work, at_once, devices, assumed)
    if rest:
        seconds += work.response * _token_s(config, work, rest, devices, assumed)
    return first + seconds


def _token_s(config: Config, work: Work, rows: int, devices: int, assumed: Assumptions) -> float:
    """One further token for each of `rows` sequences of average length."""
    shape, each = work.student, bytes_of(config).remote
    seen = rows * (work.prompt + work.response / 2)
    flops = layers_flops(shape, rows, seen) + head_flops(shape, rows)
    adapter = work.trainable if config.trainable == "lora" and not config.cluster.merge_adapter else 0
    # of a cache that is copied each device reads its own
    read = (shape.products + shape.head + adapter) * each + seen * kv_bytes_here(shape, devices, each) * devices
    return engine_pass_s(shape, flops, read, rows, devices, each, assumed)


def _chunked_s(
    shape: Shape, flops: float, tokens: float, batched: float, devices: int, each: int, assumed: Assumptions
) -> float:
    """Whole prompts, so many tokens a pass."""
    passes = ceil(tokens / batched)
    if not passes:
        return 0.0
    read = (shape.products + shape.head) * each
    return passes * engine_pass_s(shape, flops / passes, read, tokens / passes, devices, each, assumed)


def pool_s(config: Config, work: Work, pool: Pool, engines: int, devices: int, assumed: Assumptions) -> float:
    """Scoring at the engines of one model: every rollout whole, with the logits of all its tokens."""
    each, shape = bytes_of(config).remote, pool.shape
    tokens = share(pool.rollouts, engines) * work.length
    flops = layers_flops(shape, tokens, tokens * work.length / 2) + head_flops(shape, tokens)
    batched = flag(pool.engine_args, "--max-num-batched-tokens", assumed.device.batched_tokens)
    return _chunked_s(shape, flops, tokens, batched, devices, each, assumed)


def wake_s(shape: Shape, devices: int, each: int, assumed: Assumptions) -> float:
    """A model goes to the host's memory and comes back, once a step: each device moves its own part."""
    return 2 * shape.parameters * each / devices / (assumed.device.host_gb_s * 1e9 * assumed.link_fraction)


def named_tokens(config: Config) -> int:
    """How many tokens an engine of a teacher names beside each that it scores (`opd.remote.teacher`)."""
    return config.objective.top_k if config.objective.type == "top_k" else 0


def driver_s(config: Config, work: Work, assumed: Assumptions) -> float:
    """The one process that reads what engines answer, while they go on."""
    token_us = assumed.driver_us + named_tokens(config) * assumed.driver_named_us
    each = assumed.driver_ms * 1e-3 + work.length * token_us * 1e-6
    return sum(pool.rollouts for pool in work.pools) * each


def inside_s(config: Config, work: Work, ranks: int, assumed: Assumptions) -> float:
    """Scoring by teachers that lie on the ranks, one after the other."""
    each, part = bytes_of(config), _part(config, work, ranks)
    seconds = 0.0
    for policy in work.policies:
        of_mine = policy.rollouts / work.rollouts
        flops = of_mine * _forward_flops(policy.shape, work, part)
        gather = ceil(part.passes * of_mine) * _gather_s(policy.shape.inside * each.computed, ranks, assumed)
        seconds += max(flops / assumed.flops(each.computed), gather)
    return seconds


def update_s(config: Config, work: Work, ranks: int, assumed: Assumptions) -> float:
    """The passes of an update over a rank's rollouts, and the optimizer, for every epoch.

    Backward costs as much as forward to the inputs of frozen layers, and as much again to weights that train; that of attention two
    and a half times its forward, with five products for two; activations that are not kept cost another forward. Where advantages
    need the student's own scores, one more pass comes first. Gathering the layers for the next pass and summing gradients go on
    beside the products, so the longer of both counts.
    """
    student, each, part = work.student, bytes_of(config), _part(config, work, ranks)
    lora = config.trainable == "lora"
    forward = _forward_flops(student, work, part)
    head = head_flops(student, part.rollouts * work.response)
    attention = attention_flops(student, _seen(work, part))
    again = config.compute.activation_checkpointing * (forward - head)
    again += attention_again(work, part) * attention
    flops = (2 if lora else 3) * (forward - attention) + 3.5 * attention + again
    if config.objective.type == "top_k" and not work.policies:
        flops += head  # its gradient makes the logits again
    for policy in work.policies if config.objective.integrated else ():
        flops += head_flops(policy.shape, part.rollouts * work.response * policy.rollouts / work.rollouts)
    message = 2 * _gather_s(student.inside * each.computed, ranks, assumed)
    message += _gather_s(4 * work.trainable, ranks, assumed)  # a sum of gradients, which are float32
    if not lora:
        message += 2 * _gather_s(student.outside * each.computed, ranks, assumed)
    seconds = max(flops / assumed.flops(each.computed), part.passes * message)
    # weights, gradients and both moments are read, all but the gradients written
    seconds += 7 * 4 * work.trainable / ranks / assumed.memory_rate
    seconds *= config.objective.epochs
    if config.objective.needs_student_scores:
        gather = part.passes * _gather_s(student.inside * each.computed, ranks, assumed)
        seconds += max(forward / assumed.flops(each.computed), gather)
    return seconds


def _part(config: Config, work: Work, ranks: int) -> RankShare:
    return rank_share(work, ranks, max_tokens=config.compute.max_tokens)


def _forward_flops(shape: Shape, work: Work, part: RankShare) -> float:
    """Layers over a rank's distinct tokens, and the head at every token that the student wrote."""
    return layers_flops(shape, part.tokens, _seen(work, part)) + head_flops(shape, part.rollouts * work.response)


def _seen(work: Work, part: RankShare) -> float:
    """Keys that a rank's distinct tokens look at together."""
    written = part.rollouts * work.response
    return (part.tokens - written) * work.prompt / 2 + written * (work.prompt + work.response / 2)


def _gather_s(size: float, ranks: int, assumed: Assumptions) -> float:
    """Every rank gets all of what is spread over them, or gives what is summed: (n - 1) / n of it passes each rank's link."""
    return size * (ranks - 1) / ranks / assumed.link(ranks)


def transfer_s(config: Config, work: Work, engines: int, devices: int, ranks: int, assumed: Assumptions) -> float:
    """The student to its engines: gathered at one rank, sent to every node that has one, written there, read and loaded.

    An adapter alone is sent, but each engine that holds it merged writes and reads whole weights.
    """
    each = bytes_of(config)
    lora = config.trainable == "lora"
    sent = 4.0 * work.trainable if lora else work.student.parameters * each.stored
    merged = config.cluster.merge_adapter or not lora
    files = work.student.parameters * each.remote if merged else sent
    nodes = ceil(engines * devices / assumed.gpus_per_node)
    gathered = _gather_s(sent, ranks, assumed) + sent / (assumed.device.host_gb_s * 1e9 * assumed.link_fraction)
    network = nodes * sent / (assumed.network_gb_s * 1e9 * assumed.link_fraction)
    return gathered + network + 2 * files / (assumed.disk_gb_s * 1e9) * min(engines, assumed.gpus_per_node // devices)
