"""The graph of an architecture: nodes that name their parameters, and how one is evaluated."""
