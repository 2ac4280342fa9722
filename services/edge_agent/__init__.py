"""Who trains: the daemon on a device.

It polls the cloud for an assignment, downloads what it lacks, tunes the device's own small model on private data as the
run's strategy says, and sends back the parts that this declares (an adapter delta, logits, a message) and numbers.
Nothing else leaves; the ledger lists every body that did. torch is imported only when there is something to train.
"""
