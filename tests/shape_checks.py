"""Shapes and types are checked in the first calls of every function in every file of tests.

Checking a call takes longer than most calls take (an attribution: 42 ms in place of 11), and what
the hundredth of them would show the first one has. With ``CHECK_EVERY_CALL=1`` all are checked, as
``.ci/run`` does once. Functions are made ready when first called, which spares seconds of import.
"""

import dataclasses
import functools
import inspect
import os
from types import CodeType

import jaxtyping

CALLS = float("inf") if os.environ.get("CHECK_EVERY_CALL") else 8
"""How many calls of a function are checked in one file of tests."""

INNER_CALLS = 16 * CALLS
"""How many in all tests, of one that another function defines anew each time it runs: to make it
ready takes a hundred times as long as to call it."""

_checking = jaxtyping.jaxtyped
_calls: dict[CodeType, int] = {}
_inner_calls: dict[CodeType, int] = {}
_file: list[str] = [""]


def begin_test(file: str) -> None:
    """In the first test of a file each function's calls are counted anew."""
    if _file != [file]:
        _file[:] = [file]
        _calls.clear()


def jaxtyped(function=None, *, typechecker=None):
    """In place of jaxtyping's own decorator, which its import hook puts on all of the package."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(function):
        made = vars(function).get("__init__")
        if dataclasses.is_dataclass(function) and made is not None:
            function.__init__ = jaxtyped(made, typechecker=typechecker)
        return function
    code = function.__code__
    inner = "<locals>" in function.__qualname__
    counts, most = (_inner_calls, INNER_CALLS) if inner else (_calls, CALLS)
    if counts.get(code, 0) >= most:
        return function
    checked = None

    @functools.wraps(function)
    def counted(*args, **kwargs):
        nonlocal checked
        calls = counts.get(code, 0)
        if calls >= most:
            return function(*args, **kwargs)
        counts[code] = calls + 1
        if checked is None:
            checked = _ready(function, typechecker)
        return checked(*args, **kwargs)

    return counted


def _ready(function, typechecker):
    """What jaxtyping makes of it too, at less cost a call.

    jaxtyping looks at the arguments once more with what is returned, and tries parameters one by
    one to say which was wrong; here the type checker says it, which names the parameter as well.
    Hints in quotes and generators are left to it.
    """
    quoted = any(isinstance(hint, str) for hint in function.__annotations__.values())
    if typechecker is None or quoted or inspect.isgeneratorfunction(function):
        return _checking(function, typechecker=typechecker)
    checked = typechecker(function)

    def scoped(*args, **kwargs):
        if jaxtyping.config.jaxtyping_disable:  # by the fixture ``unchecked``
            return function(*args, **kwargs)
        with _checking("context"):  # where one name of an axis is one size
            return checked(*args, **kwargs)

    return scoped


# The import hook's decorators look it up there, so this comes before the package is imported.
jaxtyping.jaxtyped = jaxtyped
