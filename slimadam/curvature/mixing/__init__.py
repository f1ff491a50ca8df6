"""Advice on data mixtures from relative critical sharpness."""
