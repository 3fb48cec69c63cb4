"""What can be changed, and how: interventions as values.

An intervention names heads and neurons, says what becomes of their coefficients, and where:

- ``Zeroed``: 0. Of a head or an attention neuron that is its part of ``z``, as if its rows of
  ``W_O`` were 0; of an FFN neuron its activation, as if its row of ``W_out`` were 0.
- ``Scaled``: multiplied by a factor.
- ``MeanReplaced``: their mean over some prompts, measured by ``mean_coefficients``.
- ``Clamped``: brought into a range.

A head is all its dimensions. An attention neuron with a source position (``L9.H3.D17@5``) is what
that dimension carries from there to one read position: only that part of ``z`` is changed, at that
read position.

Several interventions act in the order given, each on what those before it left; but within an
attention layer what comes from one source position is changed first, for ``z`` is a sum over them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host, check_exists
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, Head, Kind, parse_part
from tl_neuron_attr.prompts import TokenizedPrompt, integer

Part = Head | FFNNeuron | AttnNeuron
"""What an intervention can name."""


@dataclass(frozen=True)
class Intervention:
    """What all interventions have. It changes nothing until it is run, or written into weights."""

    parts: tuple[Part, ...] = ()
    """Each once, in the order given."""
    position: int | None = field(default=None, kw_only=True)
    """The one position where coefficients are changed; ``None`` for all of them.

    It counts along the rows of token ids as the model is given them, from 0, padding included, the
    same in every row of a batch; below 0 from the end, so that -1 is the last.
    """

    def __post_init__(self) -> None:
        if isinstance(self.parts, str):
            name = type(self).__name__
            raise InputError(
                f"{name} is made of heads and neurons, got the text {self.parts!r}; read labels "
                f"with {_MAKERS.get(name, 'zero')}({self.parts!r}"
                f"{', ...' if name != 'Zeroed' else ''})"
            )
        if isinstance(self.parts, Part) or not isinstance(self.parts, Iterable):
            raise InputError(
                f"{type(self).__name__} is made of several heads and neurons, got {self.parts!r}; "
                "put it into a tuple"
            )
        object.__setattr__(self, "parts", tuple(dict.fromkeys(map(_part, self.parts))))

    def __len__(self) -> int:
        return len(self.parts)

    def __str__(self) -> str:
        """In words: what is done, to what, and where."""
        return f"{self._done()} {self._labels()}{self._place()}"

    def _done(self) -> str:
        return type(self).__name__

    def _labels(self) -> str:
        return ",".join(map(str, self.parts)) or "nothing"

    def _place(self) -> str:
        return "" if self.position is None else f" at position {self.position}"


@dataclass(frozen=True)
class Zeroed(Intervention):
    """Heads and neurons held at zero."""

    def __str__(self) -> str:
        """Its labels; without a position ``parse`` reads them back."""
        return f"{self._labels()}{self._place()}"

    @classmethod
    def parse(cls, labels: str) -> "Zeroed":
        """Read labels separated by commas, as ``str`` writes them: ``"L3.H2,L9.N12,L9.H3.D17@5"``.

        Raises:
            InputError: If one of them is no label.
        """
        return cls(_parsed(labels))


@dataclass(frozen=True)
class Scaled(Intervention):
    """Heads and neurons whose coefficients are multiplied by ``factor``."""

    factor: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.factor):
            raise InputError(f"a factor must be finite, got {self.factor}")

    def _done(self) -> str:
        return f"{self.factor:g} times"


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanCoefficients:
    """The mean coefficient of every FFN neuron and attention neuron: a value, without the model."""

    ffn: Float[Tensor, "layer d_mlp"]
    z: Float[Tensor, "layer head d_head"]
    """Of attention neurons summed over source positions."""
    n_positions: int
    """How many positions it is a mean over, of all prompts together."""

    __repr__ = brief

    def of(self, kind: Kind, layer: int) -> Float[Tensor, "*unit"]:
        """Those of one layer's FFN neurons, or of its ``z``."""
        return (self.ffn if kind == "ffn" else self.z)[layer]

    def check_fits(self, host: Host) -> None:
        """Stop where these cannot be means of this model.

        Raises:
            InputError: If they are of another shape.
        """
        wanted = {
            "ffn": (host.n_layers, host.d_mlp),
            "z": (host.n_layers, host.n_heads, host.d_head),
        }
        for name, shape in wanted.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise InputError(
                    f"the means are of another model: {name} is of shape {list(found)}, here it "
                    f"must be {list(shape)}; measure them with mean_coefficients(model, prompts)"
                )


@dataclass(frozen=True)
class MeanReplaced(Intervention):
    """Heads and neurons held at the mean their coefficients have over some prompts."""

    means: MeanCoefficients = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.means, MeanCoefficients):
            raise InputError(
                f"means must be MeanCoefficients, got a {type(self.means).__name__}; measure them "
                "with mean_coefficients(model, prompts)"
            )
        for part in self.parts:
            if isinstance(part, AttnNeuron) and part.source_pos is not None:
                raise InputError(
                    f"a mean is of the whole neuron, not of what {part} carries from one position; "
                    f"leave out @{part.source_pos}"
                )

    def _done(self) -> str:
        return "the mean of"


@dataclass(frozen=True)
class Clamped(Intervention):
    """Heads and neurons whose coefficients are brought into a range."""

    low: float | None = field(default=None, kw_only=True)
    high: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(end is not None and math.isnan(end) for end in (self.low, self.high)):
            raise InputError(f"a range must end at numbers, got {self.low} and {self.high}")
        if self.low is None and self.high is None:
            raise InputError("a range needs an end: give low, high, or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise InputError(f"low must not be above high, got {self.low:g} and {self.high:g}")

    def _done(self) -> str:
        low = "-inf" if self.low is None else f"{self.low:g}"
        high = "inf" if self.high is None else f"{self.high:g}"
        return f"within {low} and {high}:"


_MAKERS = {"Scaled": "scale", "MeanReplaced": "replace_mean", "Clamped": "clamp"}


# --- made of labels ---------------------------------------------------------------------------


def zero(parts: Any, *, position: SupportsIndex | None = None) -> Zeroed:
    """Heads and neurons held at zero.

    Args:
        parts: A head or neuron, labels (``"L3.H2,L9.N12"``), or several of either.
        position: The one position where; by default everywhere.

    Raises:
        InputError: If something is neither a label nor a head or neuron.
    """
    return Zeroed(_parts(parts), position=_position(position))


def scale(parts: Any, factor: SupportsFloat, *, position: SupportsIndex | None = None) -> Scaled:
    """Heads and neurons, given as to ``zero``, whose coefficients are multiplied by ``factor``.

    Raises:
        InputError: As ``zero``; if the factor is no finite number.
    """
    return Scaled(_parts(parts), factor=_number(factor, "a factor"), position=_position(position))


def replace_mean(
    parts: Any, means: MeanCoefficients, *, position: SupportsIndex | None = None
) -> MeanReplaced:
    """Heads and neurons, given as to ``zero``, held at their means.

    Raises:
        InputError: As ``zero``; if ``means`` is something else, or a neuron of one source position
            is among the parts.
    """
    return MeanReplaced(_parts(parts), means=means, position=_position(position))


def clamp(
    parts: Any,
    *,
    low: SupportsFloat | None = None,
    high: SupportsFloat | None = None,
    position: SupportsIndex | None = None,
) -> Clamped:
    """Heads and neurons, given as to ``zero``, whose coefficients stay from ``low`` to ``high``.

    Of a head that is each of its dimensions.

    Raises:
        InputError: As ``zero``; if neither end is given, one is no number, or they are exchanged.
    """
    return Clamped(
        _parts(parts),
        low=None if low is None else _number(low, "the range's low end"),
        high=None if high is None else _number(high, "the range's high end"),
        position=_position(position),
    )


def as_zeroed(parts: Any) -> Zeroed:
    """``zero(parts)``, or a ``Zeroed`` as it is.

    Raises:
        InputError: If something is neither a label nor a part; for another intervention.
    """
    if isinstance(parts, Zeroed):
        return parts
    if isinstance(parts, Intervention):
        raise InputError(
            f"here heads and neurons can only be zeroed, got {parts}; for other interventions run "
            "the model yourself: with intervened(model, ...)"
        )
    return zero(parts)


def as_interventions(given: Any) -> tuple[Intervention, ...]:
    """One intervention or several, in their order.

    Raises:
        InputError: If something is none.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        given = (given,)
    several = tuple(given)
    for one in several:
        if not isinstance(one, Intervention):
            raise InputError(
                f"an intervention was expected, got {one!r}; make one with zero, scale, "
                "replace_mean or clamp, e.g. zero('L3.H2')"
            )
    return several


def _parts(given: Any) -> tuple[Part, ...]:
    if isinstance(given, Intervention):
        raise InputError(f"heads and neurons were expected, got an intervention ({given})")
    if isinstance(given, str):
        return _parsed(given)
    each = given if isinstance(given, Iterable) else [given]
    read = [_parsed(part) if isinstance(part, str) else (_part(part),) for part in each]
    return tuple(part for group in read for part in group)


def _parsed(labels: Any) -> tuple[Part, ...]:
    if not isinstance(labels, str):
        raise InputError(f"labels must be text, like 'L3.H2,L9.N12', got {labels!r}")
    try:
        return tuple(parse_part(label.strip()) for label in labels.split(","))
    except ValueError as error:
        raise InputError(f"cannot tell what to change: {error}") from error


def _part(value: Any) -> Part:
    if not isinstance(value, Part):
        raise InputError(f"a head or a neuron can be changed, not {value!r}")
    numbers = vars(value)
    types = set(map(type, numbers.values()))
    if types == _INT or (types == _INT_OR_NONE and getattr(value, "source_pos", 0) is None):
        return value
    whole = {
        name: integer(number, f"a part's {name}")
        for name, number in numbers.items()
        if not (name == "source_pos" and number is None)
    }
    return type(value)(**whole)


_INT, _INT_OR_NONE = {int}, {int, type(None)}


def _position(value: SupportsIndex | None) -> int | None:
    return None if value is None else integer(value, "a position")


def _number(value: Any, what: str) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{what} must be a number, got {value!r}") from None


# --- checked against a model ------------------------------------------------------------------


def check_zeroed(host: Host, zeroed: Zeroed, prompt: TokenizedPrompt | None = None) -> None:
    """Stop before the forward pass where the model has no such head or neuron.

    Raises:
        InputError: Naming the first part that does not exist; with ``prompt`` also one whose
            source position comes after the read position. If it is zeroed at one position only,
            for rows go without their parts everywhere.
    """
    if zeroed.position is not None:
        raise InputError(
            f"here parts are zeroed at all positions, but {zeroed} was given; leave out position, "
            "or run the model yourself: with intervened(model, ...)"
        )
    for part in zeroed.parts:
        check_exists(host, part, None if prompt is None else prompt.read_pos)


def check_interventions(
    host: Host, interventions: Iterable[Intervention], n_pos: int | None = None
) -> None:
    """Stop before the forward pass where an intervention cannot be run.

    Raises:
        InputError: Naming a part that the model does not have; for a position that no run of
            ``n_pos`` tokens (by default of the whole context) has; a source position without a
            read position, or after it; means of another model.
    """
    length = host.n_ctx if n_pos is None else n_pos
    for intervention in interventions:
        position = intervention.position
        if position is not None and not -length <= position < length:
            raise InputError(
                f"position {position} is out of range: "
                + (
                    f"the model's context is {length} tokens"
                    if n_pos is None
                    else f"there are {length} tokens"
                )
                + f" (0 to {length - 1}, or -{length} to -1 from the end)"
            )
        if isinstance(intervention, MeanReplaced):
            intervention.means.check_fits(host)
        read_pos = None
        if position is not None:
            known = position >= 0 or n_pos is not None
            read_pos = position % length if known else length - 1
        for part in intervention.parts:
            source = isinstance(part, AttnNeuron) and part.source_pos is not None
            if source and position is None:
                check_exists(host, part)
                raise InputError(
                    f"{part} is what is carried to one read position: say which with position=, "
                    "e.g. position=-1 for the last"
                )
            check_exists(host, part, read_pos)


# --- as tensors -------------------------------------------------------------------------------


def units_by_layer(
    host: Host, parts: Iterable[Part]
) -> dict[tuple[Kind, int], Bool[Tensor, "*unit"]]:
    """Which of a layer's FFN neurons, or of its ``z``, the parts are, source positions left out."""
    found: dict[tuple[Kind, int], Tensor] = {}
    for part in parts:
        if isinstance(part, FFNNeuron):
            nothing = torch.zeros(host.d_mlp, dtype=torch.bool)
            found.setdefault(("ffn", part.layer), nothing)[part.index] = True
        elif not (isinstance(part, AttnNeuron) and part.source_pos is not None):
            nothing = torch.zeros(host.n_heads, host.d_head, dtype=torch.bool)
            index = part.index if isinstance(part, AttnNeuron) else slice(None)
            found.setdefault(("attn", part.layer), nothing)[part.head, index] = True
    return found


def sources_by_layer(parts: Iterable[Part]) -> dict[int, Int[Tensor, "part 3"]]:
    """Head, source position and dimension of each attention neuron that has a source position."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for part in parts:
        if isinstance(part, AttnNeuron) and part.source_pos is not None:
            found.setdefault(part.layer, []).append((part.head, part.source_pos, part.index))
    return {layer: torch.tensor(each) for layer, each in found.items()}
