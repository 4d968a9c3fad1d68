"""What every table of a recipe is made of."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Positive: TypeAlias = Annotated[int, Field(ge=1)]
NonNegative: TypeAlias = Annotated[int, Field(ge=0)]


class Node(BaseModel):
    """A frozen table of a recipe; keys that it does not know are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """A hint such as "; did you mean 'steps'?", or "" when nothing known is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
