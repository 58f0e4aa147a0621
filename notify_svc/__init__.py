"""The notification service: tells customers and merchants what became of an order.

It hears of orders and payments over the broker, notes in one transaction which mails
each event asks for (`commands`, `storage`), and then brings each of them to its end:
rendered in the recipient's language (`rendering`), handed to a mail server
(`channels`), settled (`delivery`). It never changes an order. One notification is kept
per event, recipient, channel and template, however often the event arrives; see
docs/adr/0040-one-mail-per-event-and-recipient.md.
"""
