"""Is it right: the answer measured without each method's best neurons, beside controls."""

from tl_neuron_attr.evaluate.effects import CONTROLS
from tl_neuron_attr.evaluate.evaluation import (
    ALL_TYPES,
    METRICS,
    By,
    Evaluation,
    load_evaluation,
)
from tl_neuron_attr.evaluate.run import evaluate

__all__ = ["ALL_TYPES", "CONTROLS", "METRICS", "By", "Evaluation", "evaluate", "load_evaluation"]
