"""Is it so: what this package believes about a model, held against the model's own activations.

Scores mean something only if neurons really add up to what their block wrote, and the read-out
really is the model's. Each of these identities is computed on a capture; where one fails, the
architecture is not what ``architecture.py`` takes it for, and every score would be silently wrong.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.capture import capture_pre_activations
from tl_neuron_attr.captured import Capture
from tl_neuron_attr.decompose import attn_decomposition, ffn_decomposition
from tl_neuron_attr.errors import IdentityError
from tl_neuron_attr.hook_points import has_hooks
from tl_neuron_attr.host import Host, Norm, weights_state
from tl_neuron_attr.pieces import Matrix, blocks_of
from tl_neuron_attr.readout import read_out
from tl_neuron_attr.state import computed_by

# Largest error allowed, relative to the largest part, by the dtype the model computes in. Dense
# models in float32 stay below 2e-6; what these catch (a transposed weight, a missing scale, a
# soft cap) is off by 0.04 and more. In half precision the largest seen is about half of what is
# allowed. Not tighter in float64: Hugging Face's RMSNorm computes in float32 even there.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Identity:
    """One identity and how well a model meets it."""

    name: str
    equation: str
    error: float
    """Largest absolute difference of the two sides, divided by the largest part of either."""
    layer: int | None
    """Where the error is largest; ``None`` if the identity has no layer."""
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance of the model's dtype."""
        return self.error <= self.tolerance  # False for NaN


def identities(host: Host, captured: Capture) -> tuple[Identity, ...]:
    """Every identity this package relies on, measured on one capture.

    Cost: about one pass over ``W_out``, ``W_O`` and the unembedding.
    """
    with torch.no_grad():
        return (
            _residual_stream(host, captured),
            *_attention(host, captured),
            _ffn(host, captured),
            _read_out(host, captured),
        )


# Models already verified, with the state they were verified in. Weak: it keeps no model alive, and
# one that is changed in place (edited, folded, set otherwise) is verified again.
_verified: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()


def verify(host: Host, captured: Capture, *, own_run: bool = False) -> None:
    """Check every identity; for a run of our own once per model and state of it.

    ``own_run`` says that ``captured`` was just run on ``host`` without hooks of the caller's; a
    capture or cache that came from elsewhere may be of other weights, and hooks may edit.

    Raises:
        IdentityError: If one fails, naming it, its layer and by how much.
    """
    state = _state(host)
    if own_run and _verified.get(host.model) == state:
        return
    _check(host, identities(host, captured))
    if own_run:
        _verified[host.model] = state


def subkey_identities(host: Host, captured: Capture) -> tuple[Identity, ...]:
    """What query scores rely on besides: neurons' pre-activations, recomputed from the stream.

    Of every neuron, at the read position: the norm in front of its sub-layer, its subkey, its
    bias. Cost: one forward pass, for the FFN's own pre-activations, and one over the weights.
    """
    with torch.no_grad():
        theirs = capture_pre_activations(host, captured)
        mid = captured.resid_pre if captured.resid_mid is None else captured.resid_mid
        ours: dict[str, list[Tensor]] = {name: [] for name in theirs}
        v = []
        for layer in range(host.n_layers):
            read = _normalized(host, host.ffn_norm(layer), mid[layer])
            for name, (subkeys, bias) in host.ffn_inputs(layer).items():
                ours[name].append(_plus(_products(subkeys, read), bias))
            read = _normalized(host, host.attn_norm(layer), captured.resid_pre[layer])
            v.append(_plus(_times(read, host.W_V(layer)), host.b_V(layer)))
        equation = "norm(resid) . subkey + bias = pre-activation"
        pairs = {f"the {name} of FFN neurons": (ours[name], theirs[name]) for name in theirs}
        pairs["the value vectors"] = (v, captured.v[:, -1])
        return tuple(
            _identity(host, name, equation, torch.stack(layers), hooked)
            for name, (layers, hooked) in pairs.items()
        )


# The same for subkeys, which only query scores need.
_verified_subkeys: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()


def verify_subkeys(host: Host, captured: Capture) -> None:
    """Check that pre-activations are what this package recomputes, once per state of the model.

    With hooks of the caller's on the model every time, for they may edit.

    Raises:
        IdentityError: If one is not, naming it, its layer and by how much.
    """
    state = _state(host)
    if not has_hooks(host.model) and _verified_subkeys.get(host.model) == state:
        return
    _check(host, subkey_identities(host, captured))
    if not has_hooks(host.model):
        _verified_subkeys[host.model] = state


def _state(host: Host) -> int:
    return hash((weights_state(host), computed_by(host.model)))


def _check(host: Host, found: tuple[Identity, ...]) -> None:
    for identity in found:
        if not identity.holds:
            where = "" if identity.layer is None else f" at layer {identity.layer}"
            raise IdentityError(
                f"{host.architecture}: {identity.name} fails{where}: {identity.equation} is off by "
                f"{identity.error:.2g} of its largest part (allowed: {identity.tolerance:.0e}). "
                "The model computes something this package does not know, or a hook edits an "
                "activation between the two sides, or the activations are of other weights; "
                "neuron scores would be wrong"
            )


def _normalized(host: Host, norm: Norm, resid: Float[Tensor, " d_model"]) -> Tensor:
    """What a sub-layer reads: the residual stream through its norm."""
    if norm.kind == "none":
        return resid
    resid = resid - resid.mean() if norm.kind == "layer_norm" else resid
    scaled = resid / (resid.square().mean() + host.eps).sqrt()
    return _plus(scaled if norm.gain is None else scaled * norm.gain.to(resid), norm.bias)


def _products(rows: Float[Matrix, "neuron d_model"], vector: Float[Tensor, " d_model"]) -> Tensor:
    # in the dtype of the rows, as below
    products = [block @ vector.to(block) for _, block in blocks_of(rows, len(rows))]
    return torch.cat([each.to(vector) for each in products])


def _times(vector: Float[Tensor, " d_model"], weight: Float[Tensor, "*_ d_model neuron"]) -> Tensor:
    # in the dtype of the weight, which may be narrow: widening it all would double its memory
    return (vector.to(weight) @ weight).to(vector)


def _residual_stream(host: Host, captured: Capture) -> Identity:
    after = torch.cat([captured.resid_pre[1:], captured.resid_final[None]])
    if captured.resid_mid is None:
        return _identity(
            host,
            "the residual stream",
            "resid_pre + attn_out + mlp_out = resid_post",
            captured.resid_pre + captured.attn_out + captured.mlp_out,
            after,
        )
    return _identity(
        host,
        "the residual stream",
        "resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post",
        torch.cat(
            [captured.resid_pre + captured.attn_out, captured.resid_mid + captured.mlp_out], -1
        ),
        torch.cat([captured.resid_mid, after], -1),
    )


def _attention(host: Host, captured: Capture) -> tuple[Identity, Identity]:
    parts = [attn_decomposition(host, captured, layer) for layer in range(host.n_layers)]
    z = torch.stack([part.coefficients().sum(1) for part in parts])
    sums = torch.stack([_plus(part.sum(), part.b_O) for part in parts])
    return (
        _identity(host, "the attention pattern", "pattern @ v = z", z, captured.z),
        _identity(
            host,
            "the attention neurons",
            "z @ W_O + b_O = attn_out" + _behind(host, captured.attn_post_scale),
            sums,
            captured.attn_out,
        ),
    )


def _ffn(host: Host, captured: Capture) -> Identity:
    parts = [ffn_decomposition(host, captured, layer) for layer in range(host.n_layers)]
    sums = torch.stack([_plus(part.sum(), part.b_out) for part in parts])
    return _identity(
        host,
        "the FFN neurons",
        "mlp_post @ W_out + b_out = mlp_out" + _behind(host, captured.ffn_post_scale),
        sums,
        captured.mlp_out,
    )


def _behind(host: Host, post_scale: Tensor | None) -> str:
    """What the left side goes through before it is in the residual stream."""
    if post_scale is not None:
        return ", the left behind the sub-layer's own norm"
    return "" if host.residual_scale == 1 else f", the left times {host.residual_scale:g}"


def _read_out(host: Host, captured: Capture) -> Identity:
    logits = read_out(host, captured.resid_final, "exact").logits(captured.resid_final)
    # a constant shift of all logits (a centred unembedding) changes no probability
    ours, theirs = logits.log_softmax(-1), captured.logits.log_softmax(-1)
    size = float(theirs.abs().max().clamp(min=1.0))
    # large logits (a shift common to all, say) are further apart than that in half precision
    apart = torch.finfo(host.dtype).eps * float(captured.logits.abs().max())
    return Identity(
        "the read-out",
        "log_softmax(ln_final(resid_post) @ W_U + b_U) = log_softmax(logits)",
        float((ours - theirs).abs().max()) / size,
        None,
        max(_TOLERANCE[host.dtype], apart / size),
    )


def _identity(
    host: Host, name: str, equation: str, ours: Float[Tensor, "layer ..."], theirs: Tensor
) -> Identity:
    errors = (ours - theirs).abs().flatten(1).amax(1)
    sizes = torch.maximum(ours.abs().flatten(1).amax(1), theirs.abs().flatten(1).amax(1))
    relative = errors / sizes.clamp(min=torch.finfo(ours.dtype).tiny)
    layer = int(relative.argmax())
    return Identity(name, equation, float(relative[layer]), layer, _TOLERANCE[host.dtype])


def _plus(vector: Tensor, bias: Tensor | None) -> Tensor:
    return vector if bias is None else vector + bias.to(vector)
