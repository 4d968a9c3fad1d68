"""Memory of one device, in bytes by part: of a learner rank, and of an engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from opd.config import Config
from opd_plan.devices import GIB, Assumptions
from opd_plan.shapes import Shape
from opd_plan.work import Pool, Work, flag, share

_TILE = 64  # tokens of one tile of attention (opd.models.attention)
_WIDE = 512  # keys; tiles that see more copy them again for their gradient
_STATES = 256, 512  # whose logits exist at once, an eighth of a pass between these (opd.objectives.tiles)


@dataclass(frozen=True)
class Bytes:
    """How many bytes each number takes: weights as they lie on a rank, as ranks compute with them, and at engines."""

    stored: int
    computed: int
    remote: int


def bytes_of(config: Config) -> Bytes:
    """float32 takes four, bfloat16 two; mixed precision computes in bfloat16 whatever is stored."""
    stored = 2 if config.compute.dtype == "bfloat16" else 4
    return Bytes(stored, 2 if config.cluster.mixed_precision else stored, stored)


@dataclass(frozen=True)
class RankShare:
    """What the busiest of some learner ranks is given of a step: rollouts, distinct tokens, packed passes, tokens of the largest
    pass. Samples of one prompt hold it once in each pass that they share."""

    rollouts: int
    tokens: int
    passes: int
    largest: int


def rank_share(work: Work, ranks: int, *, max_tokens: int) -> RankShare:
    """Consecutive rollouts, as evenly as they go (`opd.batch.consecutive`), packed into passes of at most `max_tokens` tokens."""
    rollouts = share(work.rollouts, ranks)
    together = min(work.group, max(1, (max_tokens - work.prompt) // work.response))
    tokens = ceil(rollouts / together) * work.prompt + rollouts * work.response
    room = max(max_tokens, work.length)
    return RankShare(rollouts, tokens, ceil(tokens / room), min(tokens, room))


def kept_a_token(config: Config, shape: Shape) -> int:
    """Bytes that one layer keeps of one token for its gradient (gated MLP, RMS norms, packed attention, fused adapters).

    Elements of the computing dtype: what the linear layers read (2 width + intermediate), queries, keys and values (repeated for
    every head) and the result of attention (4 queries), and of the MLP its gate, that activated, and the other branch. In float32:
    both norms' results, those of the queries and keys where they are normalised. Adapters of another dtype than their base read
    float32 copies, one for each linear layer.
    """
    each = bytes_of(config).computed
    lora = config.trainable == "lora"
    found = 4 * 2 * shape.width + each * (4 * shape.queries + 3 * shape.intermediate)
    if shape.qk_norm:
        found += 4 * (shape.queries + shape.keys)
    if lora and each == 2 and not config.cluster.mixed_precision:  # peft gives such a base adapters in float32
        found += 4 * (5 * shape.width + shape.queries + shape.intermediate)
    else:
        found += each * (2 * shape.width + shape.intermediate)
    if not lora:  # gradients of the norms' weights
        found += each * (2 * shape.width + (shape.queries + shape.keys if shape.qk_norm else 0))
    return found


def rank_memory(config: Config, work: Work, ranks: int, assumed: Assumptions) -> Mapping[str, float]:
    """Bytes by part of one of `ranks` learner ranks; layers are spread over all (`opd.distributed.rank`)."""
    student, each, lora = work.student, bytes_of(config), config.trainable == "lora"
    part = rank_share(work, ranks, max_tokens=config.compute.max_tokens)
    # Where what trains is inside the layers, what is outside stays whole on every rank.
    own = student.inside / ranks + student.outside if lora else student.parameters / ranks
    teachers = sum(s.inside / ranks + s.outside for s in work.frozen) + work.adapters / ranks
    largest = max([student.largest, *(s.largest for s in work.frozen)])
    gathered = 2.0 * largest * each.computed  # a layer, and the next one on its way
    if not lora:
        # embeddings stay gathered, the head is made whole with its gradient, and gradients of one layer are whole
        gathered += student.outside * each.computed + 2 * student.head * each.stored + 4 * student.largest
    layers = 1 if config.compute.activation_checkpointing else student.layers
    inputs = student.layers * student.width * each.computed if config.compute.activation_checkpointing else 0
    # each part of a target has logits of its own beside the student's; working copies are float32
    mixed = max(len(teacher.weights or (1,)) for teacher in config.teachers.values())
    policies = mixed + (config.objective.reference is not None) if config.objective.integrated and work.policies else 0
    states = min(max(_STATES[0], part.largest // 8), _STATES[1])
    logits = states * student.vocab * ((1 + policies) * each.computed + 4 * 4)
    return {
        "weights": own * each.stored + (4 * work.trainable / ranks if lora else 0),
        "teachers' weights": teachers * each.stored,
        "gradients": 4 * work.trainable / ranks,
        "optimizer moments": 8 * work.trainable / ranks,
        "gathered layers": gathered,
        "activations": part.largest * (layers * kept_a_token(config, student) + inputs),
        "attention tiles": _tiles(student, part.largest, work.length, each.computed, layers),
        "logits": float(logits),
        "reserve": assumed.reserve_gib * GIB,
    }


def attention_again(work: Work, part: RankShare) -> bool:
    """Whether attention is computed once more for its gradient: of several sequences in a pass whose tiles see many keys."""
    return part.largest > work.length > _WIDE


def _tiles(shape: Shape, tokens: int, length: int, each: int, layers: int) -> float:
    """At most: keys and values that the tiles of one layer look at, with their gradients, and which of them each token sees.
    layers: so many keep theirs, where the tiles see few keys."""
    if tokens <= length:
        return 0.0  # one sequence alone needs neither
    copies = tokens / _TILE * length * 2 * shape.keys * each
    kept = layers if length <= _WIDE else 1
    return (kept + 1) * copies + tokens * length * each * (1 + shape.heads // shape.kv_heads)


@dataclass(frozen=True)
class EngineMemory:
    """One device of an engine: bytes by part, the bytes that one sequence of full length keeps there, and how many fit into the
    room for the KV cache."""

    parts: Mapping[str, float]
    sequence: float
    sequences: int


def engine_memory(
    shape: Shape,
    devices: int,
    work: Work,
    assumed: Assumptions,
    *,
    args: Sequence[str],
    each: int,
    scores: bool,
    beside: float,
) -> EngineMemory:
    """Of each of `devices` that one engine is split over. scores: it gives log-probabilities of whole prompts, whose logits exist
    for all tokens of a pass; beside: bytes of adapters that it holds."""
    batched = engine_batched(args, assumed)
    rows = batched if scores else engine_running(args, assumed)
    # bfloat16 logits, float32 ones, and their log-softmax
    logits = rows * shape.vocab * (each + 4 + 4)
    passing = batched * each * (4 * shape.width + 3 * shape.intermediate / devices)
    parts = {
        "weights": (shape.parameters * each + beside) / devices,
        "activations": passing,
        "logits": logits,
        "reserve": assumed.reserve_gib * GIB,
    }
    left = engine_room(args, assumed) - sum(parts.values())
    sequence = kv_bytes_here(shape, devices, each) * work.length
    return EngineMemory(parts | {"KV cache": left}, sequence, max(0, int(left // sequence)))


def kv_bytes_here(shape: Shape, devices: int, each: int) -> float:
    """What one token keeps on each device: key heads are spread, and copied where there are fewer than devices."""
    return shape.kv_bytes(each) / shape.kv_heads * max(1.0, shape.kv_heads / devices)


def engine_room(args: Sequence[str], assumed: Assumptions) -> float:
    """Bytes of a device that an engine takes."""
    return assumed.device.memory_gib * GIB * flag(args, "--gpu-memory-utilization", assumed.engine_fraction)


def engine_batched(args: Sequence[str], assumed: Assumptions) -> float:
    """Tokens of one pass of an engine."""
    return flag(args, "--max-num-batched-tokens", assumed.device.batched_tokens)


def engine_running(args: Sequence[str], assumed: Assumptions) -> float:
    """Sequences that an engine runs at once; where it is not told, no more than a pass has tokens (vLLM 0.32)."""
    return flag(args, "--max-num-seqs", min(assumed.device.running, engine_batched(args, assumed)))


def student_running(config: Config, work: Work, devices: int, assumed: Assumptions) -> int:
    """How many sequences an engine of the student runs at once; 0 where not even one fits."""
    found = student_memory(config, work, devices, assumed)
    limit = int(engine_running(config.cluster.engine_args, assumed))
    return min(found.sequences, limit, config.remote.max_in_flight)


def student_memory(config: Config, work: Work, devices: int, assumed: Assumptions) -> EngineMemory:
    """Of each device of an engine that samples."""
    each = bytes_of(config).remote
    kept = config.cluster.max_staleness + 2 if config.trainable == "lora" and not config.cluster.merge_adapter else 0
    return engine_memory(
        work.student, devices, work, assumed, args=config.cluster.engine_args, each=each, scores=False,
        beside=kept * work.trainable * each,
    )  # fmt: skip


def pool_memory(config: Config, work: Work, pool: Pool, devices: int, assumed: Assumptions) -> EngineMemory:
    """Of each device of an engine that scores."""
    each = bytes_of(config).remote
    found = engine_memory(pool.shape, devices, work, assumed, args=pool.engine_args, each=each, scores=True, beside=0)
    if not config.cluster.teachers_sleep:
        return found
    sleeping = (len(work.pools) - 1) * assumed.sleeper_gib * GIB
    left = found.parts["KV cache"] - sleeping
    parts = {**found.parts, "asleep": sleeping, "KV cache": left}
    return EngineMemory(parts, found.sequence, max(0, int(left // found.sequence)))
