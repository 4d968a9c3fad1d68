"""docs/reference/models.md, from the toys of the tests: `python tests/zoo/models_page.py docs/reference/models.md` writes it."""

import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from architectures import FOUND, OTHERS, OTHERS_PADDED, PADDED, SOUND, WINDOWED, options_of, toy_of
from factories import byte_tokenizer
from own_passes import gradients
from transformers import PreTrainedModel
from vision import VISION, vision_toy

from opd.config import LoraConfig
from opd.models.architecture import causal_model
from opd.models.attention import own_attention
from opd.models.lora import add_student_adapter
from opd.models.network import Network
from opd.models.packing import pack_trees
from opd.models.packing_check import settled_passes

LONGEST = 200  # tokens
_INTRODUCTION = """# Models

This page lists the architectures that the tests try as toys with random weights. `make models-page`
writes it. `opd check` makes the same comparison with your own weights.

- **Passes:** *packed* passes hold shared prefixes once. *Padded* passes have one row per sequence and
  are slower. opd chooses by itself.
- **Text:** the largest difference of log-probabilities from the model's own passes over single
  sequences, as a fraction of the spread of the logits. It covers shared prefixes, sampling token by
  token, and tokens beyond every window. A teacher needs no more.
- **{longest} tokens:** the same for two sequences of this length.
- **LoRA, full:** the largest difference of a weight's gradient, as a fraction of its norm.

Written on {date} with transformers {version}, torch {torch}, in float32. Other families work if
`opd check` passes. Image inputs have no place in opd: these models are trained on text.

"""


class Toy(NamedTuple):
    """options: of its config, or of its language model's."""

    options: Mapping[str, Any]
    reads_images: bool = False

    def make(self, kind: str) -> PreTrainedModel:
        return vision_toy(kind, dict(self.options)) if self.reads_images else toy_of(kind, dict(self.options))


def toys() -> dict[str, Toy]:
    """Every architecture of the page by its model type; of one with and without a window, the windowed."""
    found = {kind: Toy(options) for kind, options in SOUND.items()}
    found |= {kind: Toy(options) for kind, (options, _) in {**PADDED, **FOUND}.items()}
    found |= {kind: Toy(options) for kind, options in WINDOWED.items()}
    found |= {kind: Toy(options_of(kind)) for kind in (*OTHERS, *OTHERS_PADDED)}
    found |= {kind: Toy(options, reads_images=True) for kind, options in VISION.items()}
    return dict(sorted(found.items()))


def gradient_gap(network: Network) -> float:
    """The largest difference of one weight's gradient, as a fraction of its norm, of weights that matter."""
    mine, theirs = (gradients(network, by_passes=by_passes) for by_passes in (True, False))
    largest = max(float(g.norm()) for g in theirs.values())
    return max(
        float((mine[name] - wanted).norm()) / float(wanted.norm())
        for name, wanted in theirs.items()
        if float(wanted.norm()) > 1e-3 * largest
    )


@torch.no_grad()
def long_gap(network: Network) -> float:
    """Of two sequences of `LONGEST` tokens with a common first half."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, 250, (2, LONGEST), generator=generator).tolist()
    sequences = [first, first[: LONGEST // 2] + second[LONGEST // 2 :]]
    [(_, tree)] = pack_trees(sequences, max_tokens=3 * LONGEST)
    found = 0.0
    for sequence, states in zip(
        sequences, (network.hidden_states(tree)[torch.from_numpy(p)] for p in tree.paths), strict=True
    ):
        with own_attention(network.base):
            own = causal_model(network.base)(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
        own = own[:, : network.vocab_size]
        gap = (network.logits(states).log_softmax(-1) - own.log_softmax(-1)).abs().max()
        found = max(found, float(gap / own.std(-1).mean()))
    return found


def row(kind: str, toy: Toy) -> list[str]:
    """One architecture: its name, the kind of pass, and what was found."""
    network = Network(toy.make(kind), byte_tokenizer(), kind)
    gaps, because = settled_passes(network, gradients=False)
    text, long = max(gaps.values()), long_gap(network)
    network.activate(None, trainable=True)
    full = gradient_gap(network)
    add_student_adapter(network, LoraConfig(rank=4), seed=0)
    network.activate("student", trainable=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in network.model.named_parameters():
            if p.requires_grad and "lora_B" in name:
                p.normal_(0.0, 0.1, generator=generator)
    figures = [f"{gap:.0e}" for gap in (text, long, gradient_gap(network), full)]
    name = f"`{kind}`{' (reads images too)' if toy.reads_images else ''}"
    return [name, "packed" if because is None else f"padded: {because}", *figures]


def page() -> str:
    head = ["model type", "passes", "text", f"{LONGEST} tokens", "LoRA", "full"]
    rows = [head, ["---"] * len(head)]
    for kind, toy in toys().items():
        rows.append(row(kind, toy))
        print(*rows[-1], flush=True)
    table = "\n".join(f"| {' | '.join(each)} |" for each in rows)
    made = {"date": date.today(), "version": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    return _INTRODUCTION.format(longest=LONGEST, **made) + table + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
