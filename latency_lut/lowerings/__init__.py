"""Lowerings, by the numbers in which they compute. A new one is a decorated function in one of these modules."""
