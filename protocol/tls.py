"""TLS as we speak it, and what its refusals mean to the one who has to mend them."""

from __future__ import annotations

import re
import socket
import ssl
from pathlib import Path

from protocol.settings import BrokerSettings

VERSIONS = {"1.3": ssl.TLSVersion.TLSv1_3, "1.2": ssl.TLSVersion.TLSv1_2}

CONNECT_S, ALERT_S = 5.0, 1.0
ISSUE = "issue another one (`clipcast ca issue`)"
OTHER_AUTHORITY = "The broker's certificate is not from the authority in `ca_file`: name the right ca.pem there"
OLDER_TLS = 'The broker speaks only older versions of TLS: let it speak 1.3, or allow `tls_version = "1.2"` under [broker]'
NO_TLS = "That port does not speak TLS: write mqtt:// in `url`, or the port that does, usually 8883"

# By what OpenSSL says, of the broker's certificate (checked here) or in the broker's alerts (it checks ours).
CURES = {
    "verify failed: certificate has expired": (
        f"By this machine's clock the broker's certificate, or its authority's, has expired: set the clock, or {ISSUE}"
    ),
    "verify failed: certificate is not yet valid": (
        "By this machine's clock the broker's certificate begins in the future: set the clock, or issue one with "
        "`clipcast ca issue`, which is valid from 1970"
    ),
    "self-signed certificate": OTHER_AUTHORITY,
    "self signed certificate": OTHER_AUTHORITY,
    "certificate signature failure": OTHER_AUTHORITY,
    "unable to get": f"{OTHER_AUTHORITY}, and let the broker send the certificates between the two, if there are any",
    "mismatch, certificate is not valid for": (
        "The broker's certificate is for other names: write one of them in `url`, or issue one with `--host` for this name"
    ),
    "purpose": "The broker's certificate is no server's: issue one with `clipcast ca issue broker ca --host HOST`",
    "too weak": f"The broker's certificate has a key or a signature that is too weak: {ISSUE}",
    "too small": f"The broker uses a key that is too weak: {ISSUE}",
    "certificate required": "The broker asks for a client's certificate: name one as `cert_file` and `key_file`",
    "alert unknown ca": "The broker does not know the authority of our certificate (`cert_file`): use the broker's",
    "alert certificate expired": f"Our certificate (`cert_file`) has expired: {ISSUE}",
    "alert certificate revoked": f"Our certificate (`cert_file`) was revoked (`clipcast ca revoke`): {ISSUE}",
    "alert unsupported certificate": f"Our certificate (`cert_file`) is no client's: {ISSUE}, without `--host`",
    "alert bad certificate": "The broker refuses our certificate (`cert_file`): perhaps its clock is behind, see its log",
    "alert decrypt error": "Our certificate (`cert_file`) is not by the authority that it names: use the broker's",
    "protocol version": OLDER_TLS,
    "unsupported protocol": OLDER_TLS,
    "handshake failure": "The two sides have no cipher in common: let the broker speak TLS 1.3",
    "wrong version number": NO_TLS,
    "record layer failure": NO_TLS,
    "certificate verify failed": "The broker's certificate cannot be trusted: name its authority's ca.pem as `ca_file`",
}


class CredentialsError(ValueError):
    """A file named under [broker] that cannot be used; the message says which, why, and what to do."""


def context(settings: BrokerSettings) -> ssl.SSLContext:
    """Return how a link is secured; raises CredentialsError."""
    try:
        made = ssl.create_default_context(cafile=str(settings.ca_file) if settings.ca_file else None)
    except (OSError, ssl.SSLError) as error:
        raise CredentialsError(
            f"ca_file {settings.ca_file} cannot be read: {plain(error)}. It has to be the authority's certificate in PEM"
        ) from error
    made.minimum_version = VERSIONS[settings.tls_version]
    made.hostname_checks_common_name = False  # the names that a server has are in its alternative names, nowhere else
    if settings.cert_file is not None:
        _load(made, settings.cert_file, settings.key_file)
    return made


def _load(made: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    try:
        made.load_cert_chain(certificate, key, password="")  # else OpenSSL would ask at the terminal
    except ssl.SSLError as error:
        if "mismatch" in str(error).lower():
            raise CredentialsError(
                f"cert_file {certificate} and key_file {key} do not belong together: copy both from where they were issued"
            ) from error
        raise CredentialsError(
            f"cert_file {certificate} or key_file {key} cannot be read: {plain(error)}. Both have to be whole files in PEM, "
            f"the key not encrypted"
        ) from error
    except OSError as error:
        raise CredentialsError(f"cert_file {certificate} or key_file {key} cannot be read: {error.strerror}") from error


def plain(error: BaseException | str) -> str:
    """Return what OpenSSL says without the line of its source."""
    return re.sub(r"\s*\(_ssl\.c:\d+\)", "", str(error)) or type(error).__name__


def refusal(settings: BrokerSettings, secured: ssl.SSLContext) -> str | None:
    """Ask a broker that has ended a connection whether it refuses our certificate; return its alert, None if it does not.

    In TLS 1.3 it comes after our side of the handshake, and is lost if we have sent more by then: here nothing is sent.
    """
    try:
        with socket.create_connection((settings.host, settings.port), CONNECT_S) as sock:
            sock.settimeout(CONNECT_S)
            with secured.wrap_socket(sock, server_hostname=settings.host) as link:
                link.settimeout(ALERT_S)
                link.recv(1)
    except ssl.SSLError as error:
        return plain(error) if cure(str(error)) else None
    except OSError:
        pass
    return None


def cure(trouble: str) -> str | None:
    """Return what to do about a refused handshake, None if `trouble` is none. Waiting mends none of them."""
    said = trouble.lower().replace("_", " ")
    return next((remedy for words, remedy in CURES.items() if words in said), None)
