"""Lower bounds: the largest Jacobian norm over samples, searches, certified secants."""
