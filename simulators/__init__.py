"""Doubles of what ordermesh talks to: programs of their own, reached over real sockets."""
