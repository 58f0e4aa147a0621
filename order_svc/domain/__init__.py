"""Orders and their saga, pure and synchronous: no I/O, no wire format, no clock."""
