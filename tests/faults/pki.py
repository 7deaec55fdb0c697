"""Certificates as they should not be: every field that can be wrong is an argument."""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = dt.datetime.now(dt.timezone.utc)
DAY = dt.timedelta(days=1)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True)
class Issued:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: Any

    @classmethod
    def read(cls, folder: Path, name: str) -> Issued:
        certificate = x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes())
        return cls(certificate, serialization.load_pem_private_key((folder / f"{name}.key").read_bytes(), None))

    def write(self, folder: Path, name: str, *chain: Issued) -> Path:
        """Write NAME.pem, with the certificates above it, and NAME.key; return the folder."""
        pem = serialization.Encoding.PEM
        certificates = [self, *chain]
        (folder / f"{name}.pem").write_bytes(b"".join(one.certificate.public_bytes(pem) for one in certificates))
        how = (pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / f"{name}.key").write_bytes(self.key.private_bytes(*how))
        return folder


def issue(
    name: str | None,
    issuer: Issued | None = None,
    *,
    hosts: Sequence[str] = (),
    usage: Sequence[x509.ObjectIdentifier] = (),
    valid: tuple[dt.datetime, dt.datetime] = (NOW - DAY, NOW + 365 * DAY),
    ca: bool = False,
    key: Any = None,
) -> Issued:
    """Make a certificate; without an issuer it signs itself."""
    key = ec.generate_private_key(ec.SECP256R1()) if key is None else key
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name is not None else [])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return Issued(builder.sign(issuer.key if issuer else key, hashes.SHA256()), key)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
