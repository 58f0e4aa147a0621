"""The payment service: charges each order once, and gives back what is cancelled.

An order's creation is the command to charge it, and its cancellation the command to let
go or give back; both arrive as events (`consumers`). What is to be asked of the payment
provider is committed first and asked afterwards (`worker`), never inside a transaction;
what came of it is told as an event. `domain/payment.py` says what every answer means,
`gateways.py` is the port to the provider, reads go straight to a read table (`queries`).
"""
