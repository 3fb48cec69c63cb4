"""Methods on one footing: a case -> a score for every neuron, whoever computes it and how.

``case.py`` says what a method is; each other file is one idea. ``METHODS`` has them by name, and a
function of your own takes part by being passed where a name would be.
"""

from tl_neuron_attr.methods.case import Case, Method, best_neurons, neuron_shape
from tl_neuron_attr.methods.conformance import METHOD_CHECKS, check_method, example_cases
from tl_neuron_attr.methods.registry import LETTERS, METHODS, method_name, method_of

__all__ = [
    "LETTERS",
    "METHODS",
    "METHOD_CHECKS",
    "Case",
    "Method",
    "best_neurons",
    "check_method",
    "example_cases",
    "method_name",
    "method_of",
    "neuron_shape",
]
