"""What we talk about: FFN neurons, attention neurons, heads, and their labels. No tensors."""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["ffn", "attn"]
"""Which of the two kinds of neuron."""


@dataclass(frozen=True, order=True)
class FFNNeuron:
    """One hidden unit of one FFN: a column of ``W_in`` (and ``W_gate``) and a row of ``W_out``."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}.N{self.index}"

    @classmethod
    def parse(cls, label: str) -> "FFNNeuron":
        """Read back what ``str`` wrote, e.g. ``"L9.N1234"``.

        Raises:
            ValueError: If ``label`` has another form.
        """
        match = re.fullmatch(r"L(\d+)\.N(\d+)", label)
        if match is None:
            raise ValueError(f"FFN neuron label must look like 'L9.N1234', got {label!r}")
        return cls(layer=int(match[1]), index=int(match[2]))


@dataclass(frozen=True)
class AttnNeuron:
    """One dimension of one attention head: a column of ``W_V`` and a row of ``W_O``.

    With ``source_pos`` it is what that dimension carries from one source position to the read
    position (the paper's attention neuron); without, the sum over all source positions.
    """

    layer: int
    head: int
    index: int
    source_pos: int | None = None

    def __str__(self) -> str:
        place = "" if self.source_pos is None else f"@{self.source_pos}"
        return f"L{self.layer}.H{self.head}.D{self.index}{place}"

    @classmethod
    def parse(cls, label: str) -> "AttnNeuron":
        """Read back what ``str`` wrote: ``"L9.H3.D17@5"``, or ``"L9.H3.D17"`` for all positions.

        Raises:
            ValueError: If ``label`` has another form.
        """
        match = re.fullmatch(r"L(\d+)\.H(\d+)\.D(\d+)(?:@(\d+))?", label)
        if match is None:
            raise ValueError(
                f"attention neuron label must look like 'L9.H3.D17@5' or 'L9.H3.D17', got {label!r}"
            )
        source_pos = None if match[4] is None else int(match[4])
        return cls(
            layer=int(match[1]), head=int(match[2]), index=int(match[3]), source_pos=source_pos
        )


@dataclass(frozen=True, order=True)
class Head:
    """One attention head: all its attention neurons, over all source positions."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}.H{self.head}"

    @classmethod
    def parse(cls, label: str) -> "Head":
        """Read back what ``str`` wrote, e.g. ``"L9.H3"``.

        Raises:
            ValueError: If ``label`` has another form.
        """
        match = re.fullmatch(r"L(\d+)\.H(\d+)", label)
        if match is None:
            raise ValueError(f"head label must look like 'L9.H3', got {label!r}")
        return cls(layer=int(match[1]), head=int(match[2]))


def parse_neuron(label: str) -> FFNNeuron | AttnNeuron:
    """The neuron a label names, of either kind.

    Raises:
        ValueError: If ``label`` is neither ``"L9.N1234"`` nor ``"L9.H3.D17[@5]"``.
    """
    return AttnNeuron.parse(label) if ".H" in label else FFNNeuron.parse(label)


def parse_part(label: str) -> Head | FFNNeuron | AttnNeuron:
    """The head or neuron a label names.

    Raises:
        ValueError: If ``label`` is none of ``"L9.H3"``, ``"L9.N1234"``, ``"L9.H3.D17[@5]"``.
    """
    for kind in (Head, FFNNeuron, AttnNeuron):
        try:
            return kind.parse(label)
        except ValueError:
            continue
    if re.fullmatch(r"L\d+\.E\d+\.N\d+", label):
        raise ValueError(
            f"{label!r} is the id of an expert's neuron, which is numbered through its layer here: "
            f"give parse_id({label!r}, layout_of(open_host(model))).neuron"
        )
    raise ValueError(
        "a head or neuron label must look like 'L9.H3', 'L9.N1234', 'L9.H3.D17' or 'L9.H3.D17@5', "
        f"got {label!r}"
    )
