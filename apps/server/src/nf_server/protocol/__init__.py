"""Request models: what clients may send, and what is refused."""
