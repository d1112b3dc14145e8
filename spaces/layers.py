"""What a network is made of: layer specifications, and networks as layers joined by name.

A `LayerSpec` describes one deployable layer completely and independently of its position: two layers with equal specs cost
the same on a device, which is why it is the key of every table. A `Network` joins layers into a graph. Both come from one
place only: the walk in `Space.network`.
"""

from spaces.layer_spec import ACTIVATIONS, OPERATOR_NAMES, TOKEN_OPERATORS, LayerSpec
from spaces.network import INPUT, Network, NetworkBuilder, Node

__all__ = ["ACTIVATIONS", "INPUT", "OPERATOR_NAMES", "TOKEN_OPERATORS", "LayerSpec", "Network", "NetworkBuilder", "Node"]
