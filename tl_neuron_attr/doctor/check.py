"""All checks of a model: for a card, or, in the manner of scikit-learn's, until one fails."""

import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, SupportsIndex

from tl_neuron_attr.doctor.card import ModelCheck, facts_of
from tl_neuron_attr.doctor.checks import (
    HOST_CHECKS,
    HostCheck,
    check_identities,
    check_left_alone,
    check_subkeys,
)
from tl_neuron_attr.doctor.findings import Finding
from tl_neuron_attr.doctor.subject import COPY_LIMIT, Examined, examine
from tl_neuron_attr.errors import (
    ConformanceError,
    IdentityError,
    InputError,
    NeuronAttrError,
    UnsupportedModelError,
)
from tl_neuron_attr.host import open_host
from tl_neuron_attr.plan import Plan, plan
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import as_prompt, at_least_one


def check_model(
    model: Any, prompt: Any = None, *, copy_limit: SupportsIndex = COPY_LIMIT
) -> ModelCheck:
    """Every check this package knows, run on your model and machine; ``print`` shows the card.

    What the package believes of a model is measured in the model itself and, where ``copy_limit``
    allows one, in a copy of it in float64: a difference that rounding does not explain is an error
    of the package, of TransformerLens, or of the model. Nothing is raised about the model: what it
    cannot do is a line of the card. The model is only run, and left as it was.

    Args:
        model: A ``TransformerBridge`` or a ``HookedTransformer``.
        prompt: What to ask it: a text, token ids, or a ``Prompt``; by default a short sentence.
            Checks are of this prompt alone, so give one like those you will ask.
        copy_limit: Bytes that the copy's weights may take: 4 GiB by default; 0 for no copy.

    Raises:
        InputError: If ``model`` is no TransformerLens model, or the prompt is none.

    Cost: about a dozen forward passes and attributions of the prompt, and as many of the copy.
    """
    limit = 0 if copy_limit == 0 else at_least_one(copy_limit, "copy_limit")
    asked = None if prompt is None else as_prompt(prompt)
    started = time.perf_counter()
    facts = facts_of(model)
    examined: Examined | None = None
    try:
        with full_precision():  # as attribute computes
            examined = examine(model, asked, limit)
    except UnsupportedModelError as error:
        findings = [Finding(name="the architecture", status="refused", says=str(error))]
    except InputError:
        raise
    except Exception as error:  # an unusual model may raise anything, and its user hears of it
        findings = [_of_error("the forward pass", error)]
    else:
        findings = [
            found for check in HOST_CHECKS for found in _found(check, examined, HOST_CHECKS)
        ]
    return ModelCheck(
        **facts,
        findings=tuple(findings),
        n_tokens=None if examined is None else len(examined.own.prompt.tokens),
        why_no_double="nothing was run" if examined is None else examined.why_no_double,
        forward_seconds=None if examined is None else examined.own.seconds,
        attribute_seconds=_attribute_seconds(examined),
        plan=None if examined is None else _plan(examined),
        seconds=time.perf_counter() - started,
    )


def check_host(
    model: Any, checks: HostCheck | Iterable[HostCheck] = HOST_CHECKS, *, prompt: Any = None
) -> None:
    """Run a model through ``checks``; this package can be used with it if nothing is raised.

    For a model that this package does not know, in a test of its own::

        @pytest.mark.parametrize("check", HOST_CHECKS, ids=lambda check: check.__name__)
        def test_my_model(check):
            check_host(my_model(), check)

    The checks are those of ``check_model``: one, or several. What is approximate, refused on
    purpose or not checked raises nothing.

    Raises:
        ConformanceError: At the first check that fails, with what is wrong, in a sentence.
        UnsupportedModelError: If the model is refused as a whole.
        InputError: If it is no TransformerLens model, the prompt is none, or there are no checks.
    """
    open_host(model)
    run = _as_checks(checks)
    asked = None if prompt is None else as_prompt(prompt)
    try:
        with full_precision():
            examined = examine(model, asked)
    except (UnsupportedModelError, InputError):
        raise
    except Exception as error:  # as above
        raise ConformanceError(f"{_of_error('the forward pass', error).says}") from error
    for check in run:
        for found in _found(check, examined, run):
            if found.status == "fails":
                raise ConformanceError(
                    f"{examined.own.host.architecture}: {found.name}: {found.says}"
                )


def _as_checks(given: Any) -> tuple[HostCheck, ...]:
    several = isinstance(given, Iterable) and not callable(given)
    checks: tuple[Any, ...] = tuple(given) if several else (given,)
    if not checks:
        raise InputError(
            "there are no checks, so nothing would be checked; leave checks out for all of them"
        )
    for check in checks:
        if not callable(check):
            raise InputError(
                f"a check must be a function, like those in HOST_CHECKS; got {check!r}"
            )
    return checks


def _found(
    check: HostCheck, examined: Examined, beside: Sequence[HostCheck]
) -> tuple[Finding, ...]:
    """What a check finds; what it raises is a finding too. ``beside``: all that are run."""
    name = check.__name__.removeprefix("check_").replace("_", " ")
    # the one looks whether the caller's own modes are left alone, so it must see them
    precision = nullcontext() if check is check_left_alone else full_precision()
    with warnings.catch_warnings(), precision:
        warnings.simplefilter("ignore", UserWarning)  # the card has a line for each
        try:
            return check(examined)
        except IdentityError as error:
            if not _has_failing_identity(examined, beside):
                return (_of_error(name, error),)
            # it has a line of its own; what rests on it was not looked at
            says = "an identity fails, so this package refuses to score"
            return (Finding(name=name, status="not checked", says=says),)
        except (InputError, UnsupportedModelError) as error:
            return (Finding(name=name, status="refused", says=str(error)),)
        except Exception as error:  # as above
            return (_of_error(name, error),)


def _has_failing_identity(examined: Examined, checks: Sequence[HostCheck]) -> bool:
    """Whether one of ``checks`` is of identities, and says which does not hold of the model."""
    return any(
        found.status == "fails"
        for check in (check_identities, check_subkeys)
        if check in checks
        for found in _found(check, examined, ())
    )


def _of_error(name: str, error: Exception) -> Finding:
    reason = str(error) if isinstance(error, NeuronAttrError) else f"raises {_line(error)}"
    return Finding(name=name, status="fails", says=reason)


def _line(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _attribute_seconds(examined: Examined | None) -> float | None:
    try:
        return None if examined is None else examined.own.attributed.seconds
    except Exception:  # it has its own line
        return None


def _plan(examined: Examined) -> Plan | None:
    try:
        length = len(examined.own.prompt.tokens)
        return plan(examined.own.host.model, n_tokens=length, device=examined.own.host.device)
    except NeuronAttrError:  # shapes that the plan does not know
        return None
