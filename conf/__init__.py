"""Hydra configuration groups; read by the command lines only."""
