"""What happened in a run: tensors and plain facts, without a model, in memory and on disk."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError, NonFiniteError
from tl_neuron_attr.files import check_writable, write_files
from tl_neuron_attr.prompts import Distribution, Target, TokenizedPrompt

CAPTURE_FORMAT = 2
"""Version of the two files ``save_capture`` writes."""


_POST_SCALES = ("attn_post_scale", "ffn_post_scale")

LAYERED = (
    *("resid_pre", "resid_mid", "attn_out", "mlp_out", "mlp_post", "pattern", "v", "z"),
    *_POST_SCALES,
)
"""The tensors of a ``Capture`` that have a layer axis, on the way through a block."""

TENSORS = (*LAYERED, "resid_final", "logits")
"""All of them."""

SOURCED = ("resid_pre", "attn_out", "mlp_out", "mlp_post", "pattern", *_POST_SCALES)
"""Those that ``Sources`` has."""

_WANTED = "wanted"  # the probabilities of a distribution asked about, in a file


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
    """Coefficients of the FFN neurons: ``act(pre)``, in a gated FFN ``act(gate) * up``.

    In a mixture of experts that times the router's weight: 0 where an expert was not chosen."""
    pattern: Float[Tensor, "layer head pos"]
    """Attention paid by the read position to each source position."""
    v: Float[Tensor, "layer pos key_value_head d_head"]
    """Value vectors, value bias included; query heads share them in groups."""
    z: Float[Tensor, "layer head d_head"]
    """What each head gathered at the read position: the sum of ``pattern * v`` over sources."""
    attn_post_scale: Float[Tensor, "layer 1"] | None = None
    """Divisor of the norm on what attention writes; ``None`` where there is no such norm."""
    ffn_post_scale: Float[Tensor, "layer 1"] | None = None
    """Likewise of the FFN. ``attn_out`` and ``mlp_out`` are what comes out of these norms."""
    logits: Float[Tensor, " d_vocab"]
    """The model's own logits at the read position."""

    __repr__ = brief

    def to(self, where: torch.dtype | torch.device) -> "Capture":
        """The same capture with its activations in a dtype (to score in float64), or elsewhere."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        return replace(self, **{name: t.to(where) for name, t in tensors.items() if t is not None})

    def top_predictions(self, k: int = 5) -> list[tuple[int, float]]:
        """The model's ``k`` likeliest next tokens as (id, log-probability in nats)."""
        log_probs, ids = self.logits.log_softmax(-1).topk(min(k, self.logits.shape[0]))
        return list(zip(ids.tolist(), log_probs.tolist(), strict=True))

    def probs(self) -> Float[Tensor, " d_vocab"]:
        """The model's own prediction of every token, in float64."""
        return self.logits.double().softmax(-1)

    def log_prob_of(self, token: int) -> float:
        """The model's own log-probability of a token, in nats."""
        return float(self.logits.log_softmax(-1)[token])


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What happened at other positions of a captured run: those that attention neurons read from.

    A value neuron of attention forms its coefficient at its source position, out of what earlier
    components wrote there. In the dtype of the ``Capture``, which holds ``v`` of all positions.
    """

    positions: Int[Tensor, " source"]
    resid_pre: Float[Tensor, "layer source d_model"]
    """Residual stream entering each block."""
    attn_out: Float[Tensor, "layer source d_model"]
    mlp_out: Float[Tensor, "layer source d_model"]
    mlp_post: Float[Tensor, "layer source d_mlp"]
    """Coefficients of the FFN neurons there."""
    pattern: Float[Tensor, "layer head source pos"]
    """Attention these positions pay to each position up to the read position."""
    attn_post_scale: Float[Tensor, "layer source 1"] | None = None
    """Divisor of the norm on what attention writes there; ``None`` where there is none."""
    ffn_post_scale: Float[Tensor, "layer source 1"] | None = None

    __repr__ = brief


def save_capture(captured: Capture, directory: str | Path) -> None:
    """Write ``capture.safetensors`` and ``capture.json`` into ``directory``.

    Raises:
        InputError: If the directory cannot be written to.
        OutputError: If writing fails on the way; nothing has changed then.
    """
    tensors = {
        name: getattr(captured, name).contiguous()
        for name in TENSORS
        if getattr(captured, name) is not None
    }
    asked = captured.prompt.target
    target = None if asked is None else asked.facts()
    if asked is not None and asked.distribution is not None:
        if asked.distribution.probs is not None:
            tensors[_WANTED] = asked.distribution.probs.contiguous()
    data = safetensors.torch.save(tensors)
    facts = {
        "format": 1 if asked is None or not (asked.also or asked.distribution) else CAPTURE_FORMAT,
        "model_name": captured.model_name,
        "prompt": {**asdict(replace(captured.prompt, target=None)), "target": target},
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
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read a capture from {str(folder)!r}: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") not in (1, CAPTURE_FORMAT):
        raise InputError(
            f"{str(folder / 'capture.json')!r} is not a capture of format {CAPTURE_FORMAT} or an "
            "earlier one; capture the prompt again"
        )
    if hashlib.sha256(data).hexdigest() != facts.get("tensors_sha256"):
        raise InputError(
            f"{str(folder / 'capture.safetensors')!r} is damaged, or belongs to another "
            "capture.json; capture the prompt again"
        )
    try:
        tensors = safetensors.torch.load(data)
        prompt = _prompt_from_json(facts["prompt"], tensors.get(_WANTED))
        model_name = str(facts["model_name"])
        values = {name: tensors[name] for name in TENSORS if name in tensors}
        return Capture(prompt=prompt, model_name=model_name, **{"resid_mid": None, **values})
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(
            f"cannot read a capture from {str(folder)!r}: {error!r}; capture the prompt again"
        ) from error


def _prompt_from_json(facts: dict[str, Any], wanted: Tensor | None) -> TokenizedPrompt:
    target = None if facts["target"] is None else Target.of_facts(facts["target"])
    if target is not None and target.distribution is not None:
        name = target.distribution.name
        target = replace(target, distribution=Distribution(wanted, name))
    return TokenizedPrompt(
        prompt_id=facts["prompt_id"],
        text=facts["text"],
        tokens=tuple(facts["tokens"]),
        token_texts=tuple(facts["token_texts"]),
        read_pos=facts["read_pos"],
        target=target,
    )


def prompt_name(prompt: TokenizedPrompt) -> str:
    """What errors call a prompt: its id, and its text, of a long one both ends."""
    text = "".join(prompt.token_texts) if prompt.text is None else prompt.text
    shown = text if len(text) <= 60 else f"{text[:30]}…{text[-29:]}"
    return f"prompt {prompt.prompt_id} ({shown!r})"


def refuse_non_finite(captures: Iterable[Capture]) -> None:
    """Stop where an activation is NaN or infinite.

    Raises:
        NonFiniteError: Naming the prompt and the first layer it occurs in.
    """
    for captured in captures:
        where = _non_finite(captured)
        if where is not None:
            raise NonFiniteError(
                f"the model's activations are not finite: in {prompt_name(captured.prompt)} "
                f"{where} holds NaN or infinity; check the weights, or run in float32"
            )


def _non_finite(captured: Capture) -> str | None:
    """Which activation is NaN or infinite first, on the way through the model."""
    tensors = {name: getattr(captured, name) for name in TENSORS}
    bad = [name for name, t in tensors.items() if t is not None and not t.isfinite().all()]
    if not bad:
        return None
    first_layers = {
        name: int((~tensors[name].isfinite()).flatten(1).any(dim=1).nonzero()[0])
        for name in bad
        if name in LAYERED
    }
    if first_layers:
        name = min(first_layers, key=lambda name: (first_layers[name], LAYERED.index(name)))
        return f"{name} of layer {first_layers[name]}"
    return f"{bad[0]}, after the last layer ({captured.resid_pre.shape[0] - 1}),"
