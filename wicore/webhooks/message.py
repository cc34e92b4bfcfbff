"""What a webhook says and when it is tried again, as https://www.standardwebhooks.com specifies. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import uuid
from typing import Any
from urllib.parse import urlsplit

from wicore.config import WebhookSettings
from wicore.errors import InvalidRequest
from wicore.queue.producer import JobRecord

_LONGEST_WAIT_S = 1800.0
_OTHER_ADDRESSES = [ipaddress.ip_network(text) for text in ("64:ff9b::/96", "2002::/16", "2001::/32")]
"""Public by name, but each holds an IPv4 address that need not be: NAT64, 6to4, Teredo."""


def check_webhook(url: str | None, settings: WebhookSettings) -> None:
    """Raise InvalidRequest for a webhook that could not be delivered. Names are not looked up here."""
    if url is None:
        return
    if settings.secret is None:
        raise InvalidRequest(
            "webhook_url: webhooks are off here, as nothing could sign them; set webhooks.secret",
            param="webhook_url",
        )
    host = (urlsplit(url).hostname or "").strip("[]")
    if not settings.allow_private and _is_address(host) and not is_public(host):
        raise InvalidRequest(
            f"webhook_url: {host} is not a public address; webhooks.allow_private allows it",
            param="webhook_url",
        )


def is_public(address: str) -> bool:
    """Whether an IP address, as text, is one that anybody on the internet could mean."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.is_multicast or any(ip in network for network in _OTHER_ADDRESSES if network.version == ip.version):
        return False
    return ip.is_global


def delivery_id(job_id: str) -> str:
    """The same for every attempt, so that the receiver can tell a repeat."""
    return f"msg_{uuid.uuid5(uuid.NAMESPACE_URL, f'wicore:{job_id}').hex}"


def payload(record: JobRecord) -> bytes:
    """The body: the same for every attempt. `record` is of a job that has ended."""
    assert record.finished_ms is not None
    data: dict[str, Any] = {"object": "job", **record.public()}
    del data["webhook_status"], data["webhook_error"]
    message = {
        "type": f"job.{record.status}",
        "id": delivery_id(record.id),
        "created_at": record.finished_ms // 1000,
        "data": data,
    }
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def signed_headers(secret: str, message_id: str, at_s: int, body: bytes) -> dict[str, str]:
    """The three headers of an attempt at Unix time `at_s`; `secret` as in `webhooks.secret`."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signature = hmac.digest(key, f"{message_id}.{at_s}.".encode() + body, hashlib.sha256)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(at_s),
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }


def wait_s(attempt: int, settings: WebhookSettings) -> float:
    """Seconds from a failed attempt, the first being 1, to the next."""
    return min(settings.retry_s * 5.0 ** (attempt - 1), max(_LONGEST_WAIT_S, settings.retry_s))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
