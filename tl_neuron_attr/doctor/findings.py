"""What a check can find: a status, what was compared, and by how much it was off."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "approximate", "refused", "fails", "not checked"]
"""``ok``: looked at, and as it should be. ``approximate``: it works, but what it gives is not what
the same question gives elsewhere, as the finding says. ``refused``: this package will not do it, on
purpose. ``fails``: looked at, and wrong. ``not checked``: nobody looked, as the finding says."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How far two sides of an equation are apart, in one precision."""

    name: str
    """Of what the equation is about."""
    equation: str
    error: float
    tolerance: float
    where: str = ""
    seen: bool = True
    """Whether there was anything to look at."""

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the card."""

    name: str
    """What was looked at."""
    status: Status
    says: str
    """The equation, or the reason, in a few words."""
    error: float | None = None
    """In the dtype of the user's model; ``None`` where nothing was measured."""
    tolerance: float | None = None
    """What the error was compared with."""
    double_error: float | None = None
    """The same of a copy of the model in float64."""
    double_tolerance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: a number that is none becomes ``None``."""
        facts: dict[str, Any] = {"name": self.name, "status": self.status, "says": self.says}
        for name in ("error", "tolerance", "double_error", "double_tolerance"):
            value = getattr(self, name)
            facts[name] = value if value is not None and math.isfinite(value) else None
        return facts


# What half precision allows, and nothing wider: an error may hide in it.
_COARSE = 1e-3


def finding_of(own: Measured, double: Measured | None) -> Finding:
    """The line of what was measured in the model, and in its copy in float64 if there is one.

    Of what was measured in half precision alone, and is not equal to the last bit, it says no more
    than that it is approximately so.
    """
    if not own.seen:
        says = f"{own.equation}: there was nothing to look at"
        return Finding(name=own.name, status="not checked", says=says)
    coarse = double is None and own.tolerance > _COARSE and own.error > 0
    wrong = [each for each in (own, double) if each is not None and not each.holds]
    status: Status = "approximate" if coarse else "ok"
    says = f"{own.equation}, as far as half precision shows" if coarse else own.equation
    if wrong:
        status = "fails"
        where = f" at {wrong[0].where}" if wrong[0].where else ""
        inside = " in float64" if wrong[0] is double else ""
        says = (
            f"{own.equation} is off by {wrong[0].error:.2g}{where}{inside} "
            f"(allowed: {wrong[0].tolerance:.0e})"
        )
    return Finding(
        name=own.name,
        status=status,
        says=says,
        error=own.error,
        tolerance=own.tolerance,
        double_error=None if double is None else double.error,
        double_tolerance=None if double is None else double.tolerance,
    )


_ORDER: tuple[Status, ...] = ("ok", "not checked", "approximate", "refused", "fails")
"""From what says least of what is wrong to what says most."""


def worst(findings: Iterable[Finding]) -> Status:
    """The status of those that says most of what is wrong; ``not checked`` if there are none."""
    found = [each.status for each in findings]
    for status in reversed(_ORDER):
        if status in found:
            return status
    return "not checked"
