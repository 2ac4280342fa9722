"""What the two models of SAML compare, and how: the same on devices and on the server."""

from typing import Any

from protocol.strategies import CoPlmsSettings


def compared(settings: CoPlmsSettings) -> dict[str, Any]:
    """The arguments of `mutual_learning.learn_mutually` that say it."""
    names = ("temperature", "divergence", "jsd_beta", "matching", "span_likelihood_weight")
    return {name: getattr(settings, name) for name in names}
