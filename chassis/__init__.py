"""How any service runs; a fifth one, unrelated to orders, would use it unchanged."""
