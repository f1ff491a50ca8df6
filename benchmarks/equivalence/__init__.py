"""Ask whether SlimAdam trains like AdamW, each at its own best learning rate."""
