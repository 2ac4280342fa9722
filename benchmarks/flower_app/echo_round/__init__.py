"""Rounds whose clients send back what they were sent, in Flower."""
