"""A model behind servers, wherever they are by now."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from opd.remote.client import Endpoint


class RemoteModel(Protocol):
    """Where calls go. Servers that somebody else started stay where they are; engines on a cluster move, change and sleep."""

    def newest(self) -> Endpoint:
        """The model as it is now; for work that begins."""
        ...

    def again(self) -> Endpoint | None:
        """Where its servers are by now, for what was lost, whatever they hold; None for those that do not move."""
        ...

    def using(self) -> AbstractContextManager[Any]:
        """Held while it is asked: a model that takes turns with others stays awake, and its weights stay what they are."""
        ...

    def changing(self) -> AbstractContextManager[Any]:
        """Held while it becomes the newest: where that takes the place of what is asked, nobody asks meanwhile."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Servers that stay where they are (`RemoteModel`)."""

    endpoint: Endpoint

    def newest(self) -> Endpoint:
        return self.endpoint

    def again(self) -> None:
        return None

    def using(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def changing(self) -> AbstractContextManager[Any]:
        return nullcontext()
