"""How provisioning fails."""

from __future__ import annotations


class ProvisioningError(RuntimeError):
    """A board, an image or a package that could not be prepared; the message says what to do. A repetition is safe."""
