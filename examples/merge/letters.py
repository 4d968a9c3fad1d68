"""Write the prompts of the letters task: reverse four to six letters. Training and held-out letters never coincide.

python examples/merge/letters.py examples/merge
"""

import json
import random
import string
import sys
from pathlib import Path

SIZES = {"letters_held_out": 256, "letters_train": 4000}


def main() -> None:
    folder = Path(sys.argv[1])
    draw = random.Random(0)
    seen: set[str] = set()
    for name, size in SIZES.items():
        lines = []
        while len(lines) < size:
            letters = " ".join(draw.choices(string.ascii_lowercase, k=draw.randint(4, 6)))
            if letters in seen:
                continue
            seen.add(letters)
            record = {"id": f"{len(seen):04d}", "prompt": f"Reverse the letters: {letters}", "answer": letters[::-1]}
            lines.append(json.dumps(record) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
