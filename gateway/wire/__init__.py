"""wire (sans-IO): bytes of the V2 protocol, read and rewritten without a message class."""
