"""Per-sample norms of Jacobians, of any model or of a plan."""
