"""meshctl: runs a whole mesh on one machine, and is the command line for using one.

`servers` knows the servers from wheels, `processes` how a child is started and ended for sure.
"""
