"""The base of every table of a recipe."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive: TypeAlias = Annotated[int, Field(ge=1)]
NonNegative: TypeAlias = Annotated[int, Field(ge=0)]


class Node(BaseModel):
    """A frozen table of a recipe; unknown keys are errors.

    The docstring under a key is its description in docs/reference/configuration.md: the first sentence says what it is, the
    others give the reason for its default, or its limits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def is_default(self, key: str) -> bool:
        """Whether the value of `key` equals its default."""
        return getattr(self, key) == type(self).model_fields[key].get_default(call_default_factory=True)

    def require_owners(self, owners: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
        """owners: a key, and the other key with the values that give the first an effect.

        Raises ValueError for a key that differs from its default and has no effect.
        """
        for key, (owner, values) in owners.items():
            if getattr(self, owner) not in values and not self.is_default(key):
                wanted = " or ".join(map(repr, values))
                raise ValueError(
                    f"{key} works only with {owner} = {wanted}, got {owner} = '{getattr(self, owner)}'; remove {key}, or change "
                    f"{owner}"
                )


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """A hint such as "; did you mean 'steps'?", or "" when no known word has a similarity of `cutoff` (difflib's ratio, 0 to 1)."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""


def _each_once(names: list[str]) -> list[str]:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"'{name}' stands {count} times; name it once")
    return names


EachOnce = AfterValidator(_each_once)
"""An annotation of a list: a repeated name is an error."""
