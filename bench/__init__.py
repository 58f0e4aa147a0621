"""What an order costs: `make bench` measures it beside a bare echo and a hand-written pipeline."""
