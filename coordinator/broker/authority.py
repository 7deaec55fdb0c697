"""The lab's certificate authority: ECDSA P-256 certificates for broker, coordinator and devices, in PEM files.

A certificate's common name is the name that the broker takes for the user: a device's id, or `coordinator`. Certificates are
valid from 1970 on: a board without a battery for its clock starts there. They are for TLS alone; manifests are signed with
keys of their own (protocol/trust/signing.py).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol.settings import SettingsError
from protocol.storage.files import write_atomic
from protocol.trust.signing import in_pem

CA = "ca"
CRL, LOCK = "crl.pem", ".lock"
OWN = (CA, CRL.removesuffix(".pem"))
YEARS = 20
START = dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)


class Authority:
    """A folder with an authority: `ca.pem` for everybody, `ca.key` for nobody else, `crl.pem` for the broker."""

    def __init__(self, folder: Path, certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> None:
        self.folder = folder
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, folder: Path, name: str) -> Authority:
        """Make an authority; raises SettingsError if the folder holds one: whatever it has issued would be worthless."""
        if (folder / f"{CA}.key").exists() or (folder / f"{CA}.pem").exists():
            raise SettingsError(f"{folder} holds an authority already: name another folder, or issue from this one")
        key = generate_private_key(SECP256R1())
        subject = _name(name)
        builder = _begin(subject, subject, key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        usage = _usage(key_cert_sign=True, crl_sign=True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            builder.add_extension(usage, critical=True).add_extension(identifier, critical=False).sign(key, hashes.SHA256())
        )
        _write(folder, CA, certificate, key)
        authority = cls(folder, certificate, key)
        authority._publish([])
        return authority

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """Read an authority; raises SettingsError."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / f"{CA}.pem").read_bytes())
            key = serialization.load_pem_private_key((folder / f"{CA}.key").read_bytes(), None)
        except FileNotFoundError as error:
            raise SettingsError(f"{folder} holds no authority: `clipcast ca init {folder}` makes one") from error
        except (OSError, ValueError, TypeError) as error:
            raise SettingsError(f"the authority in {folder} cannot be read: {error}") from error
        if not isinstance(key, EllipticCurvePrivateKey):
            raise SettingsError(f"{folder / f'{CA}.key'} is no ECDSA key")
        return cls(folder, certificate, key)

    def issue(self, name: str, hosts: Sequence[str] = ()) -> Path:
        """Write NAME.pem and NAME.key beside the authority: for a server at `hosts`, or without them for a client.

        Returns the certificate's path; raises SettingsError if there is one of this name, or a host cannot be used.
        """
        with self._alone():
            return self._issue(name, hosts)

    def _issue(self, name: str, hosts: Sequence[str]) -> Path:
        if name in OWN:
            raise SettingsError(
                f"{self.folder / name}.pem exists and is the authority's own: give the certificate another name"
            )
        if (self.folder / f"{name}.pem").exists():
            raise SettingsError(f"{self.folder / f'{name}.pem'} exists: move it aside to issue another one of this name")
        key = generate_private_key(SECP256R1())
        _write(self.folder, name, self._certify(name, key.public_key(), hosts), key)
        return self.folder / f"{name}.pem"

    def certify(self, name: str, request: str) -> str:
        """Return a client's certificate in PEM for the key of a request (PKCS 10, PEM); `keep` puts it into the folder.

        The name is ours, whatever the request says. Raises ValueError unless the request is signed by its own P-256 key.
        """
        return self._certify(name, requested_key(request), ()).public_bytes(serialization.Encoding.PEM).decode()

    def keep(self, name: str, certificate: str) -> None:
        """Put a certificate that was made here into the folder as NAME.pem, unless it was revoked.

        What stood there is another device of this name, which this one replaces: it is revoked. Raises SettingsError.
        """
        with self._alone():
            self.check_device(name)
            self._keep(name, certificate)

    def check_device(self, name: str) -> None:
        """Raise SettingsError for a name that is taken by what is no device: the authority itself, or a server."""
        path = self.folder / f"{name}.pem"
        if name in OWN:
            raise SettingsError(f"{name!r} is the authority's own name: no device can have it")
        try:
            found = x509.load_pem_x509_certificate(path.read_bytes())
            uses = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except FileNotFoundError:
            return
        except (OSError, ValueError, x509.ExtensionNotFound) as error:
            raise SettingsError(f"{path} is no device's certificate: give the device another name") from error
        if ExtendedKeyUsageOID.CLIENT_AUTH not in uses:
            raise SettingsError(f"{path} is a server's certificate: give the device another name")

    def _keep(self, name: str, certificate: str) -> None:
        path, made = self.folder / f"{name}.pem", x509.load_pem_x509_certificate(certificate.encode())
        if made.serial_number in {old.serial_number for old in self._revoked()}:
            return
        try:
            if path.exists() and path.read_text() == certificate:
                return
            if path.exists():
                self._revoke(name)
            write_atomic(path, certificate.encode())
            path.chmod(0o644)
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error}") from error

    def _certify(self, name: str, key: EllipticCurvePublicKey, hosts: Sequence[str]) -> x509.Certificate:
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _begin(_name(name), self._certificate.subject, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def revoke(self, name: str) -> Path:
        """Put the certificate NAME.pem on the list of revoked ones, and rename it NAME-SERIAL.revoked.pem: the name is free.

        Returns the list's path. A repetition after a crash ends in the same. Raises SettingsError if there is no such
        certificate.
        """
        with self._alone():
            return self._revoke(name)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other process change the folder meanwhile: the list of the revoked is read and written again."""
        try:
            with (self.folder / LOCK).open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except PermissionError as error:
            raise SettingsError(f"{self.folder} cannot be written: {error}") from error

    def _revoke(self, name: str) -> Path:
        path = self.folder / f"{name}.pem"
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError) as error:
            raise SettingsError(f"{path} cannot be read as a certificate: {error}") from error
        if name == CA or certificate.issuer != self._certificate.subject:
            raise SettingsError(f"{path} is not a certificate that this authority has issued")
        entry = x509.RevokedCertificateBuilder(certificate.serial_number, dt.datetime.now(dt.timezone.utc))
        known = {old.serial_number: old for old in self._revoked()}
        self._publish([*known.values(), *([] if certificate.serial_number in known else [entry.build()])])
        path.rename(self.folder / f"{name}-{certificate.serial_number:x}.revoked.pem")
        return self.folder / CRL

    def _revoked(self) -> list[x509.RevokedCertificate]:
        path = self.folder / CRL
        try:
            return list(x509.load_pem_x509_crl(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{path} cannot be read: {error}. Restore it: without it what was revoked is valid"
            ) from error

    def _publish(self, revoked: Sequence[x509.RevokedCertificate]) -> None:
        """Write the list of revoked certificates; like these it is valid for clocks that start in 1970."""
        until = dt.datetime.now(dt.timezone.utc) + dt.timedelta(days=365 * YEARS)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._certificate.subject)
        builder = builder.last_update(START).next_update(until)
        for entry in revoked:
            builder = builder.add_revoked_certificate(entry)
        number = x509.CRLNumber(len(revoked) + 1)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        signed = (
            builder.add_extension(number, critical=False)
            .add_extension(identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        try:
            write_atomic(self.folder / CRL, signed.public_bytes(serialization.Encoding.PEM))
            (self.folder / CRL).chmod(0o644)
        except OSError as error:
            raise SettingsError(f"{self.folder} cannot be written: {error}") from error


def requested_key(request: str) -> EllipticCurvePublicKey:
    """Return the key that a certificate request (PKCS 10, PEM) is for; raises ValueError unless that has signed it."""
    asked = x509.load_pem_x509_csr(request.encode())
    key = asked.public_key()
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise ValueError("a certificate is for a key on the curve P-256")  # noqa: TRY004 - what came is wrong, not a type
    if not asked.is_signature_valid:
        raise ValueError("the certificate request is not signed by its own key")
    return key


def _begin(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey) -> x509.CertificateBuilder:
    until = dt.datetime.now(dt.timezone.utc) + dt.timedelta(days=365 * YEARS)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(START)
        .not_valid_after(until)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise SettingsError(f"host {host!r} is neither an address nor a name in ASCII") from error


def _write(folder: Path, name: str, certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> None:
    """Write the key first: a certificate without its key is of no use, and says that the name is taken."""
    try:
        write_atomic(folder / f"{name}.key", in_pem(key))
        write_atomic(folder / f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM))
    except OSError as error:
        raise SettingsError(f"{folder} cannot be written: {error}") from error
    (folder / f"{name}.pem").chmod(0o644)
