"""Small faults in the source of a module, one at a time: what `mutants.py` tries the tests on."""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EQUIVALENT = Path(__file__).with_name("mutants_equivalent.txt")

_COMPARES: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_OPERATORS: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}
_NAMES = {
    "sum": "mean",
    "mean": "sum",
    "any": "all",
    "all": "any",
    "min": "max",
    "max": "min",
    "amin": "amax",
    "amax": "amin",
    "minimum": "maximum",
    "maximum": "minimum",
    "argmax": "argmin",
    "ones_like": "zeros_like",
    "zeros_like": "ones_like",
    "zeros": "ones",
    "new_zeros": "new_ones",
}
# Arguments that change memory and time alone.
_MEMORY = ("max_logits",)
# Without them a tensor, or an iterator, does the same.
_CONVERSIONS = ("int", "float", "bool", "list", "tuple")


@dataclass(frozen=True)
class Mutant:
    """One fault. owner: the function or method in which it lies, "" for a constant of the module; new: what takes the place of
    `getattr(parent, field)`, or of its item `index`; key: the same while the code around it does not change."""

    module: str
    owner: str
    line: int
    before: str
    after: str
    number: int
    kind: str
    parent: ast.AST
    field: str
    index: int | None
    new: Any

    @property
    def key(self) -> str:
        again = f" #{self.number}" if self.number else ""
        return f"{self.module} | {self.owner or '(module)'} | {self.before} -> {self.after}{again}"

    def swap(self) -> None:
        """Put the fault into the tree, or, the second time, take it out."""
        value = getattr(self.parent, self.field)
        if self.index is None:
            old = value
            setattr(self.parent, self.field, self.new)
        else:
            old = value[self.index]
            value[self.index] = self.new
        object.__setattr__(self, "new", old)


def mutants(module: str, tree: ast.Module) -> Iterator[Mutant]:
    """Every fault that is tried in a module, in order."""
    seen: Counter[str] = Counter()
    for found in _Walk(module).visit_body(tree):
        number = seen[found.key]
        seen[found.key] += 1
        yield found if not number else Mutant(**{**found.__dict__, "number": number})


class _Walk:
    def __init__(self, module: str) -> None:
        self._module = module

    def visit_body(self, tree: ast.Module) -> Iterator[Mutant]:
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef):
                        yield from self._function(inner, f"{node.name}.{inner.name}")
            elif isinstance(node, ast.FunctionDef):
                yield from self._function(node, node.name)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.UnaryOp | ast.BinOp):
                yield from self._expression("", "constant", node, "value", None)

    def _function(self, node: ast.FunctionDef, owner: str) -> Iterator[Mutant]:
        ordered = [*node.args.posonlyargs, *node.args.args]
        for field, names in (("defaults", ordered[-len(node.args.defaults) :]), ("kw_defaults", node.args.kwonlyargs)):
            for i, default in enumerate(getattr(node.args, field)):
                if default is not None and names[i].arg not in _MEMORY:
                    yield from self._expression(owner, f"{field}:{i}", node.args, field, i)
        yield from self._statements(owner, node, "body")

    def _statements(self, owner: str, parent: ast.AST, field: str) -> Iterator[Mutant]:
        for i, node in enumerate(getattr(parent, field)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a docstring
            stored = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)
            if isinstance(node, ast.Expr) and ast.unparse(node).startswith("assert_never("):
                continue  # what cannot be reached
            if stored or isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Continue | ast.Break):
                yield self._made(owner, "code", parent, field, i, ast.Pass())
            if not isinstance(node, ast.Assert | ast.Raise | ast.Import | ast.ImportFrom):
                yield from self._statement(owner, node)

    def _statement(self, owner: str, node: ast.stmt) -> Iterator[Mutant]:
        if isinstance(node, ast.If | ast.While):
            yield self._made(owner, "code", node, "test", None, ast.UnaryOp(ast.Not(), node.test))
        if isinstance(node, ast.AugAssign):
            for operator in _OPERATORS.get(type(node.op), ()):
                yield self._made(owner, "code", node, "op", None, operator(), shown=node)
        blocks = [node, *getattr(node, "cases", ())]
        for block in blocks:
            for name in ("body", "orelse", "finalbody"):
                if hasattr(block, name):
                    yield from self._statements(owner, block, name)
        if isinstance(node, ast.FunctionDef):
            return
        for name in ("value", "test", "iter", "subject"):
            if isinstance(getattr(node, name, None), ast.expr):
                yield from self._expression(owner, "code", node, name, None)
        for item in getattr(node, "items", ()):
            yield from self._expression(owner, "code", item, "context_expr", None)

    def _expression(self, owner: str, kind: str, parent: Any, field: str, index: int | None) -> Iterator[Mutant]:
        node = getattr(parent, field) if index is None else getattr(parent, field)[index]
        if isinstance(node, ast.JoinedStr | ast.Lambda):
            return
        for new in _swapped(node):
            yield self._made(owner, kind, parent, field, index, new)
        for name, value in ast.iter_fields(node):
            if isinstance(value, ast.expr):
                yield from self._expression(owner, kind, node, name, None)
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    yield from self._item(owner, kind, node, name, i, item)

    def _item(self, owner: str, kind: str, node: ast.expr, name: str, i: int, item: Any) -> Iterator[Mutant]:
        if isinstance(item, ast.keyword) and item.arg == "strict":
            return
        if isinstance(item, ast.keyword):
            yield from self._expression(owner, kind, item, "value", None)
        elif isinstance(item, ast.comprehension):
            yield from self._expression(owner, kind, item, "iter", None)
            for k in range(len(item.ifs)):
                yield self._made(owner, kind, item, "ifs", k, ast.Constant(True))
                yield from self._expression(owner, kind, item, "ifs", k)
        elif isinstance(item, ast.expr):
            yield from self._expression(owner, kind, node, name, i)

    def _made(
        self, owner: str, kind: str, parent: Any, field: str, index: int | None, new: Any, shown: ast.AST | None = None
    ) -> Mutant:
        old = getattr(parent, field) if index is None else getattr(parent, field)[index]
        place = shown or old
        before = ast.unparse(place)
        if shown is None:
            after = ast.unparse(new)
        else:
            setattr(parent, field, new)
            after = ast.unparse(shown)
            setattr(parent, field, old)
        if isinstance(new, ast.expr | ast.stmt):
            ast.fix_missing_locations(ast.copy_location(new, place))
        return Mutant(
            self._module, owner, getattr(place, "lineno", 0), before, after, 0, kind, parent, field, index, new
        )


def _swapped(node: ast.expr) -> Iterator[ast.expr]:
    """What may take the place of an expression."""
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                for new in _COMPARES[type(op)]:
                    yield ast.Compare(node.left, [*node.ops[:i], new(), *node.ops[i + 1 :]], node.comparators)
        case ast.BinOp(left, op, right):
            yield from (ast.BinOp(left, new(), right) for new in _OPERATORS.get(type(op), ()))
            yield from (left, right) if isinstance(op, ast.Mult | ast.BitAnd | ast.BitOr) else ()
        case ast.BoolOp(op, operands):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), operands)
            yield from (_without(op, operands, i) for i in range(len(operands)))
        case ast.UnaryOp(ast.USub(), ast.Constant(int())):
            pass  # the last dimension of two is dimension 1; other numbers take its place below
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Constant(value):
            yield from map(ast.Constant, _other_constants(value))
        case ast.Slice():
            yield from _other_slices(node)
        case ast.Call(func, arguments, keywords):
            yield from _other_calls(func, arguments, keywords)


def _without(op: ast.boolop, operands: list[ast.expr], i: int) -> ast.expr:
    kept = [*operands[:i], *operands[i + 1 :]]
    return kept[0] if len(kept) == 1 else ast.BoolOp(op, kept)


def _other_constants(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
        if value > 0:
            yield value - 1
    elif isinstance(value, float):
        yield value * 2 if value else 1.0


def _other_slices(node: ast.Slice) -> Iterator[ast.expr]:
    lower, upper, step = node.lower, node.upper, node.step
    if lower is not None:
        yield ast.Slice(None, upper, step)
        yield ast.Slice(ast.BinOp(lower, ast.Add(), ast.Constant(1)), upper, step)
    if upper is not None:
        yield ast.Slice(lower, None, step)
        yield ast.Slice(lower, ast.BinOp(upper, ast.Sub(), ast.Constant(1)), step)
    if step is not None:
        yield ast.Slice(lower, upper, None)


def _other_calls(func: ast.expr, arguments: list[ast.expr], keywords: list[ast.keyword]) -> Iterator[ast.expr]:
    for i in range(len(keywords) if ast.unparse(func) != "zip" else 0):  # strict: a guard of what cannot be
        yield ast.Call(func, arguments, [*keywords[:i], *keywords[i + 1 :]])
    first = [a for a in arguments[:1] if not isinstance(a, ast.Starred | ast.GeneratorExp)]
    if isinstance(func, ast.Attribute):
        if func.attr in _NAMES:
            yield ast.Call(ast.Attribute(func.value, _NAMES[func.attr], ast.Load()), arguments, keywords)
        if func.attr == "tolist":
            return  # what reads the numbers reads the tensor as well
        # a method's own object, or an argument of a function of a module
        yield func.value
        if isinstance(func.value, ast.Name):
            yield from first
    elif isinstance(func, ast.Name):
        if func.id in ("min", "max", "any", "all"):
            yield ast.Call(ast.Name(_NAMES[func.id], ast.Load()), arguments, keywords)
        yield from first if func.id not in _CONVERSIONS else ()


def shown(line: dict[str, Any]) -> str:
    _, owner, change = line["key"].split(" | ", 2)
    before, after = change.split(" -> ", 1)
    return f"src/opd/{line['module'].replace('.', '/')}.py:{line['line']} in {owner}\n    - {before}\n    + {after}"


def equivalent() -> dict[str, str]:
    """Mutants that no test can kill, with the reason of each."""
    found = {}
    for line in EQUIVALENT.read_text(encoding="utf-8").splitlines() if EQUIVALENT.exists() else ():
        if line.strip() and not line.startswith("#"):
            key, _, reason = line.partition(" :: ")
            assert reason, f"{EQUIVALENT.name}: no reason for {key}"
            found[key] = reason
    return found


def report(done: dict[str, dict[str, Any]], known: set[str]) -> float:
    """Print a table by module and the survivors; returns the share of mutants that died, equivalent ones left out."""
    print(
        f"\n{'module':26}{'mutants':>9}{'killed':>8}{'timeout':>9}{'survived':>10}{'equivalent':>12}{'invalid':>9}{'died':>8}"
    )
    reasons = equivalent()
    total: Counter[str] = Counter()
    for module in [*dict.fromkeys(line["module"] for line in done.values()), "all"]:
        mine = [d for d in done.values() if d["module"] == module and d["key"] in known] if module != "all" else []
        count = (
            total
            if module == "all"
            else Counter(
                "equivalent" if d["status"] == "survived" and d["key"] in reasons else d["status"] for d in mine
            )
        )
        if module != "all":
            total += count
        died, alive = count["killed"] + count["timeout"], count["survived"]
        share = died / max(1, died + alive)
        print(
            f"{module:26}{count.total():9}{count['killed']:8}{count['timeout']:9}{alive:10}{count['equivalent']:12}"
            f"{count['invalid']:9}{share:8.1%}"
        )
    print("\nsurvivors:")
    for line in done.values():
        if line["status"] == "survived" and line["key"] not in reasons and line["key"] in known:
            print(shown(line))
    return (total["killed"] + total["timeout"]) / max(1, total["killed"] + total["timeout"] + total["survived"])
