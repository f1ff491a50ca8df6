"""Curvature along the optimizer's own update direction: critical, directional and Hessian sharpness."""
