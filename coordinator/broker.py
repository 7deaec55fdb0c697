"""The broker's configuration that we recommend: mutual TLS, a certificate's name as the user, three access rules for all."""

from __future__ import annotations

from pathlib import Path

from protocol.envelope import COORDINATOR
from protocol.messages import CHUNK_SIZE
from protocol.topics import ROOT, VERSION, check_name

PACKET = 2 * CHUNK_SIZE

MOSQUITTO = """\
# Mosquitto 2.0 for clipcast, federation {federation}. Start it with `mosquitto -c {folder}/mosquitto.conf`.
listener {port}
cafile {certificates}/ca.pem
certfile {certificates}/{server}.pem
keyfile {certificates}/{server}.key
tls_version tlsv1.3
# Who has no certificate of our authority stays outside; the certificate's name is the user in the access rules.
require_certificate true
use_identity_as_username true
allow_anonymous false
acl_file {folder}/acl
# A chunk has {chunk} bytes. What matters is kept by coordinator and clients: nothing needs to outlive the broker.
max_packet_size {packet}
max_inflight_messages 20
max_queued_messages 1000
persistence false
"""

ACL = """\
# The coordinator speaks for the federation, and hears its clients.
user {coordinator}
topic write {base}/classes
topic write {base}/round
topic write {base}/release
topic write {base}/blob/+/+
topic write {base}/to/+/+
topic read {base}/from/#

# A client writes below its own name, and reads the broadcasts and what is for it.
pattern write {base}/from/%u/#
pattern read {base}/to/%u/+
pattern read {base}/classes
pattern read {base}/round
pattern read {base}/release
pattern read {base}/blob/+/+
"""


def mosquitto(federation: str, folder: Path, certificates: Path, server: str = "broker", port: int = 8883) -> dict[str, str]:
    """Return the files of a Mosquitto for one federation, by name; raises WireError for a name that is none."""
    check_name(federation, "federation")
    where = {"federation": federation, "folder": folder.absolute(), "certificates": certificates.absolute()}
    limits = {"server": server, "port": port, "chunk": CHUNK_SIZE, "packet": PACKET}
    return {
        "mosquitto.conf": MOSQUITTO.format(**where, **limits),
        "acl": ACL.format(base=f"{ROOT}/{VERSION}/{federation}", coordinator=COORDINATOR),
    }
