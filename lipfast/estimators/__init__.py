"""Estimators: bounds on a Lipschitz constant, one method per file."""
