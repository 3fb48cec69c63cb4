"""What if: heads and neurons zeroed, scaled, clamped or held at their mean, and the run then.

An intervention is a value that says what is changed, and changes nothing by being built. It takes
effect in one of three ways:

- for one call, through hooks: ``intervention_hooks``;
- for every call in a block: ``with intervened(model, ...)``;
- in the weights, until it is undone: ``edit_weights``.

``values`` says what interventions there are and what they mean, ``means`` measures coefficients,
``hooks`` and ``edits`` let them take effect, and ``rows`` runs many prompts, each without other
parts, in few forward passes.
"""

from tl_neuron_attr.interventions.edits import Edit, edit_weights
from tl_neuron_attr.interventions.hooks import intervened, intervention_hooks
from tl_neuron_attr.interventions.means import mean_coefficients
from tl_neuron_attr.interventions.rows import (
    ZeroMask,
    batches,
    capture_zeroed,
    head_scan,
    masked_residuals,
    zeroed_residuals,
)
from tl_neuron_attr.interventions.values import (
    Clamped,
    Intervention,
    MeanCoefficients,
    MeanReplaced,
    Part,
    Scaled,
    Zeroed,
    as_zeroed,
    check_interventions,
    check_zeroed,
    clamp,
    replace_mean,
    scale,
    zero,
)

__all__ = [
    "Clamped",
    "Edit",
    "Intervention",
    "MeanCoefficients",
    "MeanReplaced",
    "Part",
    "Scaled",
    "ZeroMask",
    "Zeroed",
    "as_zeroed",
    "batches",
    "capture_zeroed",
    "check_interventions",
    "check_zeroed",
    "clamp",
    "edit_weights",
    "head_scan",
    "intervened",
    "intervention_hooks",
    "masked_residuals",
    "mean_coefficients",
    "replace_mean",
    "scale",
    "zero",
    "zeroed_residuals",
]
