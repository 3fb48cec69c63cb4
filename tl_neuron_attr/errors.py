"""What can go wrong, told apart: the request, the model, or the numbers."""


class NeuronAttrError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(NeuronAttrError, ValueError):
    """What was asked for cannot be done; the message says what to ask for instead."""


class UnsupportedModelError(NeuronAttrError, NotImplementedError):
    """The model is of a kind whose neurons this package cannot attribute correctly."""


class IdentityError(NeuronAttrError, RuntimeError):
    """The model's activations contradict its weights as this package reads them."""


class NonFiniteError(NeuronAttrError, ArithmeticError):
    """The forward pass produced NaN or infinite activations."""


class OutputError(NeuronAttrError, OSError):
    """A result could not be written; what was there before is untouched."""


class TooManyFailuresError(NeuronAttrError, RuntimeError):
    """More prompts of a run failed than was allowed; what is done is kept."""


class WorkerError(NeuronAttrError, RuntimeError):
    """A worker of a run ended, or failed, in a way that trying again does not mend."""


class DeviceMemoryError(NeuronAttrError, MemoryError):
    """A batch did not fit into the device's memory; the message says what to give instead."""


class ConformanceError(NeuronAttrError, AssertionError):
    """A function given as a method is not one; the message says what is wrong with it."""
