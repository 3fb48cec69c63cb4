"""Faults for the mutation score: put where behaviour is, and nowhere else."""

import ast
import importlib.util
import sys
from pathlib import Path

SOURCE = '''
_LIMIT = 8


def clipped(values, most: int = 4, *, strict=True):
    """Between -1 and 1."""
    if len(values) > most and strict:
        raise ValueError(f"at most {most + 1}, not {len(values)}")
    total = values.abs().sum(0, keepdim=True)
    total += values[1:_LIMIT]
    return max(total, -1)
'''


def module_of_mutants():
    path = Path(__file__).parent / "mutation" / "mutants.py"
    spec = importlib.util.spec_from_file_location("mutants", path)
    module = sys.modules["mutants"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_fault_changes_one_place_and_none_a_text():
    mutants_of = module_of_mutants().mutants_of
    found = mutants_of("example", ast.parse(SOURCE))
    assert [each.text for each in found] == [
        *("8 -> 9", "8 -> 7", "4 -> 5", "4 -> 3", "True -> False"),
        "len(values) > most and strict -> len(values) > most or strict",
        "len(values) > most -> len(values) >= most",
        "raise ValueError(f'at most {most + 1}, not {len(values)}') -> (left out)",
        "values.abs().sum(0, keepdim=True) -> values.abs().sum(0)",
        *("values.abs() -> values", "0 -> 1", "True -> False"),
        "total += values[1:_LIMIT] -> (left out)",
        "total += values[1:_LIMIT] -> total -= values[1:_LIMIT]",
        *("1:_LIMIT -> :_LIMIT", "1:_LIMIT -> 1:", "1 -> 2", "1 -> 0"),
        "max(total, -1) -> None",
        "max(total, -1) -> min(total, -1)",
        *("max(total, -1) -> max(-1)", "max(total, -1) -> max(total)"),
        *("-1 -> 1", "1 -> 2", "1 -> 0"),
    ]
    sound = ast.unparse(ast.parse(SOURCE)).splitlines()
    for place, each in enumerate(found):
        tree = ast.parse(SOURCE)
        mutants_of("example", tree)[place].put()
        faulty = ast.unparse(ast.fix_missing_locations(tree)).splitlines()
        (before,) = (line for line in sound if line not in faulty)
        assert "Between" not in before and len(faulty) == len(sound), each.key
        assert each.line in each.lines or each.line == 5  # a default: of all the body
