"""Brackets in the text of a mathematical answer."""

import re
from typing import TypeAlias

Brackets: TypeAlias = frozenset[tuple[int, str]]


def closing_brace(text: str, start: int) -> int:
    """Where the brace that opens at `start` is closed; -1 where it is not."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return -1


def brackets_of(text: str) -> Brackets:
    """(depth, kind) of the brackets that hold several elements, the innermost at depth 1: "{" of a set, "(" of any other."""
    found: set[tuple[int, str]] = set()
    # of each open bracket: its kind, whether it holds several elements, the depth of what it holds
    inside: list[tuple[str, bool, int]] = [("", False, 0)]
    for mark in re.findall(r"\\[{}]|[()\[\],;]", text):
        kind, several, depth = inside[-1]
        if mark in ",;":
            inside[-1] = (kind, True, depth)
        elif mark in (r"\{", "(", "["):
            inside.append((mark[-1].replace("[", "("), False, 0))
        elif len(inside) > 1:
            inside.pop()
            if several:
                depth += 1
                found.add((depth, kind))
            outer, listed, deepest = inside[-1]
            inside[-1] = (outer, listed, max(deepest, depth))
    return frozenset(found)


def alike(ours: Brackets, theirs: Brackets) -> bool:
    """Whether no set stands where the other text has a tuple, a list or an interval. One without brackets there may be any."""
    depths = {depth for depth, _ in ours} & {depth for depth, _ in theirs}
    return all(any(depth == shared for depth, _ in ours & theirs) for shared in depths)


def grouped(text: str) -> str:
    """Brackets of plain writing as LaTeX has them: sqrt(...), ^(...); products of what stands in brackets are products."""
    for opening, command in ((r"\\sqrt\s*\(", r"\sqrt{"), (r"\^\s*\(", "^{")):
        while found := re.search(opening, text):
            depth, place = 1, found.end()
            while place < len(text) and depth:
                depth += {"(": 1, ")": -1}.get(text[place], 0)
                place += 1
            if depth:
                return text
            text = f"{text[: found.start()]}{command}{text[found.end() : place - 1]}}}{text[place:]}"
    text = re.sub(r"\\sqrt\s+(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\w.^}])(\d+) ?/ ?(\d+)(?= ?(?:\\pi|\\sqrt|[a-zA-Z(]))", r"\\frac{\1}{\2}", text)  # 4/3 r
    return re.sub(r"(?<=[\d)])\s*(?=\()(?!\(\d+\)_)", r"\\cdot ", text)
