"""Fetches a file from where the server points to, by a connection that knows nothing of this device.

It has no credential, no cookie and no header of ours, and follows no further. What it brings is checked by its hash
like everything else, by who asked for it.
"""

from urllib.parse import urlsplit

import httpx

from edge_agent.errors import CloudUnavailable


class LinkFollower:
    """A second connection. Links must be `https`, or of the scheme in which the server itself is spoken to."""

    def __init__(self, server_url: str, timeout: httpx.Timeout, *, trust_env: bool) -> None:
        self._server_url = server_url
        self._schemes = {"https", urlsplit(server_url).scheme}
        self._http = httpx.Client(timeout=timeout, trust_env=trust_env)

    def open(self, link: str, offset: int) -> httpx.Response:
        """Return the answer, not yet read, with the file from byte `offset` on (206) or whole (200).

        Raises:
            CloudUnavailable: the link leads to nothing.
        """
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        try:
            if urlsplit(link).scheme not in self._schemes:
                raise httpx.InvalidURL(f"expected a link with {' or '.join(sorted(self._schemes))}")
            response = self._http.send(self._http.build_request("GET", link, headers=headers), stream=True)
        except (httpx.TransportError, httpx.InvalidURL, ValueError) as error:
            raise self._useless(str(error) or type(error).__name__) from None
        if not response.is_success:
            response.close()
            raise self._useless(f"HTTP {response.status_code}")
        return response

    def close(self) -> None:
        """Let go of the connection."""
        self._http.close()

    def _useless(self, reason: str) -> CloudUnavailable:
        return CloudUnavailable(f"{self._server_url} pointed to a place that gives no file: {reason[:200]}")
