"""Upper bounds: certified norms of layers, composed along the graph."""
