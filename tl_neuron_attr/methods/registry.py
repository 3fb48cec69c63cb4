"""Every method by its name, and the paper's by their letters."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.methods.ablation import ablation
from tl_neuron_attr.methods.carried import carried_back, carried_once
from tl_neuron_attr.methods.case import Method
from tl_neuron_attr.methods.curved import curved_gradient
from tl_neuron_attr.methods.gradients import (
    attribution_patching,
    gradient_activation,
    integrated_gradients,
)
from tl_neuron_attr.methods.static import (
    coefficient,
    coefficient_norm,
    coefficient_rank,
    direct_logit,
    log_prob,
    log_prob_increase,
    norm,
    prob_increase,
    rank,
)
from tl_neuron_attr.methods.together import query, value_and_query

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "log_prob_increase": log_prob_increase,
        "log_prob": log_prob,
        "prob_increase": prob_increase,
        "norm": norm,
        "coefficient": coefficient,
        "rank": rank,
        "coefficient_norm": coefficient_norm,
        "coefficient_rank": coefficient_rank,
        "gradient_activation": gradient_activation,
        "integrated_gradients": integrated_gradients,
        "attribution_patching": attribution_patching,
        "direct_logit": direct_logit,
        "query": query,
        "value_and_query": value_and_query,
        "carried_once": carried_once,
        "carried_back": carried_back,
        "curved_gradient": curved_gradient,
        "ablation": ablation,
    }
)
"""Methods by name. A function of your own takes part by being passed where a name would be."""

LETTERS: Mapping[str, str] = MappingProxyType(dict(zip("abcdefgh", METHODS, strict=False)))
"""The paper's letter of each of its eight static methods -> its name."""


def method_of(given: Any) -> Method:
    """The method a name or a letter stands for; a function stands for itself.

    Raises:
        InputError: If there is no such method, listing those there are.
    """
    if not isinstance(given, str) and callable(given):
        own: Any = given
        return own
    if not isinstance(given, str) or LETTERS.get(given, given) not in METHODS:
        raise InputError(
            f"there is no method {given!r}; give one of {', '.join(METHODS)}, a letter from a to "
            "h, or a function of your own"
        )
    return METHODS[LETTERS.get(given, given)]


def method_name(given: Any) -> str:
    """What a method is called in tables: its name here, or that of your own function.

    Options that ``functools.partial`` holds belong to the name: ``"query(top_values=100)"``.

    Raises:
        InputError: As ``method_of``.
    """
    method = method_of(given)
    own = next((name for name, each in METHODS.items() if each is method), None)
    if isinstance(method, partial):
        options = [*map(repr, method.args), *(f"{k}={v!r}" for k, v in method.keywords.items())]
        return f"{method_name(method.func)}({', '.join(options)})"
    return own or getattr(method, "__name__", type(method).__name__)
