"""The demo: a small byte-level GPT, trained with AdamW and with SlimAdam on text that every Python has."""
