"""The kinds of inference servers: a new one is a module such as `vllm.py`, a case here, and its name in `ServerKind`."""

from typing import assert_never

from opd.config.teachers import ServerKind
from opd.remote.protocol_base import ServerProtocol
from opd.remote.sglang import SglangProtocol
from opd.remote.vllm import VllmProtocol


def protocol_of(kind: ServerKind) -> ServerProtocol:
    """The protocol of a kind of server."""
    match kind:
        case "vllm":
            return VllmProtocol()
        case "sglang":
            return SglangProtocol()
        case _:
            assert_never(kind)
