"""Upper bounds by quadratic constraints on the slopes of activations, certified."""
