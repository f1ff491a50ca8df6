"""Data mixtures chosen by relative critical sharpness."""
