"""Answers as clients expect them: JSON bodies and stream frames of both endpoints."""
