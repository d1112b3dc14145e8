"""What can be built: choices, layers, elastic operators, spaces."""
