"""The native ops again, in readable float64 PyTorch: the specification that the tests use."""
