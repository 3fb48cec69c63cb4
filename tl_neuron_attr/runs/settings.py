"""How a run is done: what is kept of each prompt, and how prompts are divided."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.methods import METHODS, method_name
from tl_neuron_attr.prompts import at_least_one, at_least_zero
from tl_neuron_attr.readout import CONVENTIONS, DEFAULT_BUDGET, Convention

WHAT = ("neurons", "query_neurons", "layers", "heads", "methods", "interventions")
"""Tables that can be asked for; ``answers`` is always there."""

DEFAULT_ZERO = (10,)
"""How many neurons of a kind are zeroed together, unless asked otherwise: as published."""

DEFAULT_WHAT = ("neurons", "layers")

LARGEST_BATCH = 64
"""Prompts in a batch where memory would allow more: beyond, nothing is gained on two cores."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All that decides what the files of a run hold, beside model and prompts."""

    what: tuple[str, ...] = DEFAULT_WHAT
    """Which of ``WHAT``, in that order."""
    top: int = 300
    """Neurons of each kind listed for a prompt."""
    convention: Convention = "exact"
    prepend_bos: bool | None = None
    budget: int = DEFAULT_BUDGET
    """Bytes a batch may take beyond the model, by ``plan``; of each worker."""
    batch_size: int | None = None
    """Prompts in a batch; ``None``: as many as the budget allows, 64 at most."""
    shard_size: int = 256
    """Prompts in a shard: what is lost at most when a process is killed."""
    threads: int = 1
    """CPU threads of each worker. Another number gives scores that differ by rounding, and so
    other bytes."""
    methods: tuple[str, ...] = ()
    """Whose best neurons the table ``methods`` lists, by name; empty without that table."""
    zero: tuple[int, ...] = ()
    """How many neurons ``interventions`` zeroes together, in order; empty without that table."""
    seed: int = 0
    """Of the random neurons that stand beside those zeroed; 0 without interventions."""

    @classmethod
    def of(
        cls,
        *,
        what: str | Iterable[str],
        batch_size: Any,
        methods: Any = (),
        zero: Any = None,
        seed: Any = 0,
        **given: Any,
    ) -> "RunSettings":
        """Checked settings.

        Raises:
            InputError: If a table or method is unknown, a number below 1, there is no such
                convention, or something is given for a table that is not asked for.
        """
        asked = set(_names(what))
        unknown = sorted(asked - set(WHAT))
        if unknown or not asked:
            raise InputError(
                f"what must be some of {', '.join(WHAT)}; got {unknown[0] if unknown else what!r}"
            )
        for name in ("top", "budget", "shard_size", "threads"):
            given[name] = at_least_one(given[name], name)
        if given["convention"] not in CONVENTIONS:
            raise InputError(
                f"convention must be one of {', '.join(CONVENTIONS)}; got {given['convention']!r}"
            )
        return cls(
            what=tuple(name for name in WHAT if name in asked),
            batch_size=None if batch_size is None else at_least_one(batch_size, "batch_size"),
            methods=_methods(methods, "methods" in asked),
            **_interventions(zero, seed, "interventions" in asked),
            **given,
        )

    @classmethod
    def from_plain(cls, facts: dict[str, Any]) -> "RunSettings":
        """Back from what ``plain`` gave."""
        lists = {name: tuple(value) for name, value in facts.items() if isinstance(value, list)}
        return cls(**{**facts, **lists})

    def plain(self) -> dict[str, Any]:
        """Ready for JSON."""
        facts = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in facts.items()}


def _names(given: Any) -> list[Any]:
    """Of one text with commas, or of several."""
    names = given.split(",") if isinstance(given, str) else list(given)
    return [name.strip() if isinstance(name, str) else name for name in names]


def _methods(given: Any, wanted: bool) -> tuple[str, ...]:
    """Names of methods, in the order given; a run is made by name, so that any worker finds them.

    Raises:
        InputError: If one is unknown, given twice, or cannot be used in a run.
    """
    several: Any = [given] if callable(given) else given
    names = _names(several) if several else []
    if bool(names) != wanted:
        raise InputError(
            f"the table methods needs methods: give some of {', '.join(METHODS)}"
            if wanted
            else "methods are given, but what does not ask for the table methods; add it to what"
        )
    own = next((each for each in names if not isinstance(each, str)), None)
    if own is not None:
        raise InputError(f"a run takes methods by name, for workers look them up; got {own!r}")
    found = tuple(method_name(name) for name in names)
    if len(set(found)) < len(found):
        raise InputError(f"a method is given twice: {', '.join(found)}; give each once")
    if "attribution_patching" in found:
        raise InputError(
            "attribution_patching needs a corrupted prompt beside each, which a run has not; leave "
            "it out, or use evaluate, which finds them"
        )
    return found


def _interventions(zero: Any, seed: Any, wanted: bool) -> dict[str, Any]:
    """``zero`` and ``seed``, checked; nothing of either without the table.

    Raises:
        InputError: If they are given without it, or a number of neurons is none, or there twice.
    """
    seed = at_least_zero(seed, "seed")
    if not wanted:
        if zero is not None or seed:
            raise InputError(
                f"{'zero' if zero is not None else 'seed'} is given, but what does not ask for the "
                "table interventions; add it to what"
            )
        return {}
    given: Any = DEFAULT_ZERO if zero is None else zero
    if isinstance(given, str):
        given = _whole_numbers(given)
    several = given if isinstance(given, Iterable) else [given]
    counts = sorted(at_least_one(each, "a number of neurons to zero") for each in several)
    if not counts or len(set(counts)) < len(counts):
        raise InputError(f"zero must be one or several different numbers of neurons; got {zero!r}")
    return {"zero": tuple(counts), "seed": seed}


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise InputError(
            f"zero must be numbers of neurons, like 10 or 10,30; got {text!r}"
        ) from None
