"""The method by its definition: float64, one neuron at a time, no code shared with the package."""

import math


def log_prob(
    model, vector, token, norm_scale, *, convention="exact", rms=False, eps=1e-5, soft_cap=None
):
    """log p(token) of one residual vector, a list of floats, through plain Python arithmetic."""
    gain, bias, W_U, b_U = model
    d_model = len(vector)
    centred = vector if rms else [x - sum(vector) / d_model for x in vector]
    if norm_scale is None:
        norm_scale = math.sqrt(sum(x * x for x in centred) / d_model + eps)
    normalized = [x / norm_scale * g for x, g in zip(centred, gain, strict=True)]
    if convention != "published":
        normalized = [x + b for x, b in zip(normalized, bias, strict=True)]
    logits = [
        sum(x * w for x, w in zip(normalized, column, strict=True))
        + (0.0 if convention == "published" else b)
        for column, b in zip(W_U, b_U, strict=True)
    ]
    if soft_cap is not None:
        logits = [soft_cap * math.tanh(z / soft_cap) for z in logits]
    largest = max(logits)
    total = sum(math.exp(z - largest) for z in logits)
    return logits[token] - largest - math.log(total)


def norm_scale(resid_final, *, convention, rms, eps):
    """The scale the final norm has at the read position; None where it is recomputed."""
    if convention == "recomputed":
        return None
    if convention == "published" and rms:
        eps = 1e-6
    d_model = len(resid_final)
    mean = 0.0 if rms else sum(resid_final) / d_model
    return math.sqrt(sum((x - mean) ** 2 for x in resid_final) / d_model + eps)
