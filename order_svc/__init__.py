"""The order service: places orders and runs the saga that brings them to their end.

An order is placed by CreateOrder, which commits it together with the event that tells
the payment service to charge. What payment reports comes back as events, and the saga
(`domain/saga.py`) alone decides what that means for the order. Writes go through the
domain (`commands`, `domain`, `storage`); reads go straight to read tables (`queries`).
"""
