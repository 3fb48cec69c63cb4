"""In force for a while: interventions as hooks, for one call or for every call in a block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_neuron_attr.errors import InputError, UnsupportedModelError
from tl_neuron_attr.forward import Hook, coefficient_hooks
from tl_neuron_attr.hook_points import (
    attn_outputs_edited,
    hook_names,
    hooks_in_force,
    pattern_is_late,
)
from tl_neuron_attr.host import Host, open_host, sliding_window
from tl_neuron_attr.interventions.values import (
    Clamped,
    Intervention,
    MeanReplaced,
    Scaled,
    Zeroed,
    as_interventions,
    check_interventions,
    sources_by_layer,
    units_by_layer,
)

Change = Callable[[Float[Tensor, "*batch"]], Float[Tensor, "*batch"]]
"""Coefficients -> what becomes of them."""


def intervention_hooks(model: Any, interventions: Any, *, n_pos: int | None = None) -> list[Hook]:
    """Hooks for one call: ``model.run_with_hooks(tokens, fwd_hooks=intervention_hooks(...))``.

    Making them changes nothing. They may be used again, alone or beside hooks of your own, which
    see activations as edited if they come after them.

    Args:
        model: A model, or its ``Host``.
        interventions: One, or several in the order in which they act.
        n_pos: How many positions the call has, where you know it: a position out of range is then
            found now, not in the call.

    Positions count from the first one of a cache of keys and values, if the call continues one;
    what was run before is not changed any more.

    Raises:
        InputError: Where ``check_interventions`` does; for an attention neuron of one source
            position on the bridges of GPT-J, GPT-Neo and OPT, which show the pattern only after it
            was used: ``intervened`` can do it there. In the call for a position it has not.

    Cost: in a call, one comparison of each activation of a layer concerned.
    """
    host = model if isinstance(model, Host) else open_host(model)
    several = as_interventions(interventions)
    check_interventions(host, several, n_pos)
    layers = _layers(host, several)
    if pattern_is_late(host) and any(layer.sources for layer in layers):
        raise InputError(
            f"{host.architecture} on a {host.class_name} shows its attention pattern only after it "
            "was used, so hooks cannot tell what one source position carried; use "
            "intervened(model, ...)"
        )
    return [hook for layer in layers for hook in layer.hooks()]


@contextmanager
def intervened(model: Any, interventions: Any) -> Iterator[None]:
    """A block in which every call of the model is intervened on: forward, ``generate``, any other.

    Takes its own hooks away at the end, also after an exception, and leaves those of others, which
    may be on the model before, or come and go inside (``reset_hooks`` leaves it in force). Blocks
    may be nested; the outer one acts first.

    Args:
        model: A model, or its ``Host``.
        interventions: One, or several in the order in which they act.

    Positions count from the first one of a cache of keys and values, so that in ``generate``
    ``position=3`` is the prompt's fourth token, once, and ``position=-1`` the last one of each
    step. The bridges of GPT-J, GPT-Neo and OPT tell positions too late to change ``z`` there; what
    attention writes is changed instead, so that ``hook_z`` and ``hook_attn_out`` do not show it.

    Raises:
        InputError: Where ``check_interventions`` does; in a call for a position it has not, or a
            source position that only its cache of keys and values has.

    Cost: in each call, one comparison of each activation of a layer concerned.
    """
    host = model if isinstance(model, Host) else open_host(model)
    several = as_interventions(interventions)
    check_interventions(host, several)
    layers = _layers(host, several, later=True)
    hooks = [hook for layer in layers for hook in layer.hooks()]
    at_output = {layer.layer: layer.edit_output for layer in layers if layer.needs_pattern}
    with hooks_in_force(host, hooks), attn_outputs_edited(host, at_output):
        yield


# --- what becomes of a coefficient ------------------------------------------------------------


def _change(intervention: Intervention, mean: Float[Tensor, "*unit"] | None) -> Change:
    """What an intervention does to coefficients whose last axes are a layer's units."""
    match intervention:
        case Zeroed():
            return torch.zeros_like
        case Scaled(factor=factor):
            return lambda coefficients: coefficients * factor
        case Clamped(low=low, high=high):
            return lambda coefficients: coefficients.clamp(low, high)
        case MeanReplaced():
            assert mean is not None
            return lambda coefficients: mean.to(coefficients).expand_as(coefficients)
    raise InputError(f"{intervention!r} is of no known kind of intervention")


@dataclass(frozen=True)
class _OfUnits:
    """One intervention on some of a layer's units: its FFN neurons, or its ``z``."""

    change: Change
    mask: Bool[Tensor, "*unit"]
    position: int | None


@dataclass(frozen=True)
class _OfSources:
    """One intervention on what a layer's heads carry from some positions to one read position."""

    change: Change
    where: Int[Tensor, "part 3"]
    """Head, source position and dimension of each."""
    position: int


def _layers(
    host: Host, interventions: Sequence[Intervention], *, later: bool = False
) -> list["_Layer"]:
    """The layers that something is done to; whether what they write may be edited ``later``."""
    found: dict[int, _Layer] = {}

    def of(layer: int) -> _Layer:
        if layer not in found:
            found[layer] = _Layer(host, layer, later)
        return found[layer]

    for each in interventions:
        for (kind, layer), mask in units_by_layer(host, each.parts).items():
            mean = each.means.of(kind, layer) if isinstance(each, MeanReplaced) else None
            step = _OfUnits(_change(each, mean), mask, each.position)
            (of(layer).ffn if kind == "ffn" else of(layer).attn).append(step)
        for layer, where in sources_by_layer(each.parts).items():
            assert each.position is not None
            of(layer).sources.append(_OfSources(_change(each, None), where, each.position))
    return [found[layer] for layer in sorted(found)]


# --- one layer in a forward pass --------------------------------------------------------------


class _Layer:
    """What is done to one layer, and what its hooks have seen so far in the pass under way.

    Hooks fire in this order: values, [pattern,] z, [pattern, attention's output,] FFN neurons.
    """

    def __init__(self, host: Host, layer: int, later: bool) -> None:
        self.host = host
        self.layer = layer
        self.later = later
        self.ffn: list[_OfUnits] = []
        self.attn: list[_OfUnits] = []
        self.sources: list[_OfSources] = []
        self._forget()

    def _forget(self) -> None:
        self.before: int | None = None
        """How many positions the cache of keys and values holds; known from the pattern."""
        self.v: Tensor | None = None
        self.pattern: Tensor | None = None
        self.z: Tensor | None = None
        """Kept for ``edit_output``, where ``z`` went by before the pattern was seen."""
        self.took_as_first = False
        """Positions of ``z`` were edited as if nothing came before."""

    @property
    def needs_pattern(self) -> bool:
        """Whether ``z`` can be edited only once it is known where each position is."""
        return bool(self.sources) or _by_position(self.attn)

    def hooks(self) -> list[Hook]:
        """In the order in which they fire."""
        names = hook_names(self.host, self.layer)
        hooks: list[Hook] = []
        if self.needs_pattern or _by_position(self.ffn):
            hooks += [(names["v"], self.begin), (names["pattern"], self.keep_pattern)]
        if self.attn or self.sources:
            hooks.append((names["z"], self.edit_z))
        if self.ffn:
            hooks += coefficient_hooks(self.host, self.layer, "ffn", self.edit_ffn)
        return hooks

    def begin(self, activation: Tensor, hook: Any) -> None:
        self._forget()  # the pass before may have been broken off
        if self.sources:
            self.v = activation

    def keep_pattern(self, activation: Tensor, hook: Any) -> None:
        self.before = activation.shape[-1] - activation.shape[-2]
        window = sliding_window(self.host, self.layer)
        if window is not None and self.before and activation.shape[-1] >= window:
            raise InputError(
                f"{self.host.architecture} forgets positions: its cache of keys and values holds "
                f"the last {window} at most in layer {self.layer}, so it cannot be told at which "
                "one a call goes on; run without the cache (use_past_kv_cache=False), or intervene "
                "at all positions"
            )
        if self.took_as_first and self.before:
            raise InputError(
                f"{self.host.architecture} on a {self.host.class_name} does not tell in time at "
                "which position a call goes on that continues a cache of keys and values; run "
                "without the cache (use_past_kv_cache=False), or intervene at all positions"
            )
        if self.sources:
            self.pattern = activation

    def edit_z(self, activation: Tensor, hook: Any) -> Tensor | None:
        if self.before is None and self.needs_pattern:
            if self.later:
                self.z = activation
                return None
            self.took_as_first = True
        return self._edited_z(activation)

    def edit_output(self, output: Float[Tensor, "row pos d_model"]) -> Tensor:
        """The attention's output as it is with ``z`` edited, where that came before the pattern."""
        if self.z is None:
            return output
        z, self.z = self.z, None
        difference = (self._edited_z(z) - z).to(output.dtype)
        W_O = self.host.W_O(self.layer).to(output)
        return output + difference.flatten(2) @ W_O.flatten(0, 1)

    def _edited_z(self, z: Float[Tensor, "row pos head d_head"]) -> Tensor:
        edited = self._without_carried(z) if self.sources else z
        return _edited(edited, self.attn, self.before or 0)

    def edit_ffn(self, activation: Tensor, hook: Any) -> Tensor:
        if self.z is not None:
            raise _unseen(self.host)
        if self.before is None and _by_position(self.ffn):
            raise _unseen(self.host)
        return _edited(activation, self.ffn, self.before or 0)

    def _without_carried(self, z: Float[Tensor, "row pos head d_head"]) -> Tensor:
        """``z`` with what came from some source positions changed."""
        if self.v is None or self.pattern is None or self.before is None:
            raise _unseen(self.host)
        n_pos, before = z.shape[1], self.before
        # HookedTransformer has it where the first layer is
        attention = self.pattern.to(z)
        by_read: dict[int, list[_OfSources]] = {}
        for step in self.sources:
            local = _local(step.position, before, n_pos)
            if local is not None:
                by_read.setdefault(local, []).append(step)
        if by_read and before:
            raise InputError(
                "the call continues a cache of keys and values, so what a source position carries "
                "cannot be told; run without the cache (use_past_kv_cache=False)"
            )
        group = z.shape[2] // self.v.shape[2]
        edited = z.clone()
        for read, steps in by_read.items():
            each, numbers = torch.unique(
                torch.cat([step.where for step in steps]).to(z.device), dim=0, return_inverse=True
            )
            head, source, index = each.unbind(1)
            if int(source.max()) > read:
                raise InputError(
                    f"source position {int(source.max())} comes after the read position {read}"
                )
            carried = attention[:, head, read, source] * self.v[:, source, head // group, index]
            changed = carried.clone()
            for step, which in zip(
                steps, numbers.split([len(step.where) for step in steps]), strict=True
            ):
                changed[:, which] = step.change(changed[:, which])
            flat = edited[:, read].flatten(1)
            added = flat.index_add(1, head * z.shape[3] + index, changed - carried)
            edited[:, read] = added.reshape(edited[:, read].shape)
        self.v = self.pattern = None
        return edited


def _by_position(steps: Sequence[_OfUnits]) -> bool:
    return any(step.position is not None for step in steps)


def _edited(
    activation: Float[Tensor, "row pos *unit"], steps: Sequence[_OfUnits], before: int
) -> Tensor:
    for step in steps:
        mask = step.mask.to(activation.device)
        if step.position is None:
            activation = torch.where(mask, step.change(activation), activation)
            continue
        local = _local(step.position, before, activation.shape[1])
        if local is None:
            continue
        at = activation[:, local]
        activation = activation.clone()  # a cache, or the caller, may hold the other
        activation[:, local] = torch.where(mask, step.change(at), at)
    return activation


def _local(position: int, before: int, n_pos: int) -> int | None:
    """Where a position is in this call; ``None`` where it was in one before."""
    total = before + n_pos
    absolute = position if position >= 0 else total + position
    if not 0 <= absolute < total:
        raise InputError(
            f"position {position} is out of range: the call ends after {total} positions"
        )
    return absolute - before if absolute >= before else None


def _unseen(host: Host) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{host.architecture} does not show its attention pattern in time, which tells positions; "
        "intervene at all positions, without source positions"
        if not pattern_is_late(host)
        else f"{host.architecture} on a {host.class_name} needs intervened(model, ...) for this"
    )
