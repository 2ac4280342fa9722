"""A device's share of a round: asking for it by long poll, reporting, refusing."""
