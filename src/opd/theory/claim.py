"""What a claim's experiment found, and the verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Claim:
    """One row of the table: the claim and its source, what was expected, what was measured, and whether it holds.

    `figures` are the plain numbers behind it, for JSON and for the pictures.
    """

    number: str
    title: str
    source: str
    expected: str
    measured: str
    holds: bool
    figures: Mapping[str, Any] = field(default_factory=dict)
