"""What is asked of an evaluation, checked before anything is run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex, get_args

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.evaluate.effects import CONTROLS, KINDS_OF, Which
from tl_neuron_attr.host import Host
from tl_neuron_attr.methods import METHODS, Method, method_name, method_of, neuron_shape
from tl_neuron_attr.prompts import at_least_one, at_least_zero
from tl_neuron_attr.topk import Kind


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which methods, which neurons, how many, and how."""

    methods: Mapping[str, Method]
    """By their names in tables, in the order given."""
    which: tuple[Which, ...]
    tops: tuple[int, ...]
    """In order."""
    limit: int | None
    seed: int
    batch_size: int
    budget: int
    correlate: bool

    @property
    def reference(self) -> str:
        """The method that controls stand beside: the first."""
        return next(iter(self.methods))

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of which neurons scores are needed."""
        needed = {kind for which in self.which for kind in KINDS_OF[which]}
        return tuple(kind for kind in get_args(Kind) if kind in needed)

    def check_fits(self, host: Host) -> None:
        """Stop where the model has fewer neurons than are to be zeroed.

        Raises:
            InputError: Saying how many there are.
        """
        for kind in self.kinds:
            there_are = math.prod(neuron_shape(host, kind))
            if self.tops[-1] > there_are:
                raise InputError(
                    f"top is {self.tops[-1]}, but the model has {there_are} {kind} neurons"
                )

    @classmethod
    def of(cls, *, methods: Any, neurons: Any, top: Any, limit: Any, **others: Any) -> "Request":
        """The request that these arguments of ``evaluate`` make.

        Raises:
            InputError: For the first that is wrong.
        """
        return cls(
            methods=chosen_methods(methods),
            which=chosen_kinds(neurons),
            tops=chosen_tops(top),
            limit=None if limit is None else at_least_one(limit, "limit"),
            seed=at_least_zero(others["seed"], "seed"),
            batch_size=at_least_one(others["batch_size"], "batch_size"),
            budget=at_least_one(others["budget"], "budget"),
            correlate=bool(others["correlate"]),
        )


def chosen_methods(methods: Any) -> dict[str, Method]:
    """Methods by the names they have in tables, in the order given.

    Raises:
        InputError: If one is unknown, called like a control, or two have one name.
    """
    if isinstance(methods, str):
        given = [name.strip() for name in methods.split(",") if name.strip()]
    else:
        given = [methods] if callable(methods) else list(methods)
    if not given:
        raise InputError(f"give at least one method: {', '.join(METHODS)}, or a function")
    found: dict[str, Method] = {}
    for each in given:
        if isinstance(each, str) and each in CONTROLS:
            raise InputError(f"{each!r} is a control, which is always there; leave it out")
        name = method_name(each)
        if name in CONTROLS:
            raise InputError(f"a method cannot be called {name!r}, as a control is; rename it")
        if name in found:
            raise InputError(f"two methods are called {name!r}; give each once, under its own name")
        found[name] = method_of(each)
    return found


def chosen_kinds(neurons: Any) -> tuple[Which, ...]:
    """What is zeroed, in the order given.

    Raises:
        InputError: If something else than ffn, attn and both is named, or one of them twice.
    """
    given = neurons.split(",") if isinstance(neurons, str) else list(neurons)
    found = [name for each in given for name in get_args(Which) if name == each]
    if not found or len(found) < len(given) or len(set(found)) < len(found):
        raise InputError(
            f"neurons must be ffn, attn or both, or several of these, each once; got {neurons!r}"
        )
    return tuple(found)


def chosen_tops(top: Any) -> tuple[int, ...]:
    """How many neurons are zeroed, in order.

    Raises:
        InputError: If one is no number, below 1, or given twice.
    """
    given = [top] if isinstance(top, (SupportsIndex, str)) else list(top)
    tops = sorted(at_least_one(each, "a number of neurons") for each in given)
    if not tops or len(set(tops)) < len(tops):
        raise InputError(f"top must be one or several different numbers of neurons; got {top!r}")
    return tuple(tops)
