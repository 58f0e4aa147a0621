"""How any service of ordermesh runs; a fifth service, unrelated to orders, would use it unchanged."""
