"""Messages that are not what was signed, or not by whom they say (rogue.py), and all that a rogue broker can make."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

from protocol.bus import Delivery
from protocol.envelope import decode
from protocol.errors import WireError
from protocol.trust.signing import signer_of
from tests.faults.misplaced import elsewhere, misplaced_chunk, odd_size, repeated, signed_elsewhere, swapped_sender
from tests.faults.rogue import Make, Rogue, b64, is_token, parts_of, payload_of, said

# Bytes that are not what was signed.


def flipped(rogue: Rogue, delivery: Delivery) -> Delivery:
    data = bytearray(delivery.payload)
    data[rogue.rng.randrange(len(data))] ^= 1 << rogue.rng.randrange(8)
    return said(delivery, bytes(data))


def truncated(rogue: Rogue, delivery: Delivery) -> Delivery:
    return said(delivery, delivery.payload[: rogue.rng.randrange(len(delivery.payload))])


def extended(rogue: Rogue, delivery: Delivery) -> Delivery:
    more = rogue.rng.choice([b".", b"=", b"==", b"\n", b" ", b"A", b".e30", rogue.rng.randbytes(9)])
    return said(delivery, rogue.rng.choice([delivery.payload + more, more + delivery.payload]))


def other_text(rogue: Rogue, delivery: Delivery) -> Delivery | None:
    """The same bytes in another spelling of base64: unused bits set, or the other alphabet."""
    parts = list(parts_of(delivery))
    which = rogue.rng.randrange(3)
    part = parts[which]
    spare = {2: 15, 3: 3}.get(len(part) % 4, 0)
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    if not spare or rogue.rng.random() < 0.2:
        changed = part.replace(b"-", b"+").replace(b"_", b"/")
    else:
        changed = part[:-1] + alphabet[(value := alphabet.index(part[-1:]) ^ rogue.rng.randint(1, spare)) : value + 1]
    parts[which] = changed
    return said(delivery, b".".join(parts)) if changed != part else None


def spliced(rogue: Rogue, delivery: Delivery) -> Delivery | None:
    other = rogue.token()
    if other is None or other.payload == delivery.payload:
        return None
    pairs = list(zip(parts_of(delivery), parts_of(other), strict=True))
    chosen = [pair[rogue.rng.randrange(2)] for pair in pairs]
    payload = b".".join(chosen)
    return None if payload in (delivery.payload, other.payload) else said(delivery, payload)


def rewritten(rogue: Rogue, delivery: Delivery) -> Delivery:
    """Another value somewhere in the manifest, under the old signature."""
    header, _, signature = parts_of(delivery)
    frame = json.loads(payload_of(delivery))
    place = rogue.rng.choice([frame, frame["body"]])
    key = rogue.rng.choice(sorted(place))
    place[key] = rogue.rng.choice([None, 0, 1, 10**12, True, "x", "0" * 64, [], {}])
    return said(delivery, b".".join((header, b64(json.dumps(frame).encode()), signature)))


# Signatures that are not theirs.


def resigned(rogue: Rogue, delivery: Delivery) -> Delivery:
    envelope = decode(payload_of(delivery))
    return said(delivery, rogue.own.seal(rogue.federation, envelope.sender, envelope.manifest, envelope.to))


def _headed(rogue: Rogue, delivery: Delivery, header: bytes, signature: bytes | None = None) -> Delivery:
    _, payload, old = parts_of(delivery)
    del rogue
    return said(delivery, b".".join((b64(header), payload, old if signature is None else signature)))


def other_algorithm(rogue: Rogue, delivery: Delivery) -> Delivery:
    kid = signer_of(delivery.payload)
    algorithm = rogue.rng.choice(
        ["none", "None", "NONE", "", "eddsa", "EdDSA ", "ES256", "RS256", "PS256", "HS512", None, 1]
    )
    header = json.dumps({"alg": algorithm, "kid": kid}).encode()
    return _headed(rogue, delivery, header, rogue.rng.choice([None, b"", b64(bytes(64))]))


def public_key_as_secret(rogue: Rogue, delivery: Delivery) -> Delivery:
    """HS256 with what everybody knows."""
    kid = signer_of(delivery.payload)
    secret = rogue.rng.choice([kid.encode(), base64.urlsafe_b64decode(kid + "="), b""])
    header, payload = b64(json.dumps({"alg": "HS256", "kid": kid}).encode()), parts_of(delivery)[1]
    signature = b64(hmac.new(secret, header + b"." + payload, hashlib.sha256).digest())
    return said(delivery, b".".join((header, payload, signature)))


def other_kid(rogue: Rogue, delivery: Delivery) -> Delivery:
    kid = rogue.rng.choice(
        [rogue.own.public, "", "A" * 43, "ä" * 43, signer_of(delivery.payload) + "=", "../key.pem", None, 7, ["x"], {}]
    )
    return _headed(rogue, delivery, json.dumps({"alg": "EdDSA", "kid": kid}).encode())


def odd_header(rogue: Rogue, delivery: Delivery) -> Delivery:
    """Duplicate keys, escapes, foreign letters, further fields, other spacing, no object at all."""
    kid = signer_of(delivery.payload)
    header = rogue.rng.choice(
        [
            f'{{"alg":"none","alg":"EdDSA","kid":"{kid}"}}',
            f'{{"alg":"EdDSA","kid":"{rogue.own.public}","kid":"{kid}"}}',
            f'{{"\\u0061lg":"EdDSA","kid":"{kid}"}}',
            f'{{"alg":"EdDS\\u0041","kid":"{kid}"}}',
            f'{{"alg":"EdDSА","kid":"{kid}"}}',  # noqa: RUF001 - a Cyrillic letter, deliberately
            f'{{"alg":"EdDSA","kid":"{kid}","crit":["x"],"x":1}}',
            f'{{"alg":"EdDSA","kid":"{kid}","b64":false,"crit":["b64"]}}',
            f'{{"alg":"EdDSA","kid":"{kid}","jwk":{{"kty":"OKP"}}}}',
            f'{{ "alg": "EdDSA", "kid": "{kid}" }}',
            f'{{"kid":"{kid}","alg":"EdDSA"}}',
            f'\ufeff{{"alg":"EdDSA","kid":"{kid}"}}',
            f'["EdDSA","{kid}"]',
            '"EdDSA"',
            "null",
            "[" * 300 + "]" * 300,
            '{"a":' * 200 + "1" + "}" * 200,
        ]
    )
    return _headed(rogue, delivery, header.encode())


TOKENS: tuple[Make, ...] = (
    flipped,
    truncated,
    extended,
    other_text,
    spliced,
    rewritten,
    resigned,
    other_algorithm,
    public_key_as_secret,
    other_kid,
    odd_header,
    elsewhere,
    signed_elsewhere,
    swapped_sender,
    repeated,
    odd_size,
)
CHUNKS: tuple[Make, ...] = (misplaced_chunk,)


def forge(rogue: Rogue, delivery: Delivery) -> tuple[str, Delivery] | None:
    """Make something of a message that is about to be delivered; None if nothing came of it."""
    make = rogue.rng.choice(TOKENS if is_token(delivery) else CHUNKS)
    try:
        made = make(rogue, delivery)
    except WireError:
        return None
    return None if made is None or made == delivery else (make.__name__, made)
