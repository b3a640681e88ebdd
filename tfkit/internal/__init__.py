"""Shared machinery that is not part of the public interface."""
