"""Mosquitto's configuration that we recommend: mutual TLS, a certificate's name as the user, a few access rules for all."""

from __future__ import annotations

from pathlib import Path

from coordinator.broker.authority import CRL
from protocol.envelope import COORDINATOR, ENROL
from protocol.messages import CHUNK_SIZE
from protocol.topics import ROOT, VERSION, check_name

PACKET = 2 * CHUNK_SIZE
CONNECTIONS = 5000
QUEUED_BYTES = 8 * 1024 * 1024
QUEUED_MESSAGES = 2 * CONNECTIONS

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
# Whose certificate `clipcast ca revoke` has taken back is refused once `kill -HUP` has made the broker read this list again.
crlfile {certificates}/{crl}
allow_anonymous false
allow_zero_length_clientid false
# A line `topic deny #` below `user ID` cuts a device off that is connected, after another `kill -HUP`.
acl_file {folder}/acl
# What somebody has left here who may no longer write there is given to nobody.
check_retain_source true
# QoS 2 is never used. Above so many connections new ones are refused; the system may allow fewer open files (`ulimit -n`).
max_qos 1
max_connections {connections}
# A chunk has {chunk} bytes. What matters is kept by coordinator and clients: nothing needs to outlive the broker.
max_packet_size {packet}
persistence false
# What may wait for one reader: a coordinator that comes back is given every client's status at once. All else, if it is
# dropped, is asked for again.
max_inflight_messages 20
max_queued_messages {queued_messages}
max_queued_bytes {queued_bytes}
# Small messages go out at once. Nobody may read $SYS: then it need not be written.
set_tcp_nodelay true
sys_interval 0
"""

ACL = """\
# The coordinator speaks for the federation, and hears its clients.
user {coordinator}
topic write {base}/classes
topic write {base}/round
topic write {base}/release
topic write {base}/key
topic write {base}/blob/+/+
topic write {base}/to/+/+
topic read {base}/from/#
topic read {base}/enrol/+/request
topic write {base}/enrol/+/answer

# A board that is nobody yet asks, and is answered; what all may do, below, it may not.
user {enrol}
topic write {base}/enrol/+/request
topic read {base}/enrol/+/answer
topic deny {base}/classes
topic deny {base}/round
topic deny {base}/release
topic deny {base}/key
topic deny {base}/blob/#
topic deny {base}/to/#
topic deny {base}/from/#

# A client writes below its own name, and reads the broadcasts and what is for it.
pattern write {base}/from/%u/#
pattern read {base}/to/%u/+
pattern read {base}/classes
pattern read {base}/round
pattern read {base}/release
pattern read {base}/key
pattern read {base}/blob/+/+
"""


def mosquitto(federation: str, folder: Path, certificates: Path, server: str = "broker", port: int = 8883) -> dict[str, str]:
    """Return the files of a Mosquitto for one federation, by name; raises WireError for a name that is none."""
    check_name(federation, "federation")
    where = {"federation": federation, "folder": folder.absolute(), "certificates": certificates.absolute()}
    limits = {"chunk": CHUNK_SIZE, "packet": PACKET, "connections": CONNECTIONS}
    queue = {"queued_messages": QUEUED_MESSAGES, "queued_bytes": QUEUED_BYTES}
    return {
        "mosquitto.conf": MOSQUITTO.format(server=server, port=port, crl=CRL, **where, **limits, **queue),
        "acl": ACL.format(base=f"{ROOT}/{VERSION}/{federation}", coordinator=COORDINATOR, enrol=ENROL),
    }
