"""How many small faults, put into the core of the package one at a time, its tests notice.

    python tests/mutation/score.py --results DIRECTORY                  # a sample of each group
    python tests/mutation/score.py --results DIRECTORY --most 1000000    # all
    python tests/mutation/score.py --results DIRECTORY --again          # survivors, once more
    python tests/mutation/score.py --results DIRECTORY --table          # nothing but the table

Pytest collects once, runs each test that is new once under coverage (which test runs which line,
fixtures included), and then forks a child for each mutant: it puts the fault into the live function
and runs the tests that reach it, the quickest first, until one fails. So a mutant takes a second
instead of the half minute that importing torch and building the models takes. Results are appended
to ``DIRECTORY/results.jsonl``; what is there already is not done again.

Why not mutmut (3.8): it leaves out every decorated function but static and class methods, and so
all that stands under ``@full_precision()`` or ``@property``: the scores, the read-out, the bounds.
Why not cosmic-ray: it starts pytest anew for each mutant.

Children inherit torch as it stands, so it has one thread here. Needs ``fork``, and ``coverage``.
"""

import argparse
import ast
import collections
import contextlib
import gc
import hashlib
import json
import os
import re
import signal
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

import coverage
import pytest
from mutants import Mutant, mutants_of

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "tl_neuron_attr"

GROUPS = {
    "scores": ("scores",),
    "read-out": ("readout", "projection", "baselines", "rivals", "precision"),
    "decompositions": ("decompose", "pieces", "experts", "norms"),
    "bounds": ("topk", "intervals", "sums"),
    "query": ("query", "reading", "inputs"),
}

# Of these the subject's own tests; all others that run in this process may notice too.
FILES = """
    test_scores test_topk test_norms test_soft_cap test_lens test_experts test_query
    test_intervals test_targets test_attribute test_methods test_golden test_host test_cohere
    test_index test_closest test_graph test_capture test_devices test_properties
    test_answers test_compare test_in_context test_float64 test_readout test_state test_decompose
    test_families
""".split()

REASONS = json.loads((Path(__file__).parent / "survivors.json").read_text(encoding="utf-8"))

# Their results hold nothing that the package computed.
KEPT = ("definition_of", "built", "small")


@dataclass
class Reach:
    """What each test reaches, and what it costs."""

    lines: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Context (a test, or a fixture made for several) -> module -> lines."""
    seconds: dict[str, float] = field(default_factory=dict)
    fixtures: dict[str, list[str]] = field(default_factory=dict)
    """Test -> contexts of the fixtures it was given."""

    def of(self, test: str) -> list[str]:
        return [test, *self.fixtures.get(test, [])]

    def cost(self, test: str) -> float:
        return 0.02 + sum(self.seconds.get(each, 0.0) for each in self.of(test))


class Mutation:
    """The pytest plugin: tests once under coverage, then every mutant in a child."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.reach = Reach()
        self.coverage = None
        self.failed = False
        self.contexts = [""]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self):
        """Faults need be seen, not made small. After conftest, which loads another profile."""
        from hypothesis import Phase, settings

        phases = [Phase.explicit, Phase.generate]
        settings.register_profile(
            "mutation",
            settings.get_profile("ci"),
            phases=phases,
            max_examples=self.options.examples,
        )
        settings.load_profile("mutation")

    # --- which test reaches what ---

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if self.coverage is None or fixturedef.scope == "function":
            return (yield)
        context = self._context_of(fixturedef, request)
        self._enter(context)
        start = time.perf_counter()
        try:
            return (yield)
        finally:
            self.reach.seconds[context] = time.perf_counter() - start
            self.contexts.pop()
            self.coverage.switch_context(self.contexts[-1])

    @staticmethod
    def _context_of(fixturedef, request) -> str:
        place = getattr(request, "param_index", 0)
        return f"fixture {fixturedef.baseid}::{fixturedef.argname}[{place}]"

    def _enter(self, context: str) -> None:
        self.contexts.append(context)
        self.coverage.switch_context(context)

    def measure(self, items) -> None:
        # of its own: the project's configuration is for the whole suite, and counts branches
        self.coverage = coverage.Coverage(
            data_file=None,
            config_file=False,
            include=[str(PACKAGE / f"{m}.py") for g in GROUPS.values() for m in g],
        )
        self.coverage.start()
        for place, item in enumerate(items):
            clear_caches()
            self.contexts = [item.nodeid]
            self.coverage.switch_context(item.nodeid)
            start, before = time.perf_counter(), sum(self.reach.seconds.values())
            self.failed = False
            following = items[place + 1] if place + 1 < len(items) else None
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            made = sum(self.reach.seconds.values()) - before
            self.reach.seconds[item.nodeid] = time.perf_counter() - start - made
            if self.failed:
                print("fails without any mutant:", item.nodeid, flush=True)
                self.reach.seconds[item.nodeid] = -1.0
        self.coverage.stop()
        data = self.coverage.get_data()
        for file in data.measured_files():
            module = Path(file).stem
            for line, contexts in data.contexts_by_lineno(file).items():
                for context in contexts:
                    self.reach.lines.setdefault(context, {}).setdefault(module, []).append(line)
        made_of = collections.defaultdict(list)
        for context in self.reach.lines:
            if context.startswith("fixture "):
                baseid, _, name = context[len("fixture ") :].rpartition("::")
                made_of[name.rpartition("[")[0]].append((baseid, name, context))
        for item in items:
            self.reach.fixtures[item.nodeid] = [
                context
                for fixture in item.fixturenames
                for baseid, name, context in made_of[fixture]
                if item.nodeid.startswith(baseid)
                and name == f"{fixture}[{_index_of(item, fixture)}]"
            ]
        self.coverage = None

    # --- mutants ---

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        where = self.options.results / "reach.json"
        if where.exists() and not self.options.measure:
            self.reach = Reach(**json.loads(where.read_text()))
        new = [item for item in session.items if item.nodeid not in self.reach.seconds]
        if new:
            self.measure(new)
            where.write_text(json.dumps(vars(self.reach)))
        warm()
        items = {item.nodeid: item for item in session.items}
        gc.collect()
        gc.freeze()
        chosen = chosen_mutants(self.options)
        print(len(chosen), "mutants to run", flush=True)
        kills = collections.Counter()
        for number, (group, mutant) in enumerate(chosen, 1):
            tests = self.tests_for(mutant, items, kills)
            result = self.run(mutant, [items[each] for each in tests])
            if result.get("by"):
                kills[result["by"]] += 1
            record = {"group": group, "key": mutant.key, "where": mutant.where, **result}
            with (self.options.results / "results.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{number}/{len(chosen)} {result['outcome']:9} {mutant.key}", flush=True)
        return True

    def tests_for(self, mutant: Mutant, items, kills) -> list[str]:
        """Those that run its lines, the likeliest to notice first, for so many seconds in all."""
        reached = {
            context
            for context, modules in self.reach.lines.items()
            if any(line in mutant.lines for line in modules.get(mutant.module, ()))
        }
        found = [
            test
            for test in items
            if self.reach.seconds.get(test, -1.0) >= 0 and reached & set(self.reach.of(test))
        ]
        found.sort(key=self.reach.cost)
        alike = collections.Counter()  # one case of each test first
        rank = {}
        for test in found:
            function = test.partition("[")[0]
            own = 0.3 if mutant.module in function else 1.0
            tried = 1 + 0.5 * alike[function]
            rank[test] = self.reach.cost(test) * own * tried / (1 + kills[test])
            alike[function] += 1
        found.sort(key=rank.__getitem__)
        taken, seconds = [], 0.0
        for test in found:
            seconds += self.reach.cost(test)
            if taken and seconds > self.options.seconds:
                break
            taken.append(test)
        return taken

    def run(self, mutant: Mutant, tests) -> dict:
        """What becomes of a mutant: killed, survived, or too slow."""
        if not tests:
            return {"outcome": "survived", "tests": 0}
        reading, writing = os.pipe()
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            os.close(reading)
            self._in_child(mutant, tests, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        seconds = round(time.perf_counter() - start, 2)
        if os.WIFSIGNALED(status):
            slow = os.WTERMSIG(status) == signal.SIGALRM
            return {"outcome": "timeout" if slow else "killed", "by": "", "seconds": seconds}
        by = said.strip()
        outcome = "survived" if by == "nobody" else "killed"
        if outcome == "killed" and not by:
            raise RuntimeError(f"the child of {mutant.key} ended without a word")
        if outcome == "survived":
            return {"outcome": outcome, "tests": len(tests), "seconds": seconds}
        return {"outcome": outcome, "by": by, "seconds": seconds}

    def _in_child(self, mutant: Mutant, tests, writing) -> None:
        signal.alarm(int(20 + 4 * self.options.seconds))
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        said = "nobody"
        try:
            clear_caches()
            put_in(mutant)
            for test in tests:
                self.failed = False
                test.ihook.pytest_runtest_protocol(item=test, nextitem=None)
                if self.failed:
                    said = test.nodeid
                    break
        except BaseException as error:  # a child that cannot go on must not come back as a parent
            said = "" if isinstance(error, NotPut) else f"{type(error).__name__} outside of a test"
        os.write(writing, said.encode())
        os._exit(0)

    def pytest_runtest_logreport(self, report):
        self.failed = self.failed or report.failed


def _index_of(item, fixture: str) -> int:
    spec = getattr(item, "callspec", None)
    return spec.indices.get(fixture, 0) if spec is not None else 0


# --- putting a fault into what is alive ---------------------------------------------------------


class NotPut(RuntimeError):
    """The function that a mutant is in was not found."""


TREES: dict[str, ast.Module] = {}


def tree_of(module: str) -> ast.Module:
    if module not in TREES:
        TREES[module] = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    return TREES[module]


def put_in(mutant: Mutant) -> None:
    """Into the live module: the code of the function is replaced, wherever it was imported to."""
    name = f"tl_neuron_attr.{mutant.module}"
    module, tree = sys.modules[name], tree_of(mutant.module)
    mutant.put()
    whole = compile(ast.fix_missing_locations(tree), module.__file__, "exec")
    function = next((f for f in functions_of(module) if f.__qualname__ == mutant.where), None)
    if function is None:
        value = _number_of(tree, mutant.where)
        before = vars(module).get(mutant.where)
        if value is None or before is None:
            raise NotPut(mutant.key)
        for other in list(sys.modules.values()):
            known = getattr(other, "__name__", "").startswith("tl_neuron_attr")
            if known and vars(other).get(mutant.where) is before:
                setattr(other, mutant.where, value)
        return
    code = _code_of(whole, mutant.where)
    if code is None or len(code.co_freevars) != len(function.__code__.co_freevars):
        raise NotPut(mutant.key)
    definition = _definition_of(tree, mutant.where)
    scope = function.__globals__
    function.__code__ = code
    evaluated = [_value(each, scope) for each in definition.args.defaults]
    function.__defaults__ = tuple(evaluated) or None
    named = zip(definition.args.kwonlyargs, definition.args.kw_defaults, strict=True)
    by_name = {arg.arg: _value(each, scope) for arg, each in named if each is not None}
    function.__kwdefaults__ = by_name or None


def _value(expression: ast.expr, scope: dict) -> object:
    return eval(compile(ast.Expression(expression), "<default>", "eval"), scope)


def functions_of(module: types.ModuleType):
    """The functions that a module itself defines, from under whatever decorates them."""
    seen, found = set(), []
    left = [each for each in vars(module).values()]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, types.FunctionType):
            if each.__code__.co_filename == module.__file__:
                found.append(each)
            for cell in each.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    left.append(cell.cell_contents)
        elif isinstance(each, type) and each.__module__ == module.__name__:
            left.extend(vars(each).values())
        elif isinstance(each, property):
            left.append(each.fget)
        elif isinstance(each, (staticmethod, classmethod)):
            left.append(each.__func__)
        elif hasattr(each, "__wrapped__"):
            left.append(each.__wrapped__)
    return found


def _code_of(code: types.CodeType, where: str) -> types.CodeType | None:
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            if inner.co_qualname == where:
                return inner
            if where.startswith(f"{inner.co_qualname}."):
                return _code_of(inner, where)
    return None


def _definition_of(tree: ast.AST, where: str) -> ast.FunctionDef:
    node = tree
    for name in where.split("."):
        node = next(each for each in node.body if getattr(each, "name", None) == name)
    return node


def _number_of(tree: ast.Module, name: str) -> object:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return node.value.value
    return None


def clear_caches() -> None:
    """What tests and the package keep from call to call: a fault must show in it."""
    from tl_neuron_attr import identities, norms

    for known in (norms._measured, identities._verified, identities._verified_subkeys):
        known.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("test_"):
            for each, value in list(vars(module).items()):
                if hasattr(value, "cache_clear") and each not in KEPT:
                    value.cache_clear()


def warm() -> None:
    """The models that tests share, so that children need not build them."""
    conftest = sys.modules["conftest"]
    for family in conftest.SUPPORTED:
        conftest.bridge_of(family)
        conftest.bridge_of(family, dtype=conftest.torch.float64)
    conftest.bundled_model()


# --- which ----------------------------------------------------------------------------------------


def all_mutants() -> dict[str, list[Mutant]]:
    """Group -> its mutants, each module's in an order of chance that is always the same."""
    found = {}
    for group, modules in GROUPS.items():
        shuffled = []
        for module in modules:
            each = sorted(mutants_of(module, tree_of(module)), key=_by_chance)
            # the n-th of k is taken when the share n / k of the group is: modules in proportion
            shuffled += [((n + 0.5) / len(each), mutant) for n, mutant in enumerate(each)]
        found[group] = [mutant for _, mutant in sorted(shuffled, key=lambda pair: pair[0])]
    return found


def _by_chance(mutant: Mutant) -> str:
    return hashlib.sha256(mutant.name.encode()).hexdigest()


def known_results(directory: Path) -> dict[str, dict]:
    """Key -> its last result."""
    file = directory / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {record["key"]: record for record in map(json.loads, lines)}


def chosen_mutants(options: argparse.Namespace) -> list[tuple[str, Mutant]]:
    known = known_results(options.results)
    chosen = []
    for group, mutants in all_mutants().items():
        if options.group and group not in options.group:
            continue
        for place, mutant in enumerate(mutants):
            result = known.get(mutant.key)
            if options.only:
                take = options.only in mutant.key
            elif options.again:
                survived = result is not None and result["outcome"] == "survived"
                take = survived and reason_of(mutant) is None
            else:
                take = result is None and place < options.most
            if take:
                chosen.append((group, mutant))
    return chosen


def reason_of(mutant: Mutant) -> str | None:
    """Why no test should notice it, if that is known."""
    before, _, after = mutant.text.partition(" -> ")
    for argument, reason in REASONS["arguments"].items():
        for found in re.finditer(argument, before):
            if before[: found.start()] + before[found.end() :] == after:
                return reason
    return REASONS["mutants"].get(mutant.name)


def print_table(directory: Path) -> None:
    known = known_results(directory)
    print("| group | mutants | run | killed | of them too slow | survived | score |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    survivors = []
    for group, mutants in all_mutants().items():
        for name, some in [(group, mutants)] + [
            (f"`{module}.py`", [each for each in mutants if each.module == module])
            for module in GROUPS[group]
        ]:
            run = [known[each.key] for each in some if each.key in known]
            outcomes = collections.Counter(each["outcome"] for each in run)
            killed = outcomes["killed"] + outcomes["timeout"]
            score = f"{100 * killed / len(run):.0f} %" if run else ""
            numbers = len(some), len(run), killed, outcomes["timeout"], outcomes["survived"]
            print(f"| {name} | " + " | ".join(map(str, numbers)) + f" | {score} |")
        survivors += [
            f"| `{each.module}.{each.where}` | `{shown(each)}` | {reason_of(each) or '**?**'} |"
            for each in mutants
            if known.get(each.key, {}).get("outcome") == "survived"
        ]
    print("\n".join(["", "| in | fault | why it survives |", "| --- | --- | --- |"]))
    print("\n".join(sorted(survivors)))


def shown(mutant: Mutant) -> str:
    """A fault in one cell: of long expressions what differs; of short ones where they stand."""
    before, _, after = mutant.text.partition(" -> ")
    if after == "(left out)":
        return mutant.text.replace("|", "\\|")
    if len(before) > 40:
        same = len(os.path.commonprefix([before, after]))
        end = len(os.path.commonprefix([before[same:][::-1], after[same:][::-1]]))
        start = max(0, same - 24)
        before, after = (each[start : len(each) - max(0, end - 8)] for each in (before, after))
        return f"{'...' * (start > 0)}{before} -> {after}".replace("|", "\\|")
    source = (PACKAGE / f"{mutant.module}.py").read_text(encoding="utf-8").splitlines()
    line, column = source[mutant.line - 1], mutant.column
    if not line[column:].startswith(before) or len(before) > 20:
        return mutant.text.replace("|", "\\|")
    around = line[:column].lstrip()[-24:], line[column + len(before) :][:16]
    return f"{around[0]}[{before} -> {after}]{around[1]}".replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, required=True, help="a directory, kept between runs"
    )
    parser.add_argument("--most", type=int, default=80, help="mutants of each group, at most")
    parser.add_argument("--group", action="append", choices=list(GROUPS))
    parser.add_argument("--seconds", type=float, default=15.0, help="of tests for each mutant")
    parser.add_argument("--examples", type=int, default=12, help="of each property")
    parser.add_argument("--again", action="store_true", help="unexplained survivors, once more")
    parser.add_argument("--only", help="those with this text in their key")
    parser.add_argument(
        "--measure", action="store_true", help="which test reaches what, anew: else of new ones"
    )
    parser.add_argument("--table", action="store_true", help="print what is known, run nothing")
    options, to_pytest = parser.parse_known_args()  # -k, --deselect
    if options.table:
        print_table(options.results)
        return 0
    options.results.mkdir(parents=True, exist_ok=True)
    files = [str(TESTS / f"{name}.py") for name in FILES]
    quiet = ["-q", "-s", "-n", "0", "--tb=no", "-p", "no:cacheprovider"]
    return int(pytest.main([*quiet, *to_pytest, *files], plugins=[Mutation(options)]))


if __name__ == "__main__":
    sys.exit(main())
