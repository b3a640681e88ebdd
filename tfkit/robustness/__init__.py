"""Attacks, poisoning, defenses and certification."""
