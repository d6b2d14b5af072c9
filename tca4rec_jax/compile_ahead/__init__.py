"""Proof before hardware is rented: the real programs, compiled for machines that are not here."""
