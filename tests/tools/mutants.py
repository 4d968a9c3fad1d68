"""Do the tests notice small faults? Each mutant of a module runs in a fork of one process that has imported everything.

    python tests/tools/mutants.py [--module NAME ...] [--sample N --seed S] [--jobs J] [--results FILE] [--again] [--report]

A test that fails kills a mutant. What is left is listed; `mutants_equivalent.txt` names those that no test can kill, and why.
Results are kept line by line, and a second call goes on where the first one ended (`--again`: the survivors once more).
"""

import argparse
import ast
import gc
import json
import os
import random
import resource
import signal
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mutations import Mutant, mutants, report, shown
from reached import Reached, passes

ROOT = Path(__file__).parents[2]

_VOCABULARY = [
    "vocabulary",
    "detector_metrics",
    "shared_vocabulary",
    "learner_objectives",
    "dense_reference",
    "learner",
    "theory",
    "neutral",
]
_SAMPLED = [
    "advantages",
    "baselines",
    "policy_losses",
    "estimators",
    "chunks",
    "compute_advantages",
    "dense_reference",
    "theory",
]
_TEXT = [
    "align",
    "tokenizer_pairs",
    "teacher_text",
    "teacher_calls",
    "teacher_calls_laws",
    "cross_tokenizer_teacher",
    "shared_vocabulary",
]
# module -> the tests that may notice its faults, the fastest first
MODULES: dict[str, list[str]] = {
    "objective": [
        "pack",
        "compute_advantages",
        "split_episodes",
        "loss_terms",
        "dense_reference",
        "unscored",
        "chunks",
        "neutral",
        "shared_vocabulary",
    ],
    "batch": [
        "pack",
        "compute_advantages",
        "split_episodes",
        "floor",
        "data",
        "dense_reference",
        "unscored",
        "chunks",
        "top_k",
        "defects",
    ],
    "objectives.reduce": [*_SAMPLED, "defects"],
    "objectives.divergences": [
        "rounding",
        "objectives",
        "vocabulary",
        "top_k",
        "learner_objectives",
        "dense_reference",
        "defects",
    ],
    "objectives.top_k": ["top_k", "vocabulary", "dense_reference"],
    "objectives.draw": ["draw", "sampler"],
    "objectives.target": ["pack", "floor", "vocabulary", "dense_reference"],
    "objectives.vocabulary": _VOCABULARY,
    "objectives.tiles": ["vocabulary", "objectives", "top_k"],
    "objectives.logprobs": ["objectives", "vocabulary", "learner", "dense_reference"],
    "objectives.corrections": ["baselines", "defects", "compute_advantages", "dense_reference"],
    "objectives.baselines": _SAMPLED,
    "objectives.advantages": _SAMPLED,
    "objectives.losses": ["policy_losses", "objectives", "estimators", "dense_reference", "learner"],
    "local.loss_terms": [
        "learner_objectives",
        "learner",
        "unscored",
        "top_k",
        "shared_vocabulary",
        "dense_reference",
        "detector_metrics",
    ],
    "local.learner": ["learner", "learner_objectives", "dense_reference", "unscored", "resume"],
    "text.alignment": [*_TEXT, "chunks"],
    "text.chunks": _TEXT,
}
_SHARED = ("every_world", "every_recipe")
_MOST_CASES = 60
_MOST_S = 20.0  # of a processor, beyond what all tests together take without a fault


@dataclass
class Running:
    """A fork at work: the mutant, its pipe, when it began."""

    mutant: Mutant
    pipe: int
    began: float = field(default_factory=time.monotonic)


class Faults:
    """A pytest plugin: instead of running the tests once it runs them for every mutant of a module, each time in a fork."""

    def __init__(self, name: str, options: argparse.Namespace, done: dict[str, dict[str, Any]]) -> None:
        self.name, self.options, self.done = name, options, done
        self.kills: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.reached: dict[str, set[str]] = {}
        self.path = ROOT / "src" / "opd" / (name.replace(".", "/") + ".py")
        self.running: dict[int, Running] = {}

    def pytest_configure(self) -> None:
        import hypothesis  # not before pytest, which rewrites it

        # A slow machine is no fault, and the same examples try every mutant.
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, database=None, phases=phases)
        hypothesis.settings.load_profile("mutants")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            sys.exit(f"{self.name}: tests could not be collected")
        items = [item for item in session.items if not item.get_closest_marker("processes")]
        items = self.passing(_few(items))
        for module in {item.getparent(pytest.Module) for item in items}:
            for name in _SHARED:  # what costs most to make, and no fault reaches, is made before the forks
                getattr(getattr(module, "obj", None), name, lambda: None)()
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        todo = [m for m in mutants(self.name, tree) if self.wanted(m)]
        every = len(todo)
        if self.options.sample:
            todo = random.Random(self.options.seed).sample(todo, min(self.options.sample, every))
        print(f"{self.name}: {len(todo)} of {every} mutants that are open, {len(items)} tests", flush=True)
        functions = _functions(str(self.path))
        gc.freeze()
        for mutant in todo:
            while len(self.running) >= self.options.jobs:
                self.wait()
            self.start(mutant, tree, functions, items)
        while self.running:
            self.wait()
        return True

    def wanted(self, mutant: Mutant) -> bool:
        found = self.done.get(mutant.key)
        return found is None or (self.options.again and found["status"] != "killed")

    def passing(self, items: list[pytest.Item]) -> list[pytest.Item]:
        """The tests that pass without a fault, and how long each takes."""
        reader, writer = os.pipe()
        if not (pid := os.fork()):
            _quiet()
            times, reached = {}, Reached(str(self.path))
            for item, following in _pairs(items):
                began = time.process_time()
                passed = reached.passes(item, following)
                times[item.nodeid] = time.process_time() - began if passed else None
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(json.dumps([times, reached.owners()]).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            found, owners = json.loads(pipe.read())
        os.waitpid(pid, 0)
        for name in (name for name, took in found.items() if took is None):
            print(f"left out, as it fails without a fault: {name}")
        self.seconds = {name: took for name, took in found.items() if took is not None}
        self.reached = {name: set(names) for name, names in owners.items()}
        return [item for item in items if item.nodeid in self.seconds]

    def start(self, mutant: Mutant, tree: ast.Module, functions: Any, items: list[pytest.Item]) -> None:
        """Fork; the child puts the fault in and runs the tests until one fails."""
        reader, writer = os.pipe()
        if pid := os.fork():
            os.close(writer)
            self.running[pid] = Running(mutant, reader)
            return
        _quiet()
        most = int(sum(self.seconds.values()) * 1.5 + _MOST_S)
        resource.setrlimit(resource.RLIMIT_CPU, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(most * 15)
        try:
            applied = _apply(mutant, tree, functions, sys.modules[f"opd.{self.name}"])
        except Exception as error:
            os.write(writer, json.dumps({"status": "invalid", "test": repr(error)}).encode())
            os._exit(0)
        if not applied:
            os.write(writer, json.dumps({"status": "invalid", "test": "no such function in memory"}).encode())
            os._exit(0)
        for item, following in _pairs(self.ordered(mutant, items)):
            if not passes(item, following):
                os.write(writer, json.dumps({"status": "killed", "test": item.nodeid}).encode())
                os._exit(0)
        os.write(writer, json.dumps({"status": "survived", "test": ""}).encode())
        os._exit(0)

    def ordered(self, mutant: Mutant, items: list[pytest.Item]) -> list[pytest.Item]:
        """The tests that reach the function of a mutant; first those that have killed some, most a second first, each file in one
        piece. A mutant that survived is tried on every test (`--again`): a test may read what an earlier one left in a cache."""
        if mutant.kind == "code" and not self.options.again:
            items = [item for item in items if mutant.owner in self.reached[item.nodeid]]

        def worth(several: Sequence[pytest.Item]) -> float:
            return sum(self.kills[i.nodeid] for i in several) / sum(self.seconds[i.nodeid] + 0.02 for i in several)

        found: list[pytest.Item] = []
        for part in ([i for i in items if self.kills[i.nodeid]], [i for i in items if not self.kills[i.nodeid]]):
            files: dict[str, list[pytest.Item]] = {}
            for item in sorted(part, key=lambda i: (-worth([i]), self.seconds[i.nodeid])):
                files.setdefault(item.nodeid.split("::")[0], []).append(item)
            quickest = sorted(files.values(), key=lambda f: (-worth(f), sum(self.seconds[i.nodeid] for i in f)))
            found += [item for file in quickest for item in file]
        return found

    def wait(self) -> None:
        """Until one fork has ended; keep what it found."""
        pid, status, used = os.wait4(-1, 0)
        running = self.running.pop(pid)
        with os.fdopen(running.pipe, "rb") as pipe:
            text = pipe.read()
        # no answer: a signal of a limit, or a crash that a fault has caused
        limits = (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
        crashed = "timeout" if os.WIFSIGNALED(status) and os.WTERMSIG(status) in limits else "killed"
        found = json.loads(text) if text else {"status": crashed, "test": ""}
        self.kills[found["test"]] += 1
        mutant = running.mutant
        took = round(used.ru_utime + used.ru_stime, 2)
        line = {"key": mutant.key, "module": self.name, "line": mutant.line, **found, "seconds": took}
        self.done[mutant.key] = line
        with self.options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if found["status"] != "killed":
            print(f"{found['status']}: {shown(line)} {found['test']}", flush=True)


def _functions(path: str) -> dict[str, list[types.FunctionType]]:
    """The functions of a file that are in memory, whoever wraps them."""
    found: dict[str, list[types.FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is types.FunctionType and thing.__code__.co_filename == path:
            found.setdefault(thing.__code__.co_qualname, []).append(thing)
    return found


def _apply(mutant: Mutant, tree: ast.Module, functions: dict[str, list[types.FunctionType]], module: Any) -> bool:
    """Give functions in memory the code of the mutated source."""
    if mutant.kind == "code":
        mutant.swap()
        warnings.simplefilter("ignore", SyntaxWarning)  # of code that is meant to be wrong
        [code] = [c for c in _codes(compile(tree, module.__file__, "exec")) if c.co_qualname == mutant.owner]
        for function in functions.get(mutant.owner, []):
            function.__code__ = code
        return mutant.owner in functions
    mutant.swap()
    parent: Any = mutant.parent
    top = parent.value if mutant.kind == "constant" else None
    if top is not None:
        value = eval(compile(ast.fix_missing_locations(ast.Expression(top)), "-", "eval"), module.__dict__)
        name = parent.targets[0].id
        old = getattr(module, name)
        for other in [m for n, m in sys.modules.items() if n.startswith("opd") and getattr(m, name, None) is old]:
            setattr(other, name, value)
        return True
    return _apply_default(mutant, tree, functions, module)


def _apply_default(
    mutant: Mutant, tree: ast.Module, functions: dict[str, list[types.FunctionType]], module: Any
) -> bool:
    which, place = mutant.kind.split(":")
    definition = next(
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == mutant.owner.split(".")[-1]
    )
    expression = ast.Expression(getattr(definition.args, which)[int(place)])
    value = eval(compile(ast.fix_missing_locations(expression), "-", "eval"), module.__dict__)
    for function in functions.get(mutant.owner, []):
        if which == "kw_defaults":
            name = definition.args.kwonlyargs[int(place)].arg
            function.__kwdefaults__ = {**(function.__kwdefaults__ or {}), name: value}
        else:
            values = list(function.__defaults__ or ())
            values[int(place)] = value
            function.__defaults__ = tuple(values)
    return mutant.owner in functions


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _few(items: list[pytest.Item]) -> list[pytest.Item]:
    """At most so many cases of one test."""
    cases: Counter[str] = Counter()
    found = []
    for item in items:
        name = item.nodeid.split("[")[0]
        cases[name] += 1
        if cases[name] <= _MOST_CASES:
            found.append(item)
    return found


def _pairs(items: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    return zip(items, [*items[1:], None], strict=True)


def _quiet() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)


def run(name: str, options: argparse.Namespace, done: dict[str, dict[str, Any]]) -> None:
    files = [str(path) for test in MODULES[name] for path in (ROOT / "tests").glob(f"*/test_{test}.py")]
    assert len(files) == len(MODULES[name]), files
    arguments = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
    pytest.main([*arguments, *files], plugins=[Faults(name, options, done)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", nargs="*", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--sample", type=int, default=0, help="so many mutants of a module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "mutants.jsonl")
    parser.add_argument("--again", action="store_true", help="try those that survived once more")
    parser.add_argument("--report", action="store_true", help="of what was found before, without running anything")
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    lines = options.results.read_text(encoding="utf-8").splitlines() if options.results.exists() else []
    done = {line["key"]: line for line in map(json.loads, lines)}
    os.chdir(ROOT)
    for name in () if options.report else options.module:
        if len(options.module) == 1:
            run(name, options, done)
        elif not (pid := os.fork()):  # each module in a process of its own: pytest imports its files once
            run(name, options, done)
            os._exit(0)
        else:
            os.waitpid(pid, 0)
    lines = options.results.read_text(encoding="utf-8").splitlines() if options.results.exists() else []
    done = {line["key"]: line for line in map(json.loads, lines)}
    known = set()
    for name in options.module:
        path = ROOT / "src" / "opd" / (name.replace(".", "/") + ".py")
        known |= {m.key for m in mutants(name, ast.parse(path.read_text(encoding="utf-8")))}
    sys.exit(report(done, known) < 0.95)


if __name__ == "__main__":
    main()
