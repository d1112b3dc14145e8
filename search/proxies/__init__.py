"""Zero-cost proxies: what an untrained network tells about how well it would do, from one batch of images."""

from search.proxies import activations, counts, gradients, linear  # noqa: F401 - they register what they define
from search.proxies.proxy import PROXIES, Trial, check_names, proxy, score
from search.proxies.scores import ProxyScores, ProxySettings, compressed

__all__ = ["PROXIES", "ProxyScores", "ProxySettings", "Trial", "check_names", "compressed", "proxy", "score"]
