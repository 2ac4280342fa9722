"""Who trains: the daemon on a device.

It polls the cloud for an assignment, downloads what it lacks, tunes the device's own small model together with the
shared proxy on private data, and sends back an adapter delta, probe logits and numbers. Nothing else leaves; the ledger
lists every body that did. torch is imported only when there is something to train.
"""
