"""In the weights: interventions written into rows of ``W_out`` and ``W_O``, and taken back.

An FFN neuron writes its coefficient times its row of ``W_out``, an attention neuron its own times
its row of ``W_O``. So a coefficient times ``a`` plus ``c`` is the same as the row times ``a``, and
``c`` times the row added to the output's bias. What is not of that form, at all positions alike,
cannot be written into weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError, UnsupportedModelError
from tl_neuron_attr.host import Host, open_host, output_bias, output_weights
from tl_neuron_attr.interventions.values import (
    Intervention,
    MeanReplaced,
    Scaled,
    Zeroed,
    as_interventions,
    check_interventions,
    sources_by_layer,
    units_by_layer,
)
from tl_neuron_attr.neurons import Kind
from tl_neuron_attr.pieces import Matrix

_NAMES = {
    ("ffn", "rows"): "W_out",
    ("attn", "rows"): "W_O",
    ("ffn", "bias"): "b_out",
    ("attn", "bias"): "b_O",
}


def edit_weights(model: Any, interventions: Any) -> "Edit":
    """The model's weights changed as if the interventions acted in every call, until it is undone.

    Zeroed neurons have their rows of ``W_out`` or ``W_O`` set to 0; scaled ones theirs multiplied;
    those held at their mean lose their row, and the mean times the row goes into the output's bias.
    As several interventions they act in their order, and the weights are rounded once.

        with edit_weights(model, zero("L3.H2,L9.N12")):
            ...                     # undone at the end, also after an exception
        edit = edit_weights(model, scale("L9.N12", 2.0))
        edit.undo()

    Whatever was computed before reads the weights of now where it reads them later: attribute a
    prompt again after an edit, and after its undo.

    Args:
        model: A model, or its ``Host``.
        interventions: One, or several in the order in which they act.

    Raises:
        InputError: Before anything is written: where ``check_interventions`` does; for a clamp, one
            position, or a source position, which no edit of weights is; for a mean where the output
            has no bias (``HookedTransformer`` shows an absent one as zeros).

    Cost: a copy of each row that changes, as it was and as it is.
    """
    host = model if isinstance(model, Host) else open_host(model)
    several = as_interventions(interventions)
    _refuse_what_no_weights_do(several)
    check_interventions(host, several)
    changes = tuple(change for each in _affine(host, several) for change in _changes(host, each))
    edit = Edit(host, several, changes)
    try:
        for change in changes:
            _write(host, change, change.after)
    except BaseException:
        for change in changes:
            _tensor(host, change)[change.index] = change.before
        raise
    return edit


@dataclass(frozen=True)
class _Change:
    """Some rows of one weight, or one bias: as they were, and as an edit left them."""

    kind: Kind
    layer: int
    what: Literal["rows", "bias"]
    index: tuple[Int[Tensor, " row"], ...]
    before: Float[Tensor, "..."]
    after: Float[Tensor, "..."]

    def __str__(self) -> str:
        return f"{_NAMES[self.kind, self.what]} of layer {self.layer}"


@dataclass(frozen=True, eq=False)
class Edit:
    """An edit of a model's weights that can be undone. Keeps the model alive, and copies of what
    it changed; used with ``with`` it is undone at the end."""

    host: Host
    interventions: tuple[Intervention, ...]
    changes: tuple[_Change, ...]

    __repr__ = brief

    @property
    def undone(self) -> bool:
        """Whether the weights are, bit for bit, what they were before."""
        return all(_same_bits(_now(self.host, change), change.before) for change in self.changes)

    def undo(self) -> None:
        """Give the rows back their bits.

        Raises:
            InputError: If it was undone already, or the rows are no longer as the edit left them:
                they were edited since (undo that first), trained, folded or converted. Nothing is
                written then.
        """
        if not self.changes:
            return
        if self.undone:
            raise InputError("the edit was undone already: the weights are what they were before")
        edited = [not _same_bits(_now(self.host, each), each.before) for each in self.changes]
        for change, is_edited in zip(self.changes, edited, strict=True):
            # what is as before was given back by an undo that was broken off
            if is_edited and not _same_bits(_now(self.host, change), change.after):
                raise InputError(
                    f"{change} is no longer as this edit left it, so it cannot be undone: undo "
                    "later edits first, the last one first; if the weights were trained, folded or "
                    "converted since, load the model again"
                )
        for change in self.changes:
            _write(self.host, change, change.before)

    def __enter__(self) -> "Edit":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.undone:
            self.undo()


# --- what is to be written --------------------------------------------------------------------


def _refuse_what_no_weights_do(interventions: Sequence[Intervention]) -> None:
    for each in interventions:
        sources = sources_by_layer(each.parts)
        if sources:
            reason = "it is of one source position"
        elif each.position is not None:
            reason = f"it is at position {each.position} only"
        elif not isinstance(each, (Zeroed, Scaled, MeanReplaced)):
            reason = "what it does depends on the coefficient"
        else:
            continue
        raise InputError(
            f"{type(each).__name__} cannot be an edit of weights: {reason}; use "
            "intervened(model, ...)"
        )


@dataclass(frozen=True)
class _Affine:
    """Coefficients of one sub-layer become ``factor`` times what they are, plus ``constant``."""

    kind: Kind
    layer: int
    factor: Float[Tensor, "*unit"]
    constant: Float[Tensor, "*unit"]


def _affine(host: Host, interventions: Sequence[Intervention]) -> list[_Affine]:
    """What several interventions, one after the other, make of each coefficient."""
    found: dict[tuple[Kind, int], _Affine] = {}
    for each in interventions:
        for (kind, layer), mask in units_by_layer(host, each.parts).items():
            ones = torch.ones(mask.shape, dtype=torch.float64)
            so_far = found.get((kind, layer), _Affine(kind, layer, ones, 0 * ones))
            by = torch.full_like(ones, each.factor if isinstance(each, Scaled) else 0.0)
            plus = torch.zeros_like(ones)
            if isinstance(each, MeanReplaced):
                plus = each.means.of(kind, layer).to(ones)
            found[kind, layer] = _Affine(
                kind,
                layer,
                torch.where(mask, so_far.factor * by, so_far.factor),
                torch.where(mask, so_far.constant * by + plus, so_far.constant),
            )
    return [found[key] for key in sorted(found)]


def _changes(host: Host, affine: _Affine) -> list[_Change]:
    """What of it changes a bit."""
    weights = output_weights(host, affine.kind, affine.layer)
    factor, constant = (t.to(weights.device) for t in (affine.factor, affine.constant))
    index = (factor != 1).nonzero(as_tuple=True)
    before = weights[index]
    wide = torch.promote_types(before.dtype, torch.float32)
    after = (before.to(wide) * factor[index][:, None].to(wide)).to(before.dtype)
    after[factor[index] == 0] = 0.0  # not -0.0, nor 0 times what is not finite
    changes = [_Change(affine.kind, affine.layer, "rows", index, before, after)]
    index = (constant != 0).nonzero(as_tuple=True)
    if len(index[0]):
        bias = output_bias(host, affine.kind, affine.layer)
        if bias is None:
            where = "FFN" if affine.kind == "ffn" else "attention"
            raise InputError(
                f"the {where} of layer {affine.layer} has no output bias that could hold what "
                "neurons write at their mean, so it cannot be an edit of weights; use "
                "intervened(model, ...)"
            )
        every = (torch.arange(len(bias), device=bias.device),)
        written = (constant[index][:, None] * weights[index].double()).sum(0)
        after = (bias.double() + written).to(bias.dtype)
        changes.append(_Change(affine.kind, affine.layer, "bias", every, bias.clone(), after))
    return [narrow for change in changes for narrow in _narrowed(change)]


def _narrowed(change: _Change) -> list[_Change]:
    """Without the rows that stay as they are, which a later edit may change without asking."""
    differ = (_bits(change.before) != _bits(change.after)).flatten(1).any(1)
    if not differ.any():
        return []
    index = tuple(axis[differ] for axis in change.index)
    before, after = change.before[differ], change.after[differ]
    return [_Change(change.kind, change.layer, change.what, index, before, after)]


# --- bits -------------------------------------------------------------------------------------


def _tensor(host: Host, change: _Change) -> Matrix:
    if change.what == "rows":
        return output_weights(host, change.kind, change.layer)
    tensor = (host.b_out if change.kind == "ffn" else host.b_O)(change.layer)
    if tensor is None:
        raise InputError(f"{change} is gone: the model was changed since the edit")
    return tensor


def _now(host: Host, change: _Change) -> Tensor:
    return _tensor(host, change)[change.index]


def _write(host: Host, change: _Change, values: Tensor) -> None:
    _tensor(host, change)[change.index] = values
    if not _same_bits(_now(host, change), values):
        raise UnsupportedModelError(f"{host.architecture}: {change} cannot be written to")


def _bits(values: Tensor) -> Tensor:
    """Each number's bytes: -0.0 is not 0.0, and NaN is itself."""
    return values.contiguous().unsqueeze(-1).view(torch.uint8)


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return (
        ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and torch.equal(_bits(ours), _bits(theirs.to(ours.device)))
    )
