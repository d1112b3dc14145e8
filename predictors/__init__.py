"""Accuracy, latency, memory and size of an architecture, predicted."""
