"""What was found, as a card: a value that prints, shows itself in a notebook, and goes to JSON."""

from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

from tl_neuron_attr.attribution import versions
from tl_neuron_attr.display import box, counted, escaped, facts, line
from tl_neuron_attr.doctor.findings import Finding, Status, worst
from tl_neuron_attr.errors import UnsupportedModelError
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.plan import Plan, in_bytes, in_time

WIDTH = 78
"""Characters of a printed card: a terminal of 80 shows it whole."""

_COARSELY = "; rounding in half precision may hide errors, so what it shows is approximate"

_COLOURS: dict[Status, str] = {
    "ok": "#3C9350",
    "approximate": "#B8860B",
    "refused": "#B8860B",
    "fails": "#C0392B",
    "not checked": "#808080",
}


@dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """What ``check_model`` found out about one model on one machine."""

    model_name: str
    architecture: str
    class_name: str
    """``TransformerBridge`` or ``HookedTransformer``."""
    shape: str
    """Its sizes, norm and kind of FFN in words; empty where it is refused."""
    processing: str
    """What was done to the weights after loading; empty where it is refused."""
    dtype: str
    devices: tuple[str, ...]
    """Where its weights are."""
    versions: dict[str, str]
    findings: tuple[Finding, ...]
    """Line by line."""
    n_tokens: int | None
    """Of the prompt that was asked; ``None`` if nothing was run."""
    why_no_double: str
    """Why nothing was measured in float64; empty where it was."""
    forward_seconds: float | None
    """A forward pass of the prompt, measured."""
    attribute_seconds: float | None
    """The same with the best 20 neurons of each kind, measured."""
    plan: Plan | None
    """What attributing the prompt would take with the best 300 neurons; ``None`` if not known."""
    seconds: float
    """What all checks took."""

    @property
    def holds(self) -> bool:
        """Whether the model is supported, and every check that ran holds."""
        refused = any(each.name == "the architecture" for each in self.findings)
        return not refused and not any(each.status == "fails" for each in self.findings)

    @property
    def verdict(self) -> str:
        """In a sentence: how many of what."""
        statuses = [each.status for each in self.findings]
        said = ", ".join(
            f"{statuses.count(status)} {status}" for status in _COLOURS if status in statuses
        )
        if worst(self.findings) == "fails":
            return f"Do not trust its scores: {said}"
        if not self.holds:
            return f"It cannot be attributed: {said}"
        return f"All that was checked holds: {said}"

    @property
    def memory(self) -> str:
        """What attributing the prompt takes, in words; empty where it is not known."""
        if self.plan is None or self.forward_seconds is None:
            return ""
        peak = in_bytes(self.plan.certified.peak_bytes)
        measured = f"forward pass {in_time(self.forward_seconds)}"
        if self.attribute_seconds is not None:
            measured += f", best 20 neurons of each kind {in_time(self.attribute_seconds)}"
        return (
            f"weights {in_bytes(self.plan.weight_bytes)}; "
            f"{counted(self.n_tokens or 0, 'token')}, measured: {measured}; "
            f"expected for the best 300: {in_time(self.plan.certified.seconds)} and "
            f"{peak} beyond the weights, for all neurons {in_time(self.plan.dense.seconds)}"
        )

    @property
    def _coarsely(self) -> bool:
        """Whether what was measured may be off by the rounding of half precision."""
        measured = [each for each in self.findings if each.tolerance is not None]
        return any(each.status == "approximate" for each in measured)

    def about(self) -> dict[str, str]:
        """What the model is, by the name of the fact."""
        known = {
            "class": self.class_name,
            "weights": self.processing,
            "family": self.architecture,
            "shape": self.shape,
            "held": f"{self.dtype} on {', '.join(self.devices)}",
            "float64": self.why_no_double
            and f"not checked: {self.why_no_double}{self._coarsely * _COARSELY}",
            "takes": self.memory,
            "with": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
        }
        return {name: value for name, value in known.items() if value}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "model": self.model_name,
            "architecture": self.architecture,
            "class": self.class_name,
            "shape": self.shape,
            "processing": self.processing,
            "dtype": self.dtype,
            "devices": list(self.devices),
            "versions": self.versions,
            "holds": self.holds,
            "verdict": self.verdict,
            "n_tokens": self.n_tokens,
            "why_no_double": self.why_no_double,
            "findings": [each.to_dict() for each in self.findings],
            "forward_seconds": self.forward_seconds,
            "attribute_seconds": self.attribute_seconds,
            "certified": None if self.plan is None else asdict(self.plan.certified),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        return "\n".join(each.text for each in card_lines(self, WIDTH))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td><b style="color:{_COLOURS[each.status]}">{each.status}</b></td>'
            f"<td>{escaped(each.name)}</td>"
            + "".join(f'<td class="num">{escaped(number)}</td>' for number in numbers(each))
            + f'<td class="words">{escaped(each.says)}</td></tr>'
            for each in self.findings
        )
        head = "".join(
            f'<th scope="col"{" class=num" * (2 <= place < 6)}>{escaped(name)}</th>'
            for place, name in enumerate(
                ("", "looked at", self.dtype, "allowed", "float64", "allowed", "")
            )
        )
        return box(
            f"{self.model_name}: {self.verdict}",
            facts({name: escaped(value) for name, value in self.about().items()}),
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
            "</div>",
            line(_LEGEND),
        )


_LEGEND = (
    "Errors are relative to the largest part, unless in nats. Not checked means that nobody looked."
)


def facts_of(model: Any) -> dict[str, Any]:
    """What is known of any TransformerLens model, also of one that is refused.

    Raises:
        InputError: If it is none.
    """
    try:
        host: Host | None = open_host(model)
    except UnsupportedModelError:
        host = None
    cfg = model.cfg
    weights = [*model.parameters()]
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    known = {
        "model_name": str(getattr(cfg, "model_name", "unknown")),
        "architecture": str(
            getattr(cfg, "original_architecture", None) or getattr(cfg, "architecture", "unknown")
        ),
        "class_name": type(model).__name__,
        "shape": "",
        "processing": "",
        "dtype": ", ".join(dtypes),
        "devices": tuple(sorted({str(weight.device) for weight in weights})),
        "versions": versions(),
    }
    if host is None:
        return known
    heads = f"{counted(host.n_heads, 'head')} of {host.d_head}"
    if host.n_key_value_heads != host.n_heads:
        heads += f" ({host.n_key_value_heads} for keys and values)"
    return known | {
        "model_name": host.model_name,
        "architecture": host.architecture,
        "class_name": host.class_name,
        "processing": host.processing,
        "dtype": str(host.dtype).removeprefix("torch."),
        "shape": f"{counted(host.n_layers, 'layer')}, {heads}, d_model {host.d_model:,}, d_mlp "
        f"{host.d_mlp:,}, {host.d_vocab:,} tokens; "
        f"{'LayerNorm' if host.norm == 'layer_norm' else 'RMSNorm'}, "
        f"{'gated' if host.gated else 'plain'} FFN{_experts(host)}"
        f"{', parallel blocks' * host.parallel}",
    }


def numbers(finding: Finding) -> tuple[str, str, str, str]:
    """The error in the model's dtype, what is allowed there, and the same in float64."""
    return (
        _short(finding.error),
        _short(finding.tolerance),
        _short(finding.double_error),
        _short(finding.double_tolerance),
    )


def _short(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.0e}" if number else "0"


_STATUS = 12  # characters: of the longest, and a space
_NUMBER = 9


@dataclass(frozen=True, kw_only=True)
class CardLine:
    """A line of the card, and the status of what it is about, with which it may begin."""

    text: str = ""
    status: Status | None = None


def card_lines(check: ModelCheck, width: int) -> list[CardLine]:
    """The card line by line, none longer than ``width``."""
    lines = _hanging("", check.verdict, 0, width, worst(check.findings))
    for name, value in {"model": check.model_name, **check.about()}.items():
        lines += _hanging(name, value, 9, width)
    measured = [each for each in check.findings if each.error is not None]
    if measured:
        widest = _STATUS + max(len(each.name) for each in measured)
        # where they do not fit, what is allowed is left to the notebook and to JSON
        whole = width >= widest + 4 * _NUMBER
        step = 1 if whole else 2
        precisions = f"{check.dtype:>{2 * _NUMBER // step}}{'float64':>{2 * _NUMBER // step}}"
        lines += [CardLine(), CardLine(text=f"{'':{widest}}{precisions}")]
        if whole:
            header = "".join(f"{name:>{_NUMBER}}" for name in ("error", "allowed") * 2)
            lines.append(CardLine(text=f"{'':{widest}}{header}"))
        for each in measured:
            columns = "".join(f"{number:>{_NUMBER}}" for number in numbers(each)[::step])
            text = f"{f'{each.status:{_STATUS}}{each.name}':{widest}}{columns}"
            lines.append(CardLine(text=text.rstrip(), status=each.status))
            # of what is approximate for its rounding alone the line on float64 says so, once
            if each.status == "fails" or (each.status != "ok" and each.tolerance is None):
                lines += _hanging("", each.says, _STATUS, width)
    lines.append(CardLine())
    for each in check.findings:
        if each.error is None:
            said = f"{each.name}: {each.says}"
            lines += _hanging(each.status, said, _STATUS, width, each.status)
    end = f"{_LEGEND} All checks took {in_time(check.seconds)}."
    return [*lines, CardLine(), *_hanging("", end, 0, width)]


def _hanging(
    first: str, text: str, indent: int, width: int, status: Status | None = None
) -> list[CardLine]:
    """A text whose lines begin under each other, with a word in front of the first."""
    parts = wrap(text, width - indent)
    return [
        CardLine(
            text=f"{first if place == 0 else '':{indent}}{part}",
            status=status if place == 0 else None,
        )
        for place, part in enumerate(parts)
    ]


def _experts(host: Host) -> str:
    if not host.n_experts:
        return ""
    return (
        f" of {host.n_experts} experts of {host.d_expert:,}, {host.experts_per_position} at a "
        "position"
    )
