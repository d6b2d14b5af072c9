"""Proof before the hardware is rented: the real programs, compiled for machines that are not here."""
