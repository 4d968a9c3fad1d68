"""Scores on disk: what is read is what was written, whatever died, was damaged or ran full, and of the same teacher."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import prompt, rollout

from opd.errors import RunError
from opd.records import (
    ChunkScore,
    FailedScore,
    HiddenPart,
    HiddenScore,
    Rollout,
    SampledScore,
    Score,
    ScoredRollout,
    TopKScore,
)
from opd.score_cache import CachedTeacher, Key, MemoryScores, ScoreFiles, from_bytes, key_of, to_bytes

rng = np.random.default_rng(0)


def odd_floats(*shape: int) -> np.ndarray:
    """float32 with what a text would lose: -0, denormals, infinities and a nan with a payload."""
    found = rng.normal(size=shape).astype(np.float32)
    flat = found.reshape(-1)
    special = np.array([0x80000000, 0x00000001, 0xFF800000, 0x7FC12345], dtype=np.uint32).view(np.float32)
    flat[: len(special)] = special[: len(flat)]
    return found


PART = HiddenPart("t", 0.1 + 0.2, odd_floats(3, 4))
KINDS: dict[str, Score] = {
    "sampled": SampledScore("t", odd_floats(5)),
    "top_k": TopKScore("t", odd_floats(5), rng.integers(-1, 99, (3, 4)).astype(np.int32), odd_floats(3, 4)),
    "hidden": HiddenScore("t", odd_floats(5), (PART, HiddenPart("u", -1 / 3, odd_floats(3, 4)))),
    "hidden, no action": HiddenScore("t", odd_floats(5), (HiddenPart("t", 1.0, np.zeros((0, 4), dtype=np.float32)),)),
    "chunks": ChunkScore("t", odd_floats(5), np.array([-1, -1, 0, 0, 1]), 7, {"masked/x": 1, "floored": 0}),
    "chunks and states": ChunkScore(
        "t", odd_floats(5), np.array([-1, 0, 1, 2, 3]), np.int64(7), {"n": np.int64(2)}, np.arange(5) > 1, PART
    ),
    "of a slice": SampledScore("t", odd_floats(10)[::2]),
}  # fmt: skip


def assert_same_bits(one: Any, other: Any) -> None:
    """Equal in every field, and arrays in every bit."""
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    elif hasattr(one, "__dataclass_fields__"):
        assert type(one) is type(other)
        for name in one.__dataclass_fields__:
            assert_same_bits(getattr(one, name), getattr(other, name))
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_bits(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_of_every_kind_comes_back_to_the_bit(kind: str, tmp_path: Path):
    assert_same_bits(KINDS[kind], from_bytes(to_bytes(KINDS[kind]), teacher="t"))
    key = Key("t", "ab" * 32)
    files(tmp_path).put({key: KINDS[kind]})
    assert_same_bits(KINDS[kind], files(tmp_path).get([key])[key])


def files(
    folder: Path, warn: Callable[[str], None] = pytest.fail, *, of: Any = "t", says: Any = (-1.0, -2.0)
) -> ScoreFiles:
    """The scores of a teacher `t` with some identity that says something of the probe text."""
    found = says if isinstance(says, str) else np.array(says, dtype=np.float32)
    return ScoreFiles(folder, {"t": {"of": of}}, lambda: {"t": found}, warn)


def some_score(number: int) -> tuple[Key, SampledScore]:
    return Key("t", f"{number:064x}"), SampledScore("t", np.full(2000, number, dtype=np.float32))


class Counted:
    """A teacher that scores with a number of its own, which grows."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        self.asked.append(len(rollouts))
        found = []
        for item in rollouts:
            failed = item.prompt.id == "bad"
            logprobs = np.full(len(item.token_ids), -len(self.asked), dtype=np.float32)
            found.append(ScoredRollout(item, FailedScore("t", "no") if failed else SampledScore("t", logprobs)))
        return found


def test_scores_outlive_the_teacher_and_failures_do_not(tmp_path: Path):
    items = [rollout([1, k], 1, prompt=prompt("bad" if k == 4 else "p")) for k in (2, 3, 4)]
    first, second = Counted(), Counted()
    CachedTeacher(first, files(tmp_path)).score(items)
    found = CachedTeacher(second, files(tmp_path)).score(items)
    assert (first.asked, second.asked) == ([3], [1])
    assert [s.cached for s in found] == [True, True, False]
    assert isinstance(found[2].score, FailedScore)


def test_memory_before_disk_holds_what_was_found_there(tmp_path: Path):
    [one, two] = [rollout([1, k], 1, prompt=prompt("p")) for k in (2, 3)]
    CachedTeacher(Counted(), files(tmp_path)).score([one])
    inner, memory = Counted(), MemoryScores(10)
    teacher = CachedTeacher(CachedTeacher(inner, files(tmp_path)), memory)
    teacher.score([one, two])
    assert inner.asked == [1]
    assert len(memory.get([key_of(one), key_of(two)])) == 2
    assert len(files(tmp_path).get([key_of(one), key_of(two)])) == 2


def test_threads_share_a_folder_and_probe_the_teacher_once(tmp_path: Path):
    asked: list[int] = []

    def slowly() -> Mapping[str, np.ndarray]:
        asked.append(1)
        time.sleep(0.05)
        return {"t": np.zeros(3, dtype=np.float32)}

    place = ScoreFiles(tmp_path, {"t": {}}, slowly, pytest.fail)
    teacher = CachedTeacher(Counted(), place)
    items = [rollout([1, k], 1, prompt=prompt("p")) for k in range(40)]
    threads = [threading.Thread(target=lambda i=i: teacher.score(items[i:] + items[:i])) for i in range(0, 40, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [1]
    assert len(place.get([key_of(item) for item in items])) == 40


WRITER = """
import sys
sys.path[:0] = ["tests", "tests/integration"]
from pathlib import Path
from test_score_files import files, some_score
place = files(Path(sys.argv[1]), print)
print("begun", flush=True)
number = 0
while number < int(sys.argv[2]):
    place.put(dict([some_score(number)]))
    number += 1
print("done", flush=True)
"""


def writer(folder: Path, count: int) -> "subprocess.Popen[str]":
    """A process that writes so many scores."""
    command = [sys.executable, "-c", WRITER, str(folder), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path):
    both = [writer(tmp_path, 300), writer(tmp_path, 300)]
    assert [process.communicate()[0].split() for process in both] == [["begun", "done"]] * 2
    wanted = dict(some_score(number) for number in range(300))
    found = files(tmp_path).get(wanted)
    assert found.keys() == wanted.keys()
    for key, score in wanted.items():
        assert_same_bits(score, found[key])
    assert not list((tmp_path / "partial").iterdir())


def test_a_process_that_is_killed_as_it_writes_leaves_whole_scores_alone(tmp_path: Path):
    process = writer(tmp_path, 10**9)
    assert process.stdout is not None
    process.stdout.readline()
    while not list(tmp_path.glob("*/*/*.score")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)  # somewhere within a later one
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = list(tmp_path.glob("*/*/*.score"))
    found = files(tmp_path).get([some_score(number)[0] for number in range(len(written) + 2)])  # damage would fail
    assert len(found) == len(written)
    for number in range(len(written)):
        key, score = some_score(number)
        assert_same_bits(score, found[key])


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path: Path):
    files(tmp_path)
    old, new = tmp_path / "partial" / "old", tmp_path / "partial" / "new"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    files(tmp_path).get([])
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["new"]


def flipped(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path, Path], Any]] = {
    "a bit": flipped,
    "a torn tail": lambda path, other: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path, other: path.write_bytes(b""),
    "zeros": lambda path, other: path.write_bytes(bytes(path.stat().st_size)),
    "another's": lambda path, other: path.write_bytes(other.read_bytes()),
    "a folder": lambda path, other: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_score_is_noticed_and_scored_again(damage: str, tmp_path: Path):
    items = [rollout([1, k], 1, prompt=prompt("p")) for k in (2, 3, 4)]
    CachedTeacher(Counted(), files(tmp_path)).score(items)
    place = files(tmp_path)
    paths = [next(tmp_path.glob(f"*/*/{key_of(item).response[2:]}.score")) for item in items]
    DAMAGE[damage](paths[0], paths[1])
    said: list[str] = []
    inner = Counted()
    teacher = CachedTeacher(inner, files(tmp_path, said.append))
    found = teacher.score(items)
    assert [s.cached for s in found] == [False, True, True]
    assert inner.asked == [1]
    assert len(said) == (2 if damage == "a folder" else 1)
    assert (
        said[0] == f"warning: 1 cached scores in '{tmp_path}' are damaged; their teachers score these responses again"
    )
    if damage != "a folder":
        assert len(place.get([key_of(item) for item in items])) == 3  # and it is whole again


def test_another_teacher_under_the_same_name_gets_none_of_its_scores(tmp_path: Path):
    key, score = some_score(1)
    _, other = some_score(2)
    files(tmp_path, says=[-1.0, -2.0]).put({key: score})
    assert key not in files(tmp_path, of="another").get([key])  # known by its weights: nothing to say
    said: list[str] = []
    strange = files(tmp_path, said.append, says=[-1.3, -2.0])
    assert strange.get([key]) == {}
    strange.put({key: other})
    [line] = said
    assert line.startswith(f"warning: teacher 't' has changed since its scores in '{tmp_path}' were computed (its")
    assert "differ by 0.15 nats per token, limit 0.1" in line
    # rounding is no other teacher, and both are still there
    assert_same_bits(files(tmp_path, says=[-1.1, -2.05]).get([key])[key], score)
    assert_same_bits(files(tmp_path, says=[-1.31, -1.96]).get([key])[key], other)


NAN = float("nan")


@pytest.mark.parametrize("says", [[NAN, -2.0], [NAN, -1.0], [-1.0, NAN], [-2.0, NAN], [NAN, NAN], [-1.0]])
def test_a_probe_that_cannot_be_compared_is_another_teacher(says: list[float], tmp_path: Path):
    key, score = some_score(1)
    files(tmp_path).put({key: score})
    said: list[str] = []
    assert files(tmp_path, said.append, says=says).get([key]) == {}
    assert "has changed since its scores" in said[0]
    assert key in files(tmp_path).get([key])  # and hides nothing of the one that it is beside


def test_scores_of_a_teacher_that_fails_the_probe_are_not_used(tmp_path: Path):
    key, score = some_score(1)
    files(tmp_path).put({key: score})
    said: list[str] = []
    silent = files(tmp_path, said.append, says="no answer")
    silent.put({some_score(2)[0]: score})
    assert silent.get([key]) == {}
    assert said == [
        f"warning: scores of teacher 't' are not cached in '{tmp_path}': it did not score a probe text: no answer"
    ]
    assert len(list(tmp_path.glob("*/*/*.score"))) == 1


def test_a_damaged_record_of_a_teacher_leaves_its_scores_alone_until_it_is_written_again(tmp_path: Path):
    key, score = some_score(1)
    files(tmp_path).put({key: score})
    [about] = tmp_path.glob("*/teacher.json")
    about.write_text(about.read_text()[:-9])
    said: list[str] = []
    assert key in files(tmp_path, said.append).get([key])  # it says the same, so it is the same
    assert said == [f"warning: '{about}' is damaged; opd ignores the scores beside it"]
    assert json.loads(about.read_text())["probe"] == [-1.0, -2.0]


FULL = """
import resource, sys
sys.path[:0] = ["tests", "tests/integration"]
from pathlib import Path
from test_score_files import files, some_score
said = []
place = files(Path(sys.argv[1]), said.append)
place.put(dict([some_score(0)]))
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
for number in range(1, 4):
    place.put(dict([some_score(number)]))
found = place.get([some_score(number)[0] for number in range(4)])
print(len(found), len(list(Path(sys.argv[1], "partial").iterdir())), *said, sep="|")
"""


def test_on_a_full_disk_nothing_more_is_kept_and_what_is_there_is_used(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True, timeout=600
    )
    line = (
        f"1|0|warning: opd stops caching scores in '{tmp_path}' (File too large). Training continues with the scores that are "
        "there; free space and restart, or delete the folder"
    )
    assert done.stdout.splitlines() == [line]


def test_a_folder_that_cannot_be_one_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"^compute.score_cache_folder = '.*file' cannot be written to \(.*\); name"):
        files(tmp_path / "file")


def test_a_folder_that_is_deleted_under_a_run_is_made_again(tmp_path: Path):
    place = files(tmp_path / "kept")
    place.put(dict([some_score(1)]))
    shutil.rmtree(tmp_path / "kept")
    assert place.get([some_score(1)[0]]) == {}
    place.put(dict([some_score(2)]))
    assert len(place.get([some_score(2)[0]])) == 1
