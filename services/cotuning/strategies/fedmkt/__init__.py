"""FedMKT (arXiv 2406.02224): devices' SLMs and the server's LLM teach each other by logits on public rows alone.

A round: each device tunes psi_i on its private rows and sends the top K of its SLM's distributions on the probe set Q.
The server keeps a row of Q only where the best device's cross-entropy per answer token is below the LLM's own
(DualMinCE, algorithm 2), trains omega on the rows kept by

    lambda CE + (1 - lambda) CE(p_teacher)

and sends the top K of the LLM's distributions on Q. Both send the cross-entropy of each row with them. Each device then
does likewise with the LLM as the only teacher.

Chosen here, where the paper leaves it open or differs:

* What a device does with the LLM's logits of round t comes first in its step of round t + 1, so that a round is one
  exchange; `last_transfer` does it after the last round.
* What a party says of its own losses must be possible with the distributions that it sent, else both are refused. With
  `losses` computed, who reads them computes the cross-entropy of the answer from them, and nobody is chosen on its
  word: a token outside the top K then has its share of the tail (`probe_logits.payload_losses`), which errs where a
  model is unsure.
* Only a loss strictly below the student's own is better; of devices with equal losses the first teaches; a loss that is
  not finite is worse than any, and where the student's own is not finite nobody is compared with it, so no row is kept.
* Rows that are not kept are not trained on; `transfer_rows` all trains on them by their cross-entropy.
* Everything is aligned by the reader, which knows the sender's tokenizer. Under `fold` the lesson is a KL, which has
  the gradient of the cross-entropy with the same teacher (`received_logits`).
* Optimizer steps are the budget, not epochs; the paper's 10 rounds are a matter of the run.
"""

from cotuning.strategies.fedmkt.steps import FedMkt
from cotuning.strategies.fedmkt.student import parse_logits, select_rows

__all__ = ["FedMkt", "parse_logits", "select_rows"]
