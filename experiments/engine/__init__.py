"""Engines: where the networks of a study are trained."""
