"""What a domain says of the slopes of activations: ranges of what they read, certified."""
