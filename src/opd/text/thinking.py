"""The text of a response after its thoughts.

A thought stands between two tags of one spelling (`opd.text.special_tags.THOUGHTS`); capital letters do not matter.
"""

import re

from opd.text.special_tags import THOUGHTS

_TAG = re.compile("|".join(re.escape(tag) for pair in THOUGHTS.items() for tag in pair), re.IGNORECASE)
_CLOSING = {opening.casefold(): closing.casefold() for opening, closing in THOUGHTS.items()}


def behind_thoughts(response: str) -> str | None:
    """What follows the last closing tag of a thought, or the whole where there is no tag; None while a thought is not closed.

    A closing tag alone closes what the prompt has opened. Within a thought only its own closing tag counts.
    """
    start, closing = 0, None
    for found in _TAG.finditer(response):
        tag = found[0].casefold()
        if closing is None and tag in _CLOSING:
            closing = _CLOSING[tag]
        elif closing is None or tag == closing:
            start, closing = found.end(), None
    return response[start:] if closing is None else None
