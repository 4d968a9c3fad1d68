"""The fenced blocks of a page, and a folder in which they run with toy models under the names of real ones."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from factories import save_adapter, save_toy, toy_model
from zoo import toy_bpe

ROOT = Path(__file__).parents[2]
STUDENT = "models/smollm2-135m-instruct"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^    \S.*\n)+", re.MULTILINE)
_COMMAND = re.compile(r"^    (opd|make|pip|git|source) ", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One block of a page: its language, its text, and where it begins."""

    language: str
    text: str
    place: str


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks in order; of indented ones those that hold commands, as `bash`."""
    text = page.read_text(encoding="utf-8")
    found = [(m.start(), m[1], m[2]) for m in _FENCE.finditer(text)]
    plain = _FENCE.sub(lambda m: re.sub(r"[^\n]", "-", m[0]), text)
    found += [
        (m.start(), "bash", re.sub(r"^    ", "", m[0], flags=re.MULTILINE))
        for m in _INDENTED.finditer(plain)
        if _COMMAND.search(m[0])
    ]
    place = f"{page.relative_to(ROOT)}:"
    return [
        Block(language, body, f"{place}{text.count(chr(10), 0, start) + 1}") for start, language, body in sorted(found)
    ]


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block, one each, without comments and line continuations."""
    joined = block.text.replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [" ".join(line.split()) for line in lines if line]


# --- tiny settings: in a page, in its commands and in the recipes of the repository alike ---

_TINY: dict[str, Callable[[int], int]] = {
    "steps": lambda n: max(2, n // 6 - 1) if n < 60 else 3,
    "size": lambda _: 12,
    "held_out_size": lambda _: 3,
    "prompts_per_step": lambda _: 4,
    "max_new_tokens": lambda _: 6,
    "num_prompts": lambda _: 2,
    "before_prompts": lambda _: 2,
    "held_out_prompts": lambda _: 2,
    "batch_size": lambda _: 2,
    "max_turns": lambda _: 2,
    "constant": lambda _: 16,
    "every": lambda _: 1,
    "--step": lambda _: 1,
}
_SETTING = re.compile(rf"(?<![\w_])({'|'.join(_TINY)})(\"?\s*[=:]\s*|\s)(\d+)\b")


def tiny(text: str) -> str:
    """The text with these settings small; `steps = 60` becomes `steps = 3`."""
    return _SETTING.sub(lambda m: f"{m[1]}{m[2]}{_TINY[m[1]](int(m[3]))}", text)


# --- the folder ---


def _other_tokenizer(folder: Path) -> None:
    toy_model(3, vocab_size=302, max_context=4096).save_pretrained(folder)
    toy_bpe(300).save_pretrained(folder)


def _model(seed: int) -> Callable[[Path], object]:
    return lambda folder: save_toy(folder, seed, max_context=4096)


def _adapter(seed: int) -> Callable[[Path], object]:
    return lambda folder: save_adapter(folder, str(folder.parents[2] / STUDENT), seed, rank=16, scale=0.05)


TOYS: dict[str, Callable[[Path], object]] = {
    STUDENT: _model(0),
    "Qwen/Qwen3-0.6B": _model(0),
    "Qwen/Qwen3-1.7B": _model(0),
    "Qwen/Qwen3-4B": _model(1),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": _other_tokenizer,
    "google/gemma-3-4b-it": _other_tokenizer,
    **{
        f"examples/{name}": _adapter(seed)
        for seed, name in enumerate(("merge/letters", "merge/matrix", "hacking/spaced", "hacking/compact"), 4)
    },
}
"""What stands in the folder under the name of a real model or adapter."""


def make_workspace(folder: Path) -> None:
    """The repository as a page sees it: its recipes with tiny settings, the first lines of its prompts, and toy models."""
    for source in sorted((ROOT / "recipes").glob("*.toml")):
        target = folder / "recipes" / source.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(tiny(source.read_text(encoding="utf-8")), encoding="utf-8")
    text = (folder / "recipes" / "merge.toml").read_text(encoding="utf-8")
    (folder / "my.toml").write_text(text.replace("runs/merge", "runs/my"), encoding="utf-8")
    for source in sorted((ROOT / "examples").rglob("*.jsonl")):
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        target.write_text("".join(lines[:96]), encoding="utf-8")
    shutil.copytree(ROOT / "examples" / "distributed" / "shapes", folder / "examples" / "distributed" / "shapes")
    for name, make in TOYS.items():
        make(folder / name)
