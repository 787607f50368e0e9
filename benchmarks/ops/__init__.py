"""One file an op: `cases`, what is timed, and `launches`, what is compiled and whose traffic is counted."""
