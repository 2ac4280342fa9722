"""How much less an update counts that was trained from an older version of the shared adapter."""


def staleness_discount(versions: int, exponent: float) -> float:
    """Return `(1 + k)^-a`, the polynomial staleness function of FedAsync (arXiv 1903.03934, section 5.2).

    There it scales the mixing weight of one update with the global model; here the weight of an update in a round's
    mean, before the weights are made to sum to one. Its delta stays what it was, relative to the older version: adding
    it to a later one is the usual approximation, exact only where the loss is linear between the two.

    Args:
        versions: k, how many versions the update's base is older than the round's; 0 or more.
        exponent: a, 0 or more; 0 discounts nothing.

    Raises:
        ValueError: a negative argument.
    """
    if versions < 0 or exponent < 0:
        raise ValueError(f"expected versions >= 0 and exponent >= 0, got {versions} and {exponent}")
    return float((1 + versions) ** -exponent)
