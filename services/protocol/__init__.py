"""What is said between the cloud, the devices and the operators: wire schemas, error codes, job names, file headers.

Pydantic only. This package must not import torch, a database or a web framework: it is the one thing every other
package shares, and the API image and an idle device load it.
"""

PROTOCOL_VERSION = "1"
"""Sent by agents in `Cotune-Protocol`; the server answers every version it has published and refuses unknown ones."""
