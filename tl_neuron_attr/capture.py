"""What happened: one forward pass of one prompt, kept as tensors and plain facts."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.errors import InputError, NonFiniteError
from tl_neuron_attr.files import check_writable, write_files
from tl_neuron_attr.host import Host, cache_is_of, final_resid_name, hook_names
from tl_neuron_attr.prompts import Target, TokenizedPrompt

CAPTURE_FORMAT = 1
"""Version of the two files ``save_capture`` writes."""


@dataclass(frozen=True, kw_only=True)
class Capture:
    """One prompt's forward pass, read at one position (``prompt.read_pos``).

    Holds tensors and plain facts, no model, so it can be saved, moved and compared. ``pos`` counts
    the source positions up to and including the read position. Activations are float32 (float64
    if the model computes in it), whatever the dtype of the weights.
    """

    prompt: TokenizedPrompt
    model_name: str
    resid_pre: Float[Tensor, "layer d_model"]
    """Residual stream entering each block."""
    resid_mid: Float[Tensor, "layer d_model"] | None
    """Residual stream between attention and FFN; ``None`` in parallel blocks, which have none."""
    resid_final: Float[Tensor, " d_model"]
    """Residual stream after the last block."""
    attn_out: Float[Tensor, "layer d_model"]
    mlp_out: Float[Tensor, "layer d_model"]
    mlp_post: Float[Tensor, "layer d_mlp"]
    """Coefficients of the FFN neurons: ``act(pre)``, in a gated FFN ``act(gate) * up``."""
    pattern: Float[Tensor, "layer head pos"]
    """Attention paid by the read position to each source position."""
    v: Float[Tensor, "layer pos key_value_head d_head"]
    """Value vectors, value bias included; query heads share them in groups."""
    z: Float[Tensor, "layer head d_head"]
    """What each head gathered at the read position: the sum of ``pattern * v`` over sources."""
    logits: Float[Tensor, " d_vocab"]
    """The model's own logits at the read position."""

    def to(self, dtype: torch.dtype) -> "Capture":
        """The same capture with its activations in ``dtype`` (e.g. to score in float64)."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return replace(self, **{name: t.to(dtype) for name, t in tensors.items() if t is not None})

    def top_predictions(self, k: int = 5) -> list[tuple[int, float]]:
        """The model's ``k`` likeliest next tokens as (id, log-probability in nats)."""
        log_probs, ids = self.logits.log_softmax(-1).topk(min(k, self.logits.shape[0]))
        return list(zip(ids.tolist(), log_probs.tolist(), strict=True))


_LAYERED = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "mlp_post", "pattern", "v", "z")
_TENSORS = (*_LAYERED, "resid_final", "logits")


def capture(host: Host, prompt: TokenizedPrompt, cache: Any = None) -> Capture:
    """The forward pass of ``prompt``, run now, or read from ``cache``.

    A run leaves the model as it was: the hooks only copy what one position needs, are removed at
    the end, and the caller's own hooks stay in force. ``cache`` is what ``run_with_cache``
    returned for exactly these tokens (an ``ActivationCache``, with or without batch axis).

    Raises:
        InputError: If ``cache`` lacks an activation, or is of other tokens.
        NonFiniteError: If an activation is NaN or infinite, naming the first layer it occurs in.

    Cost: one forward pass; beyond it, memory for the fields of ``Capture``.
    """
    seen = _run(host, prompt) if cache is None else _read_cache(host, prompt, cache)
    tensors: dict[str, Any] = {
        name: torch.stack([seen[f"{name}.{layer}"] for layer in range(host.n_layers)])
        for name in _LAYERED
        if f"{name}.0" in seen
    }
    tensors["resid_final"] = seen["resid_final"]
    tensors["logits"] = seen["logits"]
    check_fits(host, tensors["mlp_post"], tensors["v"], tensors["resid_pre"])
    _refuse_non_finite(tensors)
    return Capture(
        prompt=prompt,
        model_name=host.model_name,
        **{"resid_mid": None, **tensors},
    )


def check_fits(host: Host, mlp_post: Tensor, v: Tensor, resid_pre: Tensor) -> None:
    """Stop where activations cannot be this model's, before they meet its weights.

    Raises:
        InputError: If they are of another number of layers or of other sizes.
    """
    found = (resid_pre.shape[0], resid_pre.shape[1], mlp_post.shape[1], v.shape[3])
    wanted = (host.n_layers, host.d_model, host.d_mlp, host.d_head)
    if found != wanted:
        raise InputError(
            f"the activations are of another model: (layers, d_model, d_mlp, d_head) is {found}, "
            f"this model's is {wanted}"
        )


def _run(host: Host, prompt: TokenizedPrompt) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(
        activation: Tensor, hook: Any, *, key: str, select: Callable[[Tensor], Tensor]
    ) -> None:
        seen[key] = _scoring_copy(select(activation))

    hooks = [
        (name, partial(keep, key=key, select=partial(_select, key, prompt.read_pos)))
        for key, name in _wanted(host).items()
    ]
    tokens = torch.tensor([prompt.tokens], device=host.device)
    with torch.no_grad():
        logits = host.model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
        seen["logits"] = _scoring_copy(logits[0, prompt.read_pos])
    return seen


def _read_cache(host: Host, prompt: TokenizedPrompt, cache: Any) -> dict[str, Tensor]:
    if not hasattr(cache, "keys"):
        raise InputError(
            f"cache must be an ActivationCache, the second thing run_with_cache returns; "
            f"got a {type(cache).__name__}"
        )
    wanted = {**_wanted(host), "logits": "unembed.hook_out"}
    available = set(cache.keys())
    if "unembed.hook_out" not in available:
        del wanted["logits"]
    missing = [name for name in wanted.values() if name not in available]
    if missing:
        raise InputError(
            f"the cache lacks {len(missing)} activations, e.g. {missing[0]!r}; run_with_cache "
            "without names_filter keeps them all"
        )
    seen: dict[str, Tensor] = {}
    for key, name in wanted.items():
        activation = cache[name]
        # a cache whose batch axis was removed is one axis short
        full_rank = 4 if key.split(".")[0] in ("pattern", "v", "z") else 3
        if activation.ndim == full_rank - 1:
            activation = activation[None]
        if activation.shape[0] != 1:
            raise InputError(
                f"the cache holds a batch of {activation.shape[0]} prompts; give one prompt's"
            )
        axis = 2 if key.startswith("pattern") else 1
        if activation.shape[axis] != len(prompt.tokens):
            raise InputError(
                f"the cache is of {activation.shape[axis]} tokens, the prompt of "
                f"{len(prompt.tokens)}; pass the tokens that were run"
            )
        seen[key] = _scoring_copy(_select(key, prompt.read_pos, activation))
    if not cache_is_of(host, cache, prompt.tokens):
        raise InputError("the cache is of other tokens than the prompt; pass those that were run")
    if "logits" not in seen:
        seen["logits"] = _logits(host, seen["resid_final"])
    return seen


def _logits(host: Host, resid_final: Float[Tensor, " d_model"]) -> Float[Tensor, " d_vocab"]:
    """The model's logits from its last residual (HookedTransformer caches no logits)."""
    with torch.no_grad():
        resid = resid_final.to(host.dtype)[None, None]
        return _scoring_copy(host.model.unembed(host.model.ln_final(resid))[0, 0])


def _wanted(host: Host) -> dict[str, str]:
    """Key of each activation to keep -> the hook it comes from."""
    wanted = {
        f"{key}.{layer}": name
        for layer in range(host.n_layers)
        for key, name in hook_names(host, layer).items()
    }
    wanted["resid_final"] = final_resid_name(host)
    return wanted


def _select(key: str, read_pos: int, activation: Tensor) -> Tensor:
    kind = key.split(".")[0]
    if kind == "pattern":
        return activation[0, :, read_pos, : read_pos + 1]
    if kind == "v":
        return activation[0, : read_pos + 1]
    return activation[0, read_pos]


def _scoring_copy(activation: Tensor) -> Tensor:
    """A copy (the original may be overwritten) in at least float32."""
    dtype = torch.promote_types(activation.dtype, torch.float32)
    return activation.detach().to(dtype, copy=True)


def _refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name in _TENSORS if name in tensors and not tensors[name].isfinite().all()]
    if not bad:
        return
    first_layers = {
        name: int((~tensors[name].isfinite()).flatten(1).any(dim=1).nonzero()[0])
        for name in bad
        if name in _LAYERED
    }
    if first_layers:
        name = min(first_layers, key=lambda name: (first_layers[name], _LAYERED.index(name)))
        where = f"{name} of layer {first_layers[name]}"
    else:
        where = f"{bad[0]}, after the last layer ({tensors['resid_pre'].shape[0] - 1}),"
    raise NonFiniteError(
        f"the model's activations are not finite: {where} holds NaN or infinity; "
        "check the weights, or run in float32"
    )


# --- to disk and back -------------------------------------------------------------------------


def save_capture(captured: Capture, directory: str | Path) -> None:
    """Write ``capture.safetensors`` and ``capture.json`` into ``directory``.

    Raises:
        InputError: If the directory cannot be written to.
        OutputError: If writing fails on the way; nothing has changed then.
    """
    tensors = {
        name: getattr(captured, name).contiguous()
        for name in _TENSORS
        if getattr(captured, name) is not None
    }
    data = safetensors.torch.save(tensors)
    facts = {
        "format": CAPTURE_FORMAT,
        "model_name": captured.model_name,
        "prompt": asdict(captured.prompt),
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    write_files(
        check_writable(directory),
        {
            "capture.safetensors": lambda path: path.write_bytes(data),
            "capture.json": lambda path: path.write_text(text, encoding="utf-8"),
        },
    )


def load_capture(directory: str | Path) -> Capture:
    """Read back what ``save_capture`` wrote.

    Raises:
        InputError: If a file is missing, damaged, of another format, or not of the other's run.
    """
    folder = Path(directory)
    try:
        facts = json.loads((folder / "capture.json").read_text(encoding="utf-8"))
        data = (folder / "capture.safetensors").read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read a capture from {str(folder)!r}: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != CAPTURE_FORMAT:
        raise InputError(
            f"{str(folder / 'capture.json')!r} is not a capture of format {CAPTURE_FORMAT}; "
            "capture the prompt again"
        )
    if hashlib.sha256(data).hexdigest() != facts.get("tensors_sha256"):
        raise InputError(
            f"{str(folder / 'capture.safetensors')!r} is damaged, or belongs to another "
            "capture.json; capture the prompt again"
        )
    try:
        prompt = _prompt_from_json(facts["prompt"])
        tensors = safetensors.torch.load(data)
        model_name = str(facts["model_name"])
        known = {field.name for field in fields(Capture)}
        values = {name: tensors[name] for name in _TENSORS if name in tensors and name in known}
        return Capture(prompt=prompt, model_name=model_name, **{"resid_mid": None, **values})
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(
            f"cannot read a capture from {str(folder)!r}: {error!r}; capture the prompt again"
        ) from error


def _prompt_from_json(facts: dict[str, Any]) -> TokenizedPrompt:
    target = facts["target"]
    return TokenizedPrompt(
        prompt_id=facts["prompt_id"],
        text=facts["text"],
        tokens=tuple(facts["tokens"]),
        token_texts=tuple(facts["token_texts"]),
        read_pos=facts["read_pos"],
        target=None if target is None else Target(id=target["id"], text=target["text"]),
    )
