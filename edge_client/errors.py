"""How a device fails, apart from the wire and the model."""

from __future__ import annotations


class DataError(RuntimeError):
    """Pictures that cannot be used for training; the message names the folder, class or file, and the cure."""


class UnfitPlanError(RuntimeError):
    """A plan that this device cannot carry out: other weights than the federation's, or a rank beyond the profile's."""


class InferenceError(RuntimeError):
    """An ONNX file or a picture that cannot be used for inference."""


class PictureTooLargeError(InferenceError):
    """A picture of more pixels than are taken; it was not unpacked."""


class NoModelError(InferenceError):
    """There is nothing to answer with yet: a device that was set up without a model waits for its first release."""


class ShutOutError(RuntimeError):
    """The coordinator takes nothing more from this device: another one speaks under its name, with its key."""


class PlanRefusedError(RuntimeError):
    """A plan that this device does not carry out, as its privacy budget or its memory forbids; it stays for later ones."""


class LedgerError(RuntimeError):
    """A record of what was disclosed that cannot be read: nothing more may leave the device."""


class OutOfMemoryError(RuntimeError):
    """A training that does not fit into this device's memory, not even with a smaller batch."""


class StateError(RuntimeError):
    """A state folder that this client cannot have: another one is at work there, or it cannot be written."""


class EnrolmentError(RuntimeError):
    """A board that did not become a device: refused, or not answered. The message says what to do; asking again is safe."""
