"""What a claim's experiment found, and the verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Claim:
    """One row of the table: the claim and its source, what was expected, what was measured, and whether it holds.

    `figures` are the plain numbers behind it, for JSON and for the pictures. `parts` are the sentences that the claim is made of,
    each with its verdict; a claim that has parts holds when all of them do.
    """

    number: str
    title: str
    source: str
    expected: str
    measured: str
    holds: bool
    figures: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert not self.parts or self.holds == all(self.parts.values()), "a claim holds when its parts do"
