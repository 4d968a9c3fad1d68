"""Write the prompts of recipes/sums.toml: sums of two numbers up to 16, each pair in one split only.

python examples/sums/prompts.py examples/sums
"""

import json
import random
import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    pairs = [(a, b) for a in range(1, 17) for b in range(1, 17)]
    random.Random(0).shuffle(pairs)
    for name, chosen in (("held_out", pairs[:64]), ("train", pairs[64:])):
        with (folder / f"sums_{name}.jsonl").open("w", encoding="utf-8") as file:
            for a, b in chosen:
                prompt = f"What is {a} + {b}? Answer in one short sentence."
                file.write(json.dumps({"id": f"{a}+{b}", "prompt": prompt, "answer": str(a + b)}) + "\n")


if __name__ == "__main__":
    main()
