"""A matrix whose rows lie in several places of memory, read as one without a copy."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pieces:
    """Matrices one below the other: those of the first stack, then those of the next.

    Rows are numbered through. Stacks are views of a model's weights, so that what is written to
    rows is written to the model. All are of one dtype and on one device.
    """

    stacks: tuple[Float[Tensor, "_matrix _row _column"], ...]
    of_use: frozenset[int] | None = None
    """Which of the matrices, counted through, products look at; ``None``: all of them."""

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"Pieces({rows} x {columns}, in {sum(map(len, self.stacks))} matrices)"

    def __len__(self) -> int:
        return sum(stack.shape[0] * stack.shape[1] for stack in self.stacks)

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""
        return torch.Size((len(self), self.stacks[0].shape[2]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.stacks[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.stacks[0].device

    def data_ptr(self) -> int:
        """Where the first row lies: with the shape it tells matrices of a model apart."""
        return self.stacks[0].data_ptr()

    def using(self, matrices: Collection[int]) -> "Pieces":
        """The same matrix, in products of which all matrices but these count as zeros."""
        return replace(self, of_use=frozenset(matrices))

    def matrices(self) -> Iterator[tuple[int, Float[Tensor, "_row _column"]]]:
        """Each matrix that is of use, and the number of its first row."""
        first = number = 0
        for stack in self.stacks:
            for matrix in stack:
                if self.of_use is None or number in self.of_use:
                    yield first, matrix
                first, number = first + len(matrix), number + 1

    def split(self, size: int) -> Iterator[Float[Tensor, "_row _column"]]:
        """All rows, at most ``size`` at a time."""
        for _, matrix in replace(self, of_use=None).matrices():
            yield from matrix.split(size)

    def __getitem__(self, where: tuple[Int[Tensor, " some"], ...]) -> Float[Tensor, "some _column"]:
        """The rows of these numbers: a copy."""
        (rows,) = where  # one axis, as a tensor is indexed by a tuple
        found = self.stacks[0].new_empty(len(rows), self.shape[1])
        for here, stack, place in self._places(rows):
            found[here] = stack[place]
        return found

    def __setitem__(
        self, where: tuple[Int[Tensor, " some"], ...], values: Float[Tensor, "some _column"]
    ) -> None:
        """Write these rows to where they lie."""
        (rows,) = where
        for here, stack, place in self._places(rows):
            stack[place] = values[here]

    def _places(
        self, rows: Int[Tensor, " some"]
    ) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]:
        """Of each stack: which of ``rows`` are in it, the stack, and the matrix and row there."""
        first = 0
        for stack in self.stacks:
            n_matrices, per_matrix, _ = stack.shape
            last = first + n_matrices * per_matrix
            here = ((rows >= first) & (rows < last)).nonzero()[:, 0]
            inside = rows[here] - first
            yield here, stack, (inside // per_matrix, inside % per_matrix)
            first = last


Matrix = Tensor | Pieces
"""A matrix, in one piece or in several."""


def blocks_of(
    rows: Float[Matrix, "row column"], size: int
) -> Iterator[tuple[slice, Float[Tensor, "_row column"]]]:
    """The rows that are of use, at most ``size`` at a time, and which of all rows they are."""
    matrices = rows.matrices() if isinstance(rows, Pieces) else [(0, rows)]
    for first, matrix in matrices:
        for block in matrix.split(size):
            yield slice(first, first + len(block)), block
            first += len(block)


def times(
    vectors: Float[Tensor, "*batch row"], weights: Float[Matrix, "*_ row column"]
) -> Float[Tensor, "*batch column"]:
    """``vectors @ weights`` in the dtype of the vectors, computed where the weights are.

    A layer's weights may be on another device than what was captured; they never move.
    """
    there = vectors.to(weights.device)
    if isinstance(weights, Tensor):
        return (there @ weights.to(there.dtype)).to(vectors.device)
    total = there.new_zeros(*there.shape[:-1], weights.shape[1])
    for here, block in blocks_of(weights, len(weights)):
        some = there[..., here]
        if some.requires_grad or some.any():  # what is off is not read
            total = total + some @ block.to(there.dtype)
    return total.to(vectors.device)
