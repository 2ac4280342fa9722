"""Co-PLMs (arXiv 2511.11678): domain-specific tuning (DST), then structure-agnostic mutual learning (SAML), on the
device and on the server; only the proxy's shared adapter and its logits on public text cross the network.

Symbols: theta the shared adapter, phi_i the domain adapter, psi_i the SLM's, omega the LLM's.

Ours, where the paper leaves it open: phi_i is trained from its state of the last round and stays frozen during SAML;
alpha weighs what a model learns from the proxy (the SLM on a device, the LLM on the server) and beta what the proxy
learns from it; the probe rows that a device's logits teach are a set share of the server's batches.
"""

from cotuning.strategies.co_plms.device import device_step
from cotuning.strategies.co_plms.server import logits_places, parse_logits, server_step
from cotuning.strategies.co_plms.steps import CoPlms

__all__ = ["CoPlms", "device_step", "logits_places", "parse_logits", "server_step"]
