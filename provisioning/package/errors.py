"""What can go wrong while a package is made."""

from __future__ import annotations


class PackageError(ValueError):
    """A package or a wheelhouse that cannot be made, with what is missing and what to do."""
