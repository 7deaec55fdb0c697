"""What a command's exit code means (docs/operations.md): one code for each kind of failure that a user can mend."""

from __future__ import annotations

BUG, USAGE = 1, 2
SETTINGS, BROKER, MODEL, DATA, FEDERATION, EXPORT, INFERENCE, PROFILE, MISSING, DEMO, SHUT_OUT = (
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
    12,
    13,
)
WARNINGS, UNFIT, NOT_ENROLLED, PROVISION = 14, 15, 16, 17
INTERRUPTED = 130

# By name, so that deciding on a code imports nothing: a class that was never imported was never raised.
CODES = {
    "protocol.settings.SettingsError": SETTINGS,
    "protocol.errors.WireError": SETTINGS,
    "protocol.errors.KeyFileError": SETTINGS,
    "protocol.errors.BusError": BROKER,
    "clip_lora.errors.ModelError": MODEL,
    "edge_client.errors.UnfitPlanError": MODEL,
    "edge_client.errors.OutOfMemoryError": MODEL,
    "edge_client.errors.DataError": DATA,
    "edge_client.errors.StateError": SETTINGS,
    "edge_client.errors.ShutOutError": SHUT_OUT,
    "edge_client.errors.LedgerError": SETTINGS,
    "edge_client.errors.EnrolmentError": NOT_ENROLLED,
    "provisioning.errors.ProvisioningError": PROVISION,
    "coordinator.errors.FederationError": FEDERATION,
    "coordinator.errors.NotKeptError": FEDERATION,
    "export.errors.ExportError": EXPORT,
    "edge_client.errors.InferenceError": INFERENCE,
    "edge_client.errors.PictureTooLargeError": INFERENCE,
    "edge_client.errors.NoModelError": INFERENCE,
    "clipcast.demo.errors.DemoError": DEMO,
    "hardware_profiles.facts.ProfileError": PROFILE,
}


def code_of(error: BaseException) -> int:
    """Return the exit code for an error; 1 for one that is a bug of ours."""
    if isinstance(error, ModuleNotFoundError):
        return MISSING
    kind = type(error)
    return CODES.get(f"{kind.__module__}.{kind.__qualname__}", BUG)
