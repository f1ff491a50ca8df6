"""Run a user's training script unchanged and take part in its optimizer steps."""
