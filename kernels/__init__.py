"""Fast implementations of the update, installed as ``slimadam.kernels``."""
