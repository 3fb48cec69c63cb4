"""Is it well: every check this package knows, on your own model and machine, and a card of them.

``findings`` says what a check can find, ``subject`` prepares the model (and a copy in float64),
``checks`` are the checks one by one, ``card`` shows what they found, and ``check`` runs them: all
of them for a card, or until one fails, for pytest.
"""

from tl_neuron_attr.doctor.card import ModelCheck
from tl_neuron_attr.doctor.check import check_host, check_model
from tl_neuron_attr.doctor.checks import HOST_CHECKS
from tl_neuron_attr.doctor.findings import Finding, Status, worst

__all__ = [
    "HOST_CHECKS",
    "Finding",
    "ModelCheck",
    "Status",
    "check_host",
    "check_model",
    "worst",
]
