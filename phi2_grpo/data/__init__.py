"""Prompts and preference pairs: read from anywhere, filtered, stored."""
