"""Downloads images and sounds by URL, with limits of size and time, and from public addresses only."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import httpx2

from engine import MAX_MEDIA_BYTES, RequestRefused

_TIMEOUT_SECONDS = 10.0
_MAX_REDIRECTS = 3
# IPv6 ranges whose addresses contain an IPv4 address, which can be private.
_EMBEDDING_NETWORKS = tuple(map(ipaddress.ip_network, ("2002::/16", "2001::/32", "64:ff9b::/96", "64:ff9b:1::/48")))


async def download_media(url: str, field: str) -> bytes:
    """Returns the content at an http or https URL. Raises RequestRefused with `field`.

    The host of the URL and of each redirect is resolved once, and the connection is made to the checked address.
    """
    try:
        async with (
            asyncio.timeout(_TIMEOUT_SECONDS),
            httpx2.AsyncClient(trust_env=False, timeout=_TIMEOUT_SECONDS) as client,
        ):
            for _ in range(_MAX_REDIRECTS + 1):
                data, location = await _get(client, httpx2.URL(url), field)
                if not location:
                    return data
                url = str(httpx2.URL(url).join(location))
    except TimeoutError:
        raise RequestRefused(f"The download took more than {_TIMEOUT_SECONDS:.0f} seconds.", field=field) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError) as error:
        raise RequestRefused(f"The URL cannot be read: {str(error) or type(error).__name__}.", field=field) from None
    raise RequestRefused(f"The URL has more than {_MAX_REDIRECTS} redirects.", field=field)


async def _get(client: httpx2.AsyncClient, url: httpx2.URL, field: str) -> tuple[bytes, str]:
    """Returns the content and an empty text; for a redirect, empty content and the URL of the target."""
    if url.scheme not in ("http", "https") or not url.host:
        raise RequestRefused("The URL, or one of its redirects, is neither http nor https.", field=field)
    address = await _public_address(url, field)
    # The body is read without decompression, so the server is asked for an uncompressed one.
    headers = {"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"}
    target = url.copy_with(host=address)
    request = client.build_request("GET", target, headers=headers, extensions={"sni_hostname": url.host})
    response = await client.send(request, stream=True)
    try:
        if location := response.headers.get("Location", "") if response.is_redirect else "":
            return b"", location
        if not response.is_success:
            raise RequestRefused(f"The URL cannot be read: its server replied {response.status_code}.", field=field)
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > MAX_MEDIA_BYTES:
                raise RequestRefused(f"The file at the URL has more than {MAX_MEDIA_BYTES} bytes.", field=field)
        return bytes(data), ""
    finally:
        await response.aclose()


async def _public_address(url: httpx2.URL, field: str) -> str:
    """Returns an address of the URL's host. Raises RequestRefused unless all addresses of the host are public."""
    port = url.port or (443 if url.scheme == "https" else 80)
    found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]) for info in found]
    if not addresses or not all(map(is_public, addresses)):
        raise RequestRefused("The URL is not on a public network; send a data URL instead.", field=field)
    return addresses[0]


def is_public(address: str) -> bool:
    """Returns True for an address of the public internet.

    >>> is_public("1.1.1.1"), is_public("10.0.0.1"), is_public("::ffff:127.0.0.1"), is_public("2606:4700::1111")
    (True, False, False, True)
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        elif parsed.scope_id or any(parsed in network for network in _EMBEDDING_NETWORKS):
            return False
    return parsed.is_global and not parsed.is_multicast
