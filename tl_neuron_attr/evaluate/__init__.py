"""Is it right: the answer measured without each method's best neurons, beside controls."""
