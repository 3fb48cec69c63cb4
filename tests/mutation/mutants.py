"""A module's mutants: small faults, each put into one place of its functions.

What mutmut and cosmic-ray make, and what numerical code gets wrong besides (a lost ``abs``,
``amax`` for ``amin``). Left as they are: docstrings, annotations, decorators, assertions
(``strict`` is one), and the texts of errors and of what notebooks show, which are no behaviour;
that an error is raised is.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_CALCULATED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_OTHER_NAME = {
    "min": "max",
    "max": "min",
    "amin": "amax",
    "amax": "amin",
    "any": "all",
    "all": "any",
    "minimum": "maximum",
    "maximum": "minimum",
    "argmax": "argmin",
    "argmin": "argmax",
    "floor": "ceil",
    "ceil": "floor",
}
_CAN_BE_LEFT_OUT = frozenset(
    "abs clamp exp log sqrt rsqrt square neg flip T softmax cumsum tanh sigmoid".split()
)
_TEXTS = ("__repr__", "__str__", "_repr_html_")
_NEGATED_BY_OTHERS = (ast.Compare, ast.UnaryOp, ast.BoolOp)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault, in one function of a module or in a number that the module names."""

    module: str
    where: str
    """The outermost function it is in, by qualified name, or the name of a module's number."""
    lines: range
    """Those of its statement: a test that runs one of them may notice."""
    line: int
    column: int
    text: str
    """What stood there, and what stands there now."""
    put: Callable[[], None]
    """Puts the fault into the module's tree."""

    @property
    def key(self) -> str:
        """The same in every run, as long as the module is."""
        return f"{self.module}:{self.line}:{self.column} {self.text}"

    @property
    def name(self) -> str:
        """The same wherever its function moves to."""
        return f"{self.module}.{self.where}:{self.column}: {self.text}"


def mutants_of(module: str, tree: ast.Module) -> list[Mutant]:
    """All of them, in order; each once."""
    found = {each.key: each for node in tree.body for each in _of_definition(module, node, "")}
    return list(found.values())


def _of_definition(module: str, node: ast.stmt, inside: str) -> Iterator[Mutant]:
    if isinstance(node, ast.ClassDef):
        for each in node.body:
            if not isinstance(each, ast.Assign):  # a field's default was read when it was imported
                yield from _of_definition(module, each, f"{inside}{node.name}.")
    elif isinstance(node, ast.FunctionDef) and node.name not in _TEXTS:
        yield from _Function(module, f"{inside}{node.name}").mutants(node)
    elif isinstance(node, ast.Assign) and not inside and isinstance(node.targets[0], ast.Name):
        if isinstance(node.value, ast.Constant) and type(node.value.value) in (int, float):
            yield from _Function(module, node.targets[0].id).changed_number(node)


class _Function:
    def __init__(self, module: str, where: str):
        self.module, self.where = module, where

    def mutants(self, function: ast.FunctionDef) -> Iterator[Mutant]:
        whole = range(function.body[0].lineno, function.body[-1].end_lineno + 1)
        for defaults in (function.args.defaults, function.args.kw_defaults):
            for place, value in enumerate(defaults):
                if value is not None:
                    yield from self._expression(value, _into_list(defaults, place), whole)
        yield from self._block(function.body)

    def changed_number(self, node: ast.Assign) -> Iterator[Mutant]:
        yield from self._expression(node.value, _into_field(node, "value"), _lines_of(node))

    def _mutant(self, old, new, put, lines) -> Mutant:
        return Mutant(
            module=self.module,
            where=self.where,
            lines=lines,
            line=old.lineno,
            column=old.col_offset,
            text=f"{ast.unparse(old)} -> {ast.unparse(new) if new else '(left out)'}",
            put=lambda: put(new),
        )

    def _block(self, body: list[ast.stmt]) -> Iterator[Mutant]:
        for place, node in enumerate(body):
            if isinstance(node, ast.Assert) or _is_text(node):
                continue
            if isinstance(node, ast.FunctionDef):
                yield from self._block(node.body)
                continue
            if _can_go(node):

                def leave_out(_, body=body, place=place):
                    body[place] = ast.copy_location(ast.Pass(), body[place])

                yield self._mutant(node, None, leave_out, _lines_of(node))
            if isinstance(node, ast.Raise):
                continue
            if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
                nothing = ast.copy_location(ast.Constant(None), node.value)
                yield self._mutant(node.value, nothing, _into_field(node, "value"), _lines_of(node))
            if isinstance(node, (ast.If, ast.While)) and not isinstance(
                node.test, _NEGATED_BY_OTHERS
            ):
                negated = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
                yield self._mutant(node.test, negated, _into_field(node, "test"), _lines_of(node))
            if isinstance(node, ast.AugAssign) and type(node.op) in _CALCULATED:
                other = ast.AugAssign(node.target, _CALCULATED[type(node.op)](), node.value)
                yield self._mutant(
                    node, ast.copy_location(other, node), _into_list(body, place), _lines_of(node)
                )
            for field, value in ast.iter_fields(node):
                if field in ("body", "orelse", "finalbody"):
                    yield from self._block(value)
                elif field not in ("annotation", "target", "targets"):
                    yield from self._values(node, field, value, _lines_of(node))

    def _values(self, parent, field, value, lines) -> Iterator[Mutant]:
        if isinstance(value, list):
            for place, each in enumerate(value):
                if isinstance(each, ast.AST):
                    yield from self._expression(each, _into_list(value, place), lines)
        elif isinstance(value, ast.AST):
            yield from self._expression(value, _into_field(parent, field), lines)

    def _expression(self, node: ast.AST, put, lines) -> Iterator[Mutant]:
        if isinstance(node, ast.JoinedStr) or getattr(node, "arg", None) == "strict":
            return
        for other in _others(node):
            if isinstance(other, ast.expr):
                ast.fix_missing_locations(ast.copy_location(other, node))
                yield self._mutant(node, other, put, lines)
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "op", "ops", "ctx"):
                yield from self._values(node, field, value, lines)


def _others(node: ast.AST) -> Iterator[ast.expr]:
    """What may stand in the place of one expression."""
    if isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            if type(op) in _COMPARED:
                ops = [*node.ops[:place], _COMPARED[type(op)](), *node.ops[place + 1 :]]
                yield ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in _CALCULATED:
        yield ast.BinOp(node.left, _CALCULATED[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Constant):
        yield from _other_constants(node)
    elif isinstance(node, ast.Slice):
        if node.lower is not None:
            yield ast.Slice(None, node.upper, node.step)
        if node.upper is not None:
            yield ast.Slice(node.lower, None, node.step)
    elif isinstance(node, ast.Attribute) and node.attr in _CAN_BE_LEFT_OUT and node.attr == "T":
        yield node.value
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)


def _other_constants(node: ast.Constant) -> Iterator[ast.expr]:
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, (int, float)):
        yield ast.Constant(value + 1)
        if value not in (0, -1):
            yield ast.Constant(value - 1)
    elif isinstance(value, str) and value:
        yield ast.Constant(f"X{value}X")


def _other_calls(node: ast.Call) -> Iterator[ast.expr]:
    name = node.func
    if isinstance(name, ast.Name) and name.id in _OTHER_NAME:
        other = ast.Name(_OTHER_NAME[name.id], ast.Load())
        yield ast.Call(other, node.args, node.keywords)
    if isinstance(name, ast.Attribute):
        if name.attr in _OTHER_NAME:
            other = ast.Attribute(name.value, _OTHER_NAME[name.attr], ast.Load())
            yield ast.Call(other, node.args, node.keywords)
        of_module = isinstance(name.value, ast.Name) and name.value.id in ("torch", "math")
        if name.attr in _CAN_BE_LEFT_OUT and not of_module:
            yield name.value
    for place in range(len(node.args)):
        if len(node.args) > 1:
            yield ast.Call(name, node.args[:place] + node.args[place + 1 :], node.keywords)
    for place, keyword in enumerate(node.keywords):
        if keyword.arg != "strict":
            yield ast.Call(name, node.args, node.keywords[:place] + node.keywords[place + 1 :])


def _lines_of(node: ast.stmt) -> range:
    """Those of a statement, without the statements in it."""
    inside = getattr(node, "body", None)
    last = inside[0].lineno - 1 if inside else node.end_lineno
    return range(node.lineno, max(last, node.lineno) + 1)


def _can_go(node: ast.stmt) -> bool:
    """Whether a statement may be left out: without a name that others need."""
    if isinstance(node, (ast.Raise, ast.Expr, ast.AugAssign, ast.Continue, ast.Break)):
        return True
    return isinstance(node, ast.Assign) and not isinstance(node.targets[0], (ast.Name, ast.Tuple))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _into_field(parent: ast.AST, field: str) -> Callable[[ast.AST | None], None]:
    return lambda new: setattr(parent, field, new)


def _into_list(values: list, place: int) -> Callable[[ast.AST | None], None]:
    return lambda new: values.__setitem__(place, new)
