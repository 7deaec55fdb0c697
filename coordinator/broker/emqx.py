"""EMQX's configuration that we recommend, with the same access rules as Mosquitto's (mosquitto.py).

Written from EMQX's documentation; no EMQX was at hand to try it on. tests/coordinator/broker/test_emqx.py checks that both
files are well formed, and judges every role and topic by the rules as EMQX documents them.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.broker.mosquitto import CONNECTIONS, PACKET, QUEUED_MESSAGES
from protocol.envelope import COORDINATOR, ENROL
from protocol.messages import CHUNK_SIZE
from protocol.topics import ROOT, VERSION, check_name

EMQX = """\
# EMQX 5.1 or newer for clipcast, federation {federation}: append this to its etc/emqx.conf.
# Written from EMQX's documentation and not tried on a live EMQX: let `clipcast broker check` say whether it holds.

listeners.ssl.default {{
  bind = "0.0.0.0:{port}"
  max_connections = {connections}
  ssl_options {{
    cacertfile = "{certificates}/ca.pem"
    certfile = "{certificates}/{server}.pem"
    keyfile = "{certificates}/{server}.key"
    versions = ["tlsv1.3"]
    # Who has no certificate of our authority stays outside.
    verify = verify_peer
    fail_if_no_peer_cert = true
  }}
}}
listeners.tcp.default.enable = false
listeners.ws.default.enable = false
listeners.wss.default.enable = false

mqtt {{
  # The certificate's name is the user in the access rules.
  peer_cert_as_username = cn
  # A chunk has {chunk} bytes.
  max_packet_size = {packet}
  max_qos_allowed = 1
  # What waits for one slow reader: a coordinator that comes back is given every client's status at once.
  max_mqueue_len = {queued_messages}
  max_inflight = 32
  retain_available = true
  wildcard_subscription = true
}}

retainer {{
  enable = true
  max_payload_size = {packet}
}}

authorization {{
  no_match = deny
  deny_action = ignore
  sources = [
    {{
      type = file
      enable = true
      path = "{folder}/acl.conf"
    }}
  ]
}}
"""

ACL = """\
%% Access rules of clipcast, federation {federation}. The first that fits counts.
%% To cut a device off at the broker, put before them: {{deny, {{username, "ID"}}, all, ["#"]}}.

%% The coordinator speaks for the federation, and hears its clients.
{{allow, {{username, "{coordinator}"}}, publish, ["{base}/classes", "{base}/round", "{base}/release", "{base}/key"]}}.
{{allow, {{username, "{coordinator}"}}, publish, ["{base}/blob/+/+", "{base}/to/+/+"]}}.
{{allow, {{username, "{coordinator}"}}, subscribe, ["{base}/from/#", "{base}/enrol/+/request"]}}.
{{allow, {{username, "{coordinator}"}}, publish, ["{base}/enrol/+/answer"]}}.

%% A board that is nobody yet asks, and is answered, and no more.
{{allow, {{username, "{enrol}"}}, publish, ["{base}/enrol/+/request"]}}.
{{allow, {{username, "{enrol}"}}, subscribe, ["{base}/enrol/+/answer"]}}.
{{deny, {{username, "{enrol}"}}, all, ["#"]}}.

%% A client writes below its own name, and reads the broadcasts and what is for it.
{{allow, all, publish, ["{base}/from/${{username}}/#"]}}.
{{allow, all, subscribe, ["{base}/to/${{username}}/+"]}}.
{{allow, all, subscribe, ["{base}/classes", "{base}/round", "{base}/release", "{base}/key", "{base}/blob/+/+"]}}.

{{deny, all}}.
"""


def emqx(federation: str, folder: Path, certificates: Path, server: str = "broker", port: int = 8883) -> dict[str, str]:
    """Return the files of an EMQX for one federation, by name; raises WireError for a name that is none."""
    check_name(federation, "federation")
    where = {"federation": federation, "folder": folder.absolute(), "certificates": certificates.absolute()}
    limits = {"chunk": CHUNK_SIZE, "packet": PACKET, "connections": CONNECTIONS, "queued_messages": QUEUED_MESSAGES}
    base = f"{ROOT}/{VERSION}/{federation}"
    return {
        "emqx.conf": EMQX.format(server=server, port=port, **where, **limits),
        "acl.conf": ACL.format(federation=federation, base=base, coordinator=COORDINATOR, enrol=ENROL),
    }
