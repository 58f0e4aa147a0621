"""Payments, their attempts and refunds, pure and synchronous: no I/O, no clock, no wire format."""
