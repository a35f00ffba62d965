"""The largest norm of slopes: what no bound that ignores reachability can be below."""
