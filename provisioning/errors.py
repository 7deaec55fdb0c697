"""How provisioning fails."""

from __future__ import annotations


class ProvisioningError(RuntimeError):
    """A board, an image or a package that could not be prepared. The message says why, and what to do; a repetition is safe."""
