"""Runtimes: one module each, all with the same few functions."""
