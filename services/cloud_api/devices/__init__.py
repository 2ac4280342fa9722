"""Devices: their enrolment, how operators see them, and how they say that they are alive."""
